"""Any change of weights as plain LoRA: exact where it is thin already, else the nearest of a rank, its error stated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter.host import Host, Outline
from tarsia.adapter.layout import layout
from tarsia.adapter.value import Adapter, Patched
from tarsia.core.attach import Part
from tarsia.core.errors import MergeError
from tarsia.core.method import find
from tarsia.core.principal import principal
from tarsia.core.site import Kind
from tarsia.merge.align import split
from tarsia.merge.delta import Delta, Grounds, delta_of
from tarsia.methods.lora import LoRAConfig

TRIED: Final = (4, 8, 16, 32, 64, 128, 256, 512)
"""Ranks whose errors are told where none was chosen."""

LARGE: Final = 1024
"""Smaller side of a matrix from which a sketch takes the place of all its singular values."""

_MORE, _TURNS = 8, 2  # columns of a sketch beside its rank, and turns of power iteration


@dataclass(frozen=True, eq=False)
class Thinned:
    """An adapter whose patches are all LoRA, and what that cost.

    ``errors`` are by site: Frobenius norm of what is off, as a share of the change's. ``error`` is the same of all
    changes together. ``ranks`` are by site. ``exact`` are sites whose tensors are those of before, to the bit;
    ``still`` those that the adapter patches and does not change: they are left out.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    error: float
    ranks: Mapping[str, int]
    exact: tuple[str, ...]
    still: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """U [out, k], S [k], V^T [k, in] of a change, and its Frobenius norm: k may be less than its rank."""

    left: Tensor
    values: Tensor
    right: Tensor
    norm: float

    def off(self, rank: int) -> float:
        """What is left of the change, as a share of its norm, where only ``rank`` singular values are kept."""
        kept = float(self.values[:rank].square().sum())
        beyond = float(self.values[rank:].square().sum())
        unseen = self.norm**2 - kept - beyond
        # what no value was computed for is known by difference alone, good to about 1e-8 of the norm
        rest = beyond + (unseen if unseen > 1e-12 * self.norm**2 else 0.0)
        return math.sqrt(rest) / self.norm if self.norm else 0.0

    def least(self, most: float) -> int:
        """The least rank that is not more than ``most`` off; k where none is."""
        low, high = 1, len(self.values)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.off(middle) <= most else (middle + 1, high)
        return low

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] that share each singular value's root."""
        root = self.values[:rank].sqrt()
        return root[:, None] * self.right[:rank], self.left[:, :rank] * root


def spectrum(delta: Delta, rank: int | None = None) -> Spectrum:
    """The singular values of a weight's change, in float64, at least the ``rank`` largest (None: all).

    Of factors [out, r] and [r, in] they are those of an [r, r] core, and nothing of [out, in] is made (QR of both
    sides). Of a whole change with a smaller side of ``LARGE`` or more, and a rank far below it, a randomised sketch is
    taken (arXiv:0909.4061, algorithm 4.4): near the best, and ``off`` is still what is really left.
    """
    if delta.factored:
        left, values, right = split(delta)
        return Spectrum(left, values, right, float(values.norm()))
    if delta.whole is None or delta.whole.ndim != 2:
        raise MergeError("This change is no matrix.", given="nothing" if delta.whole is None else delta.whole.shape)
    small = min(delta.whole.shape)
    if rank is not None and small >= LARGE and 4 * (rank + _MORE) < small:
        return Spectrum(*_sketch(delta.whole, rank), delta.norm)
    return Spectrum(*principal(delta.whole, small), delta.norm)


def _sketch(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(weight.shape[1], rank + _MORE, generator=generator, dtype=weight.dtype)
    basis = torch.linalg.qr(weight @ drawn)[0]
    for _ in range(_TURNS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ left, values, right


def thin(
    adapter: Adapter, base: Host | Outline | Grounds, *, rank: int | None = None, most: float | None = None
) -> Thinned:
    """The adapter as plain LoRA.

    A change that is thin already (lora, rslora, pissa, vera ...) stays as it is, at a rank of its own, unless that is
    beyond ``rank``. Any other becomes the nearest product of ``rank``, or of the least rank whose error is at most
    ``most``; with both, of the least within ``rank``. One site at a time is in memory.

    Raises MergeError, naming the sites, for what LoRA has no place for (biases, norms, tables, bottlenecks), where a
    rank must be chosen and none was, telling the errors at each, and where ``rank`` does not reach ``most``.
    """
    _check_choice(rank, most)
    grounds = base if isinstance(base, Grounds) else Grounds.of(base, adapter.fingerprint)
    check_places(adapter, grounds)
    work = _Work(grounds, rank, most)
    for path in sorted(adapter.patches, key=list(grounds.sites).index):
        work.take(path, adapter.patches[path])
    work.refuse()
    if not work.patches:
        raise MergeError("The adapter changes nothing.", given=f"{len(adapter.patches)} patches", do="train it first")
    held = layout(grounds.base.model, [(grounds.site(path), "lora") for path in work.patches])
    if held.obstacles:
        raise MergeError("PEFT has no place for this as LoRA.", given="; ".join(held.obstacles[:3]), do=_FOLD)
    made = replace(
        adapter,
        parts=(lora_part(work.patches),),
        patches=MappingProxyType(work.patches),
        layout=held,
        probe=adapter.probe if len(work.exact) == len(work.patches) == len(adapter.patches) else None,
    )
    whole = math.sqrt(sum(work.lost.values()) / sum(work.sizes.values()))
    ranks = {path: _rank(patched) for path, patched in work.patches.items()}
    return Thinned(made, MappingProxyType(work.errors), whole, ranks, tuple(work.exact), tuple(work.still))


def check_places(adapter: Adapter, grounds: Grounds) -> None:
    """Raise MergeError, naming the sites, for patches that are no change of a linear layer's weight."""
    without = [f"{path}: {one.method}" for path, one in adapter.patches.items() if not find(one.method).folds]
    if without:
        raise MergeError(
            "Some of what this adapter does is no change of a weight, so LoRA can not say it, and no fold either.",
            given=_few(without),
            do="keep it as the adapter that it is, or train lora at these places",
        )
    sites = [grounds.site(path) for path in adapter.patches]
    odd = [f"{site.path}: a {site.role} ({site.kind})" for site in sites if site.kind is not Kind.WEIGHT]
    if odd:
        raise _homeless(odd)


def _homeless(given: Sequence[str]) -> MergeError:
    return MergeError(
        "LoRA has no place for some of what this adapter changes.",
        given=_few(given),
        allowed="changes of the weights of linear layers",
        do=_FOLD,
    )


_FOLD: Final = "fold the adapter into the base, which loses nothing: tarsia fold"


def _check_choice(rank: int | None, most: float | None) -> None:
    if rank is not None and (isinstance(rank, bool) or rank < 1):
        raise MergeError("A rank is a whole number of at least 1.", given=rank)
    if most is not None and not 0 < most < 1:
        raise MergeError("The largest error is a share of the change's norm.", given=most, allowed="above 0, below 1")


class _Work:
    """The patches made so far, and why others can not be."""

    def __init__(self, grounds: Grounds, rank: int | None, most: float | None) -> None:
        self.grounds, self.limit, self.most = grounds, rank, most
        self.patches: dict[str, Patched] = {}
        self.errors: dict[str, float] = {}
        self.sizes: dict[str, float] = {}
        self.lost: dict[str, float] = {}
        self.exact: list[str] = []
        self.still: list[str] = []
        self.biased: list[str] = []
        self.unchosen: list[str] = []
        self.beyond: dict[str, tuple[int, float]] = {}

    def take(self, path: str, patched: Patched) -> None:
        """Make one site's patch, or note why not."""
        site = self.grounds.site(path)
        delta = delta_of(patched, self.grounds, path)
        if delta.bias is not None and bool(delta.bias.any()):
            self.biased.append(f"{path}: a bias")
        elif delta.still or delta.norm == 0:
            self.still.append(path)
        elif delta.rank is not None and delta.rank <= (self.limit or min(site.shape)):
            self._keep(path, patched, delta)
        else:
            self._nearest(path, delta)

    def _keep(self, path: str, patched: Patched, delta: Delta) -> None:
        """A change that is thin already: its very tensors where they are LoRA's, else the same product in float32."""
        if find(patched.method).thin:
            constants = {"scale": float(patched.constants["scale"]), "dropout": 0.0}
            self.patches[path] = Patched("lora", MappingProxyType(constants), MappingProxyType(dict(patched.factors)))
            self.exact.append(path)
            self._note(path, delta.norm, 0.0)
            return
        assert delta.up is not None
        assert delta.down is not None
        b, a = _balanced(delta.up, delta.down)
        self.patches[path] = _lora(a, b)
        self._note(path, delta.norm, rounding(delta.up, delta.down, b.float().double(), a.float().double()))

    def _nearest(self, path: str, delta: Delta) -> None:
        lossless = delta.factored and self.limit is None and self.most is None
        found = spectrum(delta, None if self.most is not None or lossless else self.limit)
        if lossless:  # a product wider than the matrix itself
            rank = len(found.values)
        elif self.limit is None and self.most is None:
            self.unchosen.append(f"{path}: {_told(found)}")
            return
        else:
            rank = len(found.values) if self.most is None else found.least(self.most)
            rank = min(rank, self.limit or rank)
        error = found.off(rank)
        if self.most is not None and error > self.most:
            self.beyond[path] = (rank, error)
            return
        self.patches[path] = _lora(*found.factors(rank))
        self._note(path, found.norm, error)

    def _note(self, path: str, norm: float, error: float) -> None:
        self.errors[path], self.sizes[path], self.lost[path] = error, norm**2, (error * norm) ** 2

    def refuse(self) -> None:
        """Raise MergeError for what could not be made."""
        if self.biased:
            raise _homeless(self.biased)
        if self.unchosen:
            raise MergeError(
                "Some of what this adapter changes is not thin: a rank must be chosen, or an error.",
                given=_few(self.unchosen),
                do=f"give a rank (--rank) or the largest error (--max-error); or {_FOLD}",
            )
        if self.beyond:
            raise MergeError(
                f"At this rank the error is larger than {self.most:g}.",
                given=_few([f"{path}: {error:.3g} at rank {rank}" for path, (rank, error) in self.beyond.items()]),
                do=f"give a higher rank, or allow a larger error; or {_FOLD}",
            )


def rounding(up: Tensor, down: Tensor, b: Tensor, a: Tensor) -> float:
    """|up down - b a| as a share of |up down|, Frobenius, without making either, for factors that hardly differ."""
    left, right = torch.cat([up - b, b], 1), torch.cat([down, down - a])
    off = ((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt()
    return float(off) / Delta(up, down).norm


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with each pair of column and row of one length, so that neither is lost in fewer bits."""
    share = (down.norm(dim=1) / up.norm(dim=0)).sqrt()
    share = torch.where(share.isfinite() & (share > 0), share, torch.ones_like(share))
    return up * share, down / share[:, None]


def _lora(a: Tensor, b: Tensor) -> Patched:
    tensors = {"A": a.float().contiguous(), "B": b.float().contiguous()}
    return Patched("lora", MappingProxyType({"scale": 1.0, "dropout": 0.0}), MappingProxyType(tensors))


def _rank(patched: Patched) -> int:
    return int(patched.tensors["A"].shape[0])


def lora_part(patches: Mapping[str, Patched]) -> Part:
    """One part that says of every site its rank and alpha: of most at once, of the others by name."""
    ranks = {path: _rank(patched) for path, patched in patches.items()}
    alphas = {path: float(patched.constants["scale"]) * ranks[path] for path, patched in patches.items()}
    rank, alpha = (_commonest(list(table.values())) for table in (ranks, alphas))
    config = LoRAConfig(
        rank=rank,
        alpha=alpha,
        ranks={path: value for path, value in ranks.items() if value != rank},
        alphas={path: value for path, value in alphas.items() if value != alpha},
    )
    return Part("lora", "; ".join(f"@{path}" for path in patches), config)


def _commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _told(found: Spectrum) -> str:
    """The errors at the ranks that may be chosen."""
    ranks = [rank for rank in TRIED if rank < len(found.values)]
    return ", ".join(f"rank {rank} {found.off(rank):.2g} off" for rank in ranks) or f"rank {len(found.values)} is exact"


def _few(lines: Sequence[str], most: int = 6) -> str:
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")
