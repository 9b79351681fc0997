"""The mean of several patches over one base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tarsia.core.patch import Base, Over, Patch, Upon
from tarsia.core.site import Kind, Site

LINEAR = frozenset({Kind.WEIGHT, Kind.EMBEDDING, Kind.CONV})
"""Kinds of site whose output is linear in their tensors: there the mean of outputs is the output of the mean."""


class Once(Upon):
    """A base that several patches stand on side by side: what they all ask it for is worked out once a call."""

    __slots__ = ("folded", "given", "out")

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.given: Any = self  # an x that nobody gives
        self.out: Any = None
        self.folded: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Any) -> Any:
        if self.given is not x:
            self.given, self.out = x, self.base(x)
        return self.out

    def dense(self) -> tuple[Tensor, Tensor | None]:
        self.folded = self.base.dense() if self.folded is None else self.folded
        return self.folded


class Given:
    """What a module has handed on already, as the ground of patches that change it; it has no weight to ask for."""

    __slots__ = ("own", "site")

    def __init__(self, site: Site, own: Tensor) -> None:
        self.site, self.own = site, own

    def __call__(self, x: Any) -> Tensor:
        return self.own


class Mean(Upon):
    """Σ wᵢ yᵢ of what ``parts`` give over one base; Σ wᵢ (Wᵢ, bᵢ) where a site is not linear in its tensors."""

    __slots__ = ("kind", "parts", "weights")

    def __init__(self, parts: Sequence[Base], weights: Sequence[float], kind: Kind) -> None:
        super().__init__(parts[0])
        self.parts, self.weights, self.kind = parts, weights, kind

    def __call__(self, x: Any) -> Any:
        if self.kind not in LINEAR and all(map(_folds, self.parts)):
            return self.apply(*self.dense(), x)
        outs: list[Any] = [part(x) for part in self.parts]
        if isinstance(outs[0], tuple):
            return (mean([out[0] for out in outs], self.weights), *outs[0][1:])
        return mean(outs, self.weights)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        weights, biases = zip(*(part.dense() for part in self.parts), strict=True)
        shown = next((bias for bias in biases if bias is not None), None)
        if shown is None:
            return mean(weights, self.weights), None
        return mean(weights, self.weights), mean([shown * 0 if b is None else b for b in biases], self.weights)


def mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ tᵢ, added up in float32 or wider, in the dtype of the tensors."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = sum(weight * tensor.to(wide) for weight, tensor in zip(weights, tensors, strict=True))
    found: Tensor = torch.as_tensor(total).to(tensors[0].dtype)
    return found


def _folds(base: Base) -> bool:
    """Whether everything down to what the parts share can be folded."""
    while isinstance(base, Over):
        if type(base.patch).fold is Patch.fold:
            return False
        base = base.base
    return all(map(_folds, base.parts)) if isinstance(base, Mean) else True
