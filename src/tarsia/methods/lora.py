"""Low-rank adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.errors import AttachError, ConfigError
from tarsia.core.linear import low_rank
from tarsia.core.method import method
from tarsia.core.patch import Base, Patch
from tarsia.core.site import Role, Site

TILE = 1 << 17
"""Numbers of a weight that are folded at once: in float32 what a processor's second cache holds."""


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """``rank`` and ``alpha`` of the update, whose scale is alpha / rank.

    ``ranks`` and ``alphas`` give other values by glob over site paths. ``dropout`` is applied to the patch's input.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.ranks.values()):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError("A rank must be a whole number of at least 1.", given=repr(rank))
        for alpha in (self.alpha, *self.alphas.values()):
            if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
                raise ConfigError("An alpha must be a number, and not 0.", given=repr(alpha))
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ConfigError("Dropout must be at least 0 and below 1.", given=repr(self.dropout))

    def check(self, sites: Sequence[Site]) -> None:
        """Raise ConfigError where a glob of ``ranks`` or ``alphas`` matches none of the ``sites``."""
        paths = [site.path for site in sites]
        for table in (self.ranks, self.alphas):
            for glob in table:
                if not any(fnmatchcase(path, glob) for path in paths):
                    near = get_close_matches(glob, paths, 3, 0.0)
                    raise ConfigError(
                        "A rank or alpha is set for sites that are not selected.",
                        given=glob,
                        do=f"the nearest are {', '.join(near)}",
                    )

    def scale(self, site: Site) -> tuple[int, float]:
        """Rank and effective scale at ``site``."""
        rank, alpha = self.at(site)
        return rank, alpha / rank

    def at(self, site: Site) -> tuple[int, float]:
        """Rank and alpha at ``site``; the last glob that matches wins."""
        return _last(self.ranks, site.path, self.rank), _last(self.alphas, site.path, self.alpha)


def drawn(rank: int, into: int, generator: torch.Generator) -> Tensor:
    """A as LoRA starts it, [rank, into]: uniform within 1 / sqrt(into)."""
    bound = 1 / math.sqrt(into)
    return torch.empty(rank, into).uniform_(-bound, bound, generator=generator)


def empty(site: Site, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """A and B without numbers. Raises AttachError where they do not fit ``site``."""
    (out, into), a, b = site.shape, shapes["A"], shapes["B"]
    if len(a) != 2 or a[1] != into or b != (out, a[0]):
        raise AttachError(
            f"The low-rank factors do not fit {site.path}.",
            given=f"A {a}, B {b}" + ("; A and B are swapped" if a[:1] + b[1:] == (out, into) else ""),
            allowed=f"A (rank, {into}), B ({out}, rank)",
        )
    return torch.empty(a), torch.empty(b)


def check_dropout(site: Site, constants: Mapping[str, Any]) -> None:
    """Raise AttachError where a saved patch has a dropout that none can have."""
    dropout = constants.get("dropout", 0.0)
    if not 0 <= dropout < 1:
        raise AttachError(f"The dropout at {site.path} is none.", given=repr(dropout), allowed="at least 0, below 1")


def _last(table: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((v for glob, v in reversed(list(table.items())) if fnmatchcase(path, glob)), default)


@method(
    "lora",
    config=LoRAConfig,
    source="arXiv:2106.09685, eq. 3",
    roles=frozenset(Role) - {Role.HEAD, Role.EMBED, Role.ROUTER},
    folds=True,
    identity=True,
)
class LoRA(Patch):
    """W' = W + scale * B A with A [rank, in] uniform (Kaiming, a = sqrt 5) and B [out, rank] zero."""

    constants: tuple[str, ...] = ("scale", "dropout")

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout

    @classmethod
    def create(cls, site: Site, config: LoRAConfig, base: Base, generator: torch.Generator) -> Self:
        rank, scale = config.scale(site)
        out, into = site.shape
        return cls(drawn(rank, into, generator), torch.zeros(out, rank), scale, config.dropout)

    @classmethod
    def restore(cls, site: Site, shapes: Mapping[str, tuple[int, ...]], constants: Mapping[str, Any]) -> Self:
        check_dropout(site, constants)
        return cls(*empty(site, shapes), **constants)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of the change scale * B A, in the masters' dtype."""
        return self.A, self.B

    def delta(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """scale * B and A: what is added to any weight."""
        a, b = self.factors()
        return self.scale * b, a, None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled() or weight.device.type != "cpu":
            a, b, wide = self._wide(weight)
            return torch.addmm(weight.to(wide), b, a, alpha=self.scale).to(weight.dtype), bias
        return self.fold_into(weight, torch.empty_like(weight)), bias

    @torch.no_grad()
    def fold_into(self, weight: Tensor, out: Tensor) -> Tensor:
        """Write the folded ``weight`` [out, in] to ``out``, of its dtype, which may be ``weight`` itself; returns it.

        A tile of rows at a time, small enough to stay in the processor's cache: each is read and written once.
        """
        a, b, wide = self._wide(weight)
        rows = max(1, TILE // max(1, weight.shape[1]))
        tile = None if weight.dtype == wide else weight.new_empty(min(rows, len(weight)), weight.shape[1], dtype=wide)
        for first in range(0, len(weight), rows):
            given, update = weight[first : first + rows], b[first : first + rows]
            if tile is None:
                torch.addmm(given, update, a, alpha=self.scale, out=out[first : first + rows])
            else:
                part = tile[: len(given)].copy_(given).addmm_(update, a, alpha=self.scale)
                out[first : first + rows].copy_(part)
        return out

    def _wide(self, weight: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
        """Both factors in the wider dtype of theirs and the weight's: half precision must not round the base."""
        a, b = self.factors()
        wide = torch.promote_types(weight.dtype, b.dtype)
        return a.to(wide), b.to(wide), wide

    def update(self, x: Tensor) -> Tensor:
        """scale * B A x for x [..., in], in the dtype of x."""
        a, b = self.factors()
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, a.to(x.dtype)), self.scale * b.to(x.dtype))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        frozen = None if self.dropout and self.training else base.linear(x)
        if frozen is None:
            return base(x) + self.update(x)
        return low_rank(x, *frozen, *self.factors(), self.scale)

    @staticmethod
    def to_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A and B themselves."""
        return dict(tensors)

    @staticmethod
    def from_lora(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A and B themselves."""
        return dict(factors)

    @staticmethod
    def batched(patches: Sequence[tuple[LoRA, Tensor]], x: Tensor, base: Base) -> Tensor:
        y = base(x)
        for patch, rows in patches:
            y = y.index_add(0, rows, patch.update(x[rows]))
        return y
