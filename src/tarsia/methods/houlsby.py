"""Bottleneck adapters after attention and after the MLP, and the bottleneck that its relatives share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.errors import AttachError, ConfigError, MergeError
from tarsia.core.method import method
from tarsia.core.patch import Base, Outside
from tarsia.core.site import Kind, Role, Site
from tarsia.methods.lora import drawn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""The non-linearities f by name; gelu is the exact one, silu is also called swish."""


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """A bottleneck's width is that of the hidden states divided by ``reduction``, rounded down, at least 1.

    ``norm`` lays a LayerNorm of the bottleneck's own before it; ``bias`` gives both of its linear maps one.
    """

    reduction: float = 16.0
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    norm: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        number = isinstance(self.reduction, int | float) and not isinstance(self.reduction, bool)
        if not number or not math.isfinite(self.reduction) or self.reduction <= 0:
            raise ConfigError("A reduction factor must be a number above 0.", given=repr(self.reduction))
        if self.activation not in ACTIVATIONS:
            raise ConfigError("Unknown activation.", given=repr(self.activation), allowed=", ".join(ACTIVATIONS))
        for name, value in (("norm", self.norm), ("bias", self.bias)):
            if not isinstance(value, bool):
                raise ConfigError(f"{name} is either true or false.", given=repr(value))

    def width(self, site: Site) -> int:
        """Width of the bottleneck at ``site``."""
        return max(1, int(site.shape[0] // self.reduction))


class Bottleneck(Outside):
    """B(h) = U f(D h + d) + u, with D [inner, width] and U [width, inner], and h normed first where it has a norm.

    U and u start at 0, so a new bottleneck adds nothing, and D as LoRA's A does. The bottleneck of the papers before
    LoRA starts near to nothing: Houlsby et al. draw D and U from a normal of deviation 0.01.
    """

    constants: tuple[str, ...] = ("activation",)
    words = ("activation",)

    def __init__(self, activation: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.activation = activation
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    @classmethod
    def create(cls, site: Site, config: Any, base: Base, generator: torch.Generator) -> Self:
        inner, (width,) = config.width(site), site.shape
        tensors = {"down": drawn(inner, width, generator), "up": torch.zeros(width, inner)}
        if config.bias:
            tensors |= {"down_bias": torch.zeros(inner), "up_bias": torch.zeros(width)}
        if config.norm:
            tensors |= {"norm": torch.ones(width), "norm_bias": torch.zeros(width)}
        return cls(tensors=tensors, **cls.settings(config))

    @classmethod
    def settings(cls, config: Any) -> dict[str, Any]:
        """The constants of a new patch, by name."""
        return {name: getattr(config, name) for name in cls.constants}

    @classmethod
    def restore(cls, site: Site, shapes: Mapping[str, tuple[int, ...]], constants: Mapping[str, Any]) -> Self:
        (width,), inner = site.shape, shapes["down"][0]
        fitting = {"down": (inner, width), "up": (width, inner), "down_bias": (inner,)}
        fitting |= dict.fromkeys(("up_bias", "norm", "norm_bias"), (width,))
        if any(fitting.get(name) != shape for name, shape in shapes.items()) or "up" not in shapes:
            raise AttachError(f"The bottleneck does not fit {site.path}.", given=dict(shapes), allowed=fitting)
        for bias in (("down_bias", "up_bias"), ("norm", "norm_bias")):
            if (bias[0] in shapes) != (bias[1] in shapes):
                raise AttachError(f"The bottleneck at {site.path} is not whole.", given=", ".join(shapes), allowed=bias)
        if constants["activation"] not in ACTIVATIONS:
            given, allowed = repr(constants["activation"]), ", ".join(ACTIVATIONS)
            raise AttachError(f"Unknown activation at {site.path}.", given=given, allowed=allowed)
        return cls(tensors={name: torch.empty(shape) for name, shape in shapes.items()}, **constants)

    @staticmethod
    def joined(
        patches: Sequence[tuple[Mapping[str, Any], Mapping[str, Tensor]]], weights: Sequence[float]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One bottleneck as wide as all together: D and d above one another, U side by side, each times its weight.

        A norm's own scales and shifts go into D and d, so what is left of it is the same for all. Raises MergeError
        where activations differ, or some have a norm and others none.
        """
        first = dict(patches[0][0])
        kinds = {(constants["activation"], "norm" in tensors) for constants, tensors in patches}
        if len(kinds) > 1:
            raise MergeError(
                "Bottlenecks of different kinds can not be made one.",
                given="; ".join(f"{f}{' after a norm' if norm else ''}" for f, norm in sorted(kinds)),
                allowed="one activation, and a norm in all or in none",
                do="merge adapters that were trained with one configuration, or let them act side by side",
            )
        shares = [w * c.get("scale", 1.0) / first.get("scale", 1.0) for w, (c, _) in zip(weights, patches, strict=True)]
        held = [{name: tensor.double() for name, tensor in tensors.items()} for _, tensors in patches]
        width, normed = held[0]["up"].shape[0], "norm" in held[0]
        downs = [t["down"] * t["norm"] if normed else t["down"] for t in held]
        made = {
            "down": torch.cat(downs),
            "up": torch.cat([share * t["up"] for share, t in zip(shares, held, strict=True)], 1),
        }
        if normed or any("down_bias" in t for t in held):
            shifts = [t.get("down_bias", t["down"].new_zeros(len(t["down"]))) for t in held]
            shifted = [d + t["down"] @ t["norm_bias"] if normed else d for d, t in zip(shifts, held, strict=True)]
            last = [s * t.get("up_bias", t["up"].new_zeros(width)) for s, t in zip(shares, held, strict=True)]
            made |= {"down_bias": torch.cat(shifted), "up_bias": torch.stack(last).sum(0)}
        if normed:
            made |= {"norm": torch.ones(width).double(), "norm_bias": torch.zeros(width).double()}
        return first, made

    def neck(self) -> tuple[bool, float]:
        """It reads what its module gives, and is added as it is."""
        return False, 1.0

    def through(self, h: Tensor) -> Tensor:
        """B(h) for hidden states [..., width], in their dtype."""
        held = {name: tensor.to(h.dtype) for name, tensor in self._parameters.items() if tensor is not None}
        if "norm" in held:
            h = F.layer_norm(h, h.shape[-1:], held["norm"], held["norm_bias"])
        inner = ACTIVATIONS[self.activation](F.linear(h, held["down"], held.get("down_bias")))
        return F.linear(inner, held["up"], held.get("up_bias"))


@method(
    "houlsby",
    config=BottleneckConfig,
    source="arXiv:1902.00751, section 2.1 and figure 2",
    kinds={Kind.STREAM},
    roles={Role.ATTENTION, Role.MLP},
    folds=False,
    identity=True,
)
class Houlsby(Bottleneck):
    """y + B(y) of what attention and the MLP give, before it is added to the hidden states or normed for that."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.through(y)
