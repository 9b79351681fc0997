"""Low-rank adaptation that starts from what quantising took from a weight."""

from __future__ import annotations

from typing import Self

import torch

from tarsia.core.method import method
from tarsia.core.patch import Base
from tarsia.core.site import Role, Site
from tarsia.methods.lora import LoRA, LoRAConfig
from tarsia.methods.pissa import start


@method(
    "loftq",
    config=LoRAConfig,
    source="arXiv:2310.08659, algorithm 1 with T = 1",
    roles=frozenset(Role) - {Role.HEAD, Role.EMBED, Role.ROUTER},
    folds=True,
    identity=False,
)
class LoftQ(LoRA):
    """W' = Q + scale * B A, where scale * B A starts as the nearest of that rank to W - Q, the quantisation's error.

    W is the site's weight in the 16-bit files, Q what its 4 bits stand for: a new patch is no identity, it brings the
    model nearer to the 16-bit one. After that it is LoRA over Q, and means nothing over W.

    The paper goes on to quantise W - scale * B A and to correct anew, T times. Each further turn changes Q, the bytes
    of the base, which other adapters stand on: so there is the first turn alone.
    """

    corrects = True

    @classmethod
    def create(cls, site: Site, config: LoRAConfig, base: Base, generator: torch.Generator) -> Self:
        rank, scale = config.scale(site)
        packed = base.dense()[0].double()
        lost = base.origin().to(packed) - packed
        return cls(*start(lost, rank, scale, generator), scale, config.dropout)
