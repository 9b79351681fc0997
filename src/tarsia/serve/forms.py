"""What a patch of one adapter comes to at one site: made once, when the adapter is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Thin:
    """A linear site: y' = gain * (y + scale * up (down (inner * x))) + shift, y = base(inner * x). Parts may be absent.

    ``down`` [rank, in] and ``up`` [out, rank] are float32 or bfloat16 and contiguous; ``gain`` and ``shift`` [out] and
    ``inner`` [in] are float32.
    """

    down: Tensor | None
    up: Tensor | None
    scale: float
    gain: Tensor | None = None
    shift: Tensor | None = None
    inner: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Neck:
    """A stream site: y' = y + scale * (up f(down h + down_bias) + up_bias), h the module's input x or its output y.

    h is layer-normed (epsilon 1e-5) first where there is a ``norm``. All tensors are of one dtype, float32 or bfloat16,
    and contiguous: ``down`` [rank, width], ``up`` [width, rank].
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    norm: Tensor | None
    norm_bias: Tensor | None
    activation: str
    of_input: bool
    scale: float
