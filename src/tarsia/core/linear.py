"""A frozen linear layer with a low-rank update, as one operation that keeps nothing but its input for the way back.

With frozen W [out, in] and b, trained A [rank, in] and B [out, rank], a number s, x [..., in] and dY [..., out]:

    Y  = x W^T + b + s (x A^T) B^T
    P  = s dY B
    dX = dY W + P A        dA = P^T x        dB = s dY^T (x A^T)

The small products are associated so that nothing of the size of W is made, what is low-rank is added into the large
product in place, and x A^T is computed a second time in place of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Shared:
    """One remaking of a tensor for all who would have kept it: it is there from the first that asks to the last."""

    __slots__ = ("function", "left", "value")

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.left = 0
        self.value: Tensor | None = None

    def __call__(self, sources: Sequence[Tensor]) -> Tensor:
        """The tensor, from its sources as autograd kept them, which knows whether they were changed since."""
        value = self.function(*sources) if self.value is None else self.value
        self.left -= 1
        self.value = value if self.left > 0 else None
        return value


class Remade:
    """How a tensor is made a second time, as its attribute ``remade``: from ``sources``, which are kept anyway.

    ``version`` is the tensor's when that was said: what was written to since is another tensor.
    """

    __slots__ = ("shared", "sources", "version")

    def __init__(self, function: Callable[..., Tensor], sources: tuple[Tensor, ...], version: int) -> None:
        self.shared, self.sources, self.version = Shared(function), sources, version


class LowRank(torch.autograd.Function):
    """``LowRank.apply(x, weight, bias, a, b, scale)``, in the dtype of x; gradients of A and B in theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y = F.linear(x, weight, bias)
        narrow = F.linear(x, a.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(narrow.view(-1, len(a)), b.to(x.dtype).t(), alpha=scale)
        kept: tuple[Tensor, ...] = (x,)
        ctx.remade = None
        held = getattr(x, "remade", None)
        if isinstance(held, Remade) and held.version == x._version:
            held.shared.left += 1
            ctx.remade, kept = held.shared, held.sources
        ctx.save_for_backward(weight, a, b, *kept)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, *kept = ctx.saved_tensors
        dx = da = db = None
        if ctx.remade is not None and torch.is_grad_enabled():
            raise RuntimeError("an input that is made a second time has no second derivative")
        x = kept[0] if ctx.remade is None else ctx.remade(kept)
        rows = x.reshape(-1, x.shape[-1])
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        low = (dy @ b.to(dy.dtype)) * ctx.scale
        if ctx.needs_input_grad[0]:
            # a second derivative goes through what is new each time; without one the product is added to in place
            add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
            dx = add(dy @ weight, low, a.to(dy.dtype)).reshape(x.shape)
        if ctx.needs_input_grad[3]:
            da = (low.t() @ rows).to(a.dtype)
        if ctx.needs_input_grad[4]:
            # the transposed product reads dY along its rows
            db = (((rows @ a.to(rows.dtype).t()).t() @ dy).t() * ctx.scale).to(b.dtype)
        return dx, None, None, da, db, None


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x W^T + b + scale (x A^T) B^T for x [..., in], in the dtype of x, with W and b frozen."""
    y: Tensor = LowRank.apply(x, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
    return y
