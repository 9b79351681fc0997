"""Learnt scales of keys, values and what is inside an MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from tarsia.core.errors import AttachError
from tarsia.core.method import method
from tarsia.core.patch import Base, Patch
from tarsia.core.site import Role, Site


@dataclass(frozen=True, slots=True)
class IA3Config:
    """Nothing to choose: one number for each key, value and inner activation."""


@method(
    "ia3",
    config=IA3Config,
    source="arXiv:2205.05638, section 3.3",
    roles={Role.K, Role.V, Role.QKV, Role.DOWN},
    folds=True,
    identity=True,
)
class IA3(Patch):
    """The scales l, all ones at first: of what a layer gives, W' = diag(l) W and b' = l b, or of its input, W diag(l).

    An MLP's activations are scaled where its last layer, ``down``, takes them in; keys and values where they come out,
    as is any other layer that is named. Of one layer for queries, keys and values all three are scaled.
    """

    constants = ("inner",)

    def __init__(self, scales: Tensor, inner: bool) -> None:
        super().__init__()
        self.scales, self.inner = nn.Parameter(scales), inner

    @classmethod
    def create(cls, site: Site, config: IA3Config, base: Base, generator: torch.Generator) -> Self:
        inner = site.role is Role.DOWN
        return cls(torch.ones(site.shape[inner]), inner)

    @classmethod
    def restore(cls, site: Site, shapes: Mapping[str, tuple[int, ...]], constants: Mapping[str, Any]) -> Self:
        if constants["inner"] != (site.role is Role.DOWN):
            raise AttachError(f"The scales at {site.path} act elsewhere here.", given=f"inner {constants['inner']!r}")
        wanted = (site.shape[bool(constants["inner"])],)
        if shapes["scales"] != wanted:
            raise AttachError(f"The scales do not fit {site.path}.", given=shapes["scales"], allowed=wanted)
        return cls(torch.empty(shapes["scales"]), **constants)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(weight.dtype, self.scales.dtype)
        scales = self.scales.to(wide)
        if self.inner:
            return (weight.to(wide) * scales).to(weight.dtype), bias
        scaled = (weight.to(wide) * scales[:, None]).to(weight.dtype)
        return scaled, None if bias is None else (bias.to(wide) * scales).to(bias.dtype)

    def scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """l, of the input or of what is given."""
        return (self.scales, None) if self.inner else (None, self.scales)

    @staticmethod
    def joined(
        patches: Sequence[tuple[Mapping[str, Any], Mapping[str, Tensor]]], weights: Sequence[float]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """1 + the weighted sum of l - 1: W' - W is linear in l - 1, and so is b' - b."""
        moved = [tensors["scales"].double() - 1 for _, tensors in patches]
        change = sum(weight * scales for weight, scales in zip(weights, moved, strict=True))
        return dict(patches[0][0]), {"scales": 1 + torch.as_tensor(change)}

    def forward(self, x: Tensor, base: Base) -> Tensor:
        scales = self.scales.to(x.dtype)
        return base(x * scales) if self.inner else base(x) * scales

    @staticmethod
    def batched(patches: Sequence[tuple[IA3, Tensor]], x: Tensor, base: Base) -> Tensor:
        y = base(_scaled(x, [(patch, rows) for patch, rows in patches if patch.inner]))
        return _scaled(y, [(patch, rows) for patch, rows in patches if not patch.inner])


def _scaled(x: Tensor, patches: Sequence[tuple[IA3, Tensor]]) -> Tensor:
    for patch, rows in patches:
        x = x.index_copy(0, rows, x[rows] * patch.scales.to(x.dtype))
    return x
