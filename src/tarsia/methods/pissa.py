"""Low-rank adaptation that starts from a weight's own principal part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from tarsia.core.method import method
from tarsia.core.patch import Base
from tarsia.core.principal import principal
from tarsia.core.site import Role, Site
from tarsia.methods.lora import LoRA, LoRAConfig, drawn


@method(
    "pissa",
    config=LoRAConfig,
    source="arXiv:2404.02948, eq. 2-4",
    roles=frozenset(Role) - {Role.HEAD, Role.EMBED, Role.ROUTER},
    folds=True,
    identity=True,
)
class PiSSA(LoRA):
    """W' = W + scale * (B A - B0 A0), where scale * B0 A0 is the best approximation of W of that rank.

    A and B start at A0 = sqrt(S) V^T and B0 = U sqrt(S), over the root of the scale, so both have a gradient from
    the first step on, along the directions in which W is largest. The paper puts W - scale * B0 A0 in the place of
    W; here the base keeps its bytes and the change is made as (B - B0) A + B0 (A - A0): exactly nothing at
    step 0, and without two large products that nearly cancel. Over a quantised base W is what its bytes stand
    for, so its error stays; the paper's QPiSSA quantises another matrix, which would be another base.

    The paper has alpha = rank, no dropout, and the rates of full fine-tuning. Dropout acts on the input of the whole
    change.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(a, b, scale, dropout)
        self.register_buffer("A0", a.clone())
        self.register_buffer("B0", b.clone())

    @classmethod
    def create(cls, site: Site, config: LoRAConfig, base: Base, generator: torch.Generator) -> Self:
        rank, scale = config.scale(site)
        return cls(*start(base.dense()[0], rank, scale, generator), scale, config.dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], 1)

    @staticmethod
    def to_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA of twice the rank, [A; A0] and [B, -B0], as PEFT converts it."""
        return {"A": torch.cat([tensors["A"], tensors["A0"]]), "B": torch.cat([tensors["B"], -tensors["B0"]], 1)}

    @staticmethod
    def from_lora(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The halves of both."""
        (a, a0), (b, b0) = factors["A"].chunk(2), factors["B"].chunk(2, 1)
        return {name: t.contiguous() for name, t in {"A": a, "B": b, "A0": a0, "B0": -b0}.items()}


def start(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], float32, with scale * B A the nearest to ``weight`` of that rank.

    Both share a singular value's root. Where the weight has fewer than ``rank`` singular values, the rest starts as
    LoRA's does: A drawn, B zero.
    """
    out, into = weight.shape
    a, b = drawn(rank, into, generator), torch.zeros(out, rank)
    left, values, right = principal(weight, rank)
    root = (values / abs(scale)).sqrt()
    a[: len(values)] = root[:, None] * right
    b[:, : len(values)] = left * root * math.copysign(1, scale)
    return a, b
