"""Fine-tuning of biases alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from tarsia.core.errors import AttachError
from tarsia.core.method import method
from tarsia.core.patch import Base, Patch
from tarsia.core.site import PARAMETERS, Kind, Site


@dataclass(frozen=True, slots=True)
class BitFitConfig:
    """Nothing to choose: every number of the bias is trained."""


@method(
    "bitfit",
    config=BitFitConfig,
    source="arXiv:2106.10199, section 3",
    kinds=PARAMETERS - {Kind.EMBEDDING},
    folds=True,
    identity=True,
)
class BitFit(Patch):
    """b' = b + d with d zero at first; W stays. Biases of norms too, as in the paper.

    A site that has no bias is left out. Nothing is unpacked where W is in 4 bits: d is added to what the layer gives.
    """

    constants = ("added",)

    def __init__(self, change: Tensor, added: bool) -> None:
        super().__init__()
        self.change, self.added = nn.Parameter(change), added

    @classmethod
    def lacks(cls, site: Site) -> str | None:
        return "a bias" if site.bias is None else None

    @classmethod
    def create(cls, site: Site, config: BitFitConfig, base: Base, generator: torch.Generator) -> Self:
        # where the module is no linear layer, what it does with its bias is its own affair
        added = site.kind is Kind.WEIGHT
        shape = site.shape[:1] if added else _shape(site, base)
        return cls(torch.zeros(shape), added)

    @classmethod
    def restore(cls, site: Site, shapes: Mapping[str, tuple[int, ...]], constants: Mapping[str, Any]) -> Self:
        if constants["added"] != (site.kind is Kind.WEIGHT):
            raise AttachError(f"The bias at {site.path} acts otherwise here.", given=f"added {constants['added']!r}")
        if constants["added"] and shapes["change"] != site.shape[:1]:
            raise AttachError(f"The bias does not fit {site.path}.", given=shapes["change"], allowed=site.shape[:1])
        return cls(torch.empty(shapes["change"]), **constants)

    def delta(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """d alone: what is added to any bias."""
        return None, None, self.change

    @staticmethod
    def joined(
        patches: Sequence[tuple[Mapping[str, Any], Mapping[str, Tensor]]], weights: Sequence[float]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The weighted sum of the changes."""
        change = sum(weight * tensors["change"].double() for weight, (_, tensors) in zip(weights, patches, strict=True))
        return dict(patches[0][0]), {"change": torch.as_tensor(change)}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if bias is None:
            return weight, None
        wide = torch.promote_types(bias.dtype, self.change.dtype)
        return weight, (bias.to(wide) + self.change.to(wide).view_as(bias)).to(bias.dtype)

    def forward(self, x: Any, base: Base) -> Any:
        return base(x) + self.change.to(x.dtype) if self.added else super().forward(x, base)


def _shape(site: Site, base: Base) -> torch.Size:
    bias = base.dense()[1]
    if bias is None:
        raise AttachError(f"{site.path} has no bias here.", do="take the sites from the model's own anatomy")
    return bias.shape
