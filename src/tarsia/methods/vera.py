"""Adaptation by two vectors between random matrices that all layers share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.errors import AttachError, ConfigError
from tarsia.core.method import method
from tarsia.core.patch import Base, Patch
from tarsia.core.site import Role, Site


@dataclass(frozen=True, slots=True)
class VeRAConfig:
    """``rank`` of the random matrices, and what each of the inner scales d starts at."""

    rank: int = 256
    initial: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError("A rank must be a whole number of at least 1.", given=repr(self.rank))
        if not isinstance(self.initial, int | float) or not math.isfinite(self.initial) or self.initial == 0:
            raise ConfigError("The inner scales must start at a number, and not 0.", given=repr(self.initial))


class Projection:
    """A frozen matrix that follows from a seed: one tensor for all who ask for it, on one device; never saved."""

    __slots__ = ("__weakref__", "digest", "tensor")

    _held: ClassVar[WeakValueDictionary[tuple[object, ...], Projection]] = WeakValueDictionary()

    def __init__(self, tensor: Tensor, digest: str) -> None:
        self.tensor, self.digest = tensor, digest

    def __deepcopy__(self, memo: object) -> Self:
        return self  # nobody writes to it

    @classmethod
    def of(cls, seed: int, side: str, rows: int, columns: int) -> Projection:
        """Kaiming uniform for a layer of ``columns`` inputs, float32 [rows, columns] on the CPU."""
        key = (seed, side, rows, columns, torch.device("cpu"))
        found = cls._held.get(key)
        if found is None:
            number = hashlib.sha256(repr(key[:4]).encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(number, "little", signed=True))
            bound = math.sqrt(6 / columns)
            with torch.inference_mode(False):
                tensor = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
            found = cls._held[key] = cls(tensor, hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
        return found

    def on(self, device: torch.device) -> Projection:
        """The same matrix there, once for all."""
        if self.tensor.device == device:
            return self
        key = (self.digest, device)
        found = self._held.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = self._held[key] = Projection(self.tensor.to(device), self.digest)
        return found


@method(
    "vera",
    config=VeRAConfig,
    source="arXiv:2310.11454, eq. 2",
    roles=frozenset(Role) - {Role.HEAD, Role.EMBED, Role.ROUTER},
    folds=True,
    identity=True,
)
class VeRA(Patch):
    """W' = W + diag(b) B diag(d) A with d [rank] and b [out] trained, b zero at first.

    A [rank, in] and B [out, rank] are random and frozen, one pair for all sites of a shape (their A for all of one
    input, their B for all of one output). They follow from the seed that the adapter was attached with and are made
    again from it, never saved: ``digest`` says what they were.
    """

    constants = ("seed", "digest")

    def __init__(self, inner: Tensor, outer: Tensor, a: Projection, b: Projection, seed: int) -> None:
        super().__init__()
        self.d, self.b = nn.Parameter(inner), nn.Parameter(outer)
        self.down, self.up = a, b
        self.seed, self.digest = seed, _digest(a, b)

    @classmethod
    def create(cls, site: Site, config: VeRAConfig, base: Base, generator: torch.Generator) -> Self:
        seed, (out, into) = generator.initial_seed(), site.shape
        a, b = Projection.of(seed, "A", config.rank, into), Projection.of(seed, "B", out, config.rank)
        return cls(torch.full((config.rank,), float(config.initial)), torch.zeros(out), a, b, seed)

    @classmethod
    def restore(cls, site: Site, shapes: Mapping[str, tuple[int, ...]], constants: Mapping[str, Any]) -> Self:
        (out, into), d, b = site.shape, shapes["d"], shapes["b"]
        if len(d) != 1 or not d[0] or b != (out,):
            raise AttachError(f"The scales do not fit {site.path}.", given=f"d {d}, b {b}", allowed=f"b ({out},)")
        seed = constants["seed"]
        made = Projection.of(seed, "A", d[0], into), Projection.of(seed, "B", out, d[0])
        if _digest(*made) != constants["digest"]:
            raise AttachError(
                f"The random matrices of {site.path} are not those that it was trained with.",
                given=f"digest {_digest(*made)} for seed {seed}, torch {torch.__version__}",
                allowed=f"digest {constants['digest']}",
                do="load it with the version of torch that it was trained with, and merge it there",
            )
        return cls(torch.empty(d), torch.empty(b), *made, seed)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.down, self.up = self.down.on(self.d.device), self.up.on(self.d.device)
        return self

    def delta(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """diag(b) B and diag(d) A: what is added to any weight."""
        return self.b[:, None] * self.up.tensor.to(self.b), self.d[:, None] * self.down.tensor.to(self.d), None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(weight.dtype, self.b.dtype)
        a, b = (held.tensor.to(self.d.device, wide) for held in (self.down, self.up))
        change = self.b.to(wide)[:, None] * (b @ (self.d.to(wide)[:, None] * a))
        return (weight.to(wide) + change).to(weight.dtype), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """diag(b) B diag(d) A x for x [..., in], in the dtype of x."""
        inner = F.linear(x, self.down.tensor.to(x)) * self.d.to(x.dtype)
        return F.linear(inner, self.up.tensor.to(x)) * self.b.to(x.dtype)

    @staticmethod
    def batched(patches: Any, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        for patch, rows in patches:
            y = y.index_add(0, rows, patch.update(x[rows]))
        return y


def _digest(a: Projection, b: Projection) -> int:
    """48 bits of both, a number that JSON keeps."""
    return int(hashlib.sha256(f"{a.digest} {b.digest}".encode()).hexdigest()[:12], 16)
