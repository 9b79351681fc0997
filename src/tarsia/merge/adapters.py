"""Several adapters made one adapter, exactly or not at all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import Tensor

from tarsia.adapter.host import Host, Outline
from tarsia.adapter.layout import layout
from tarsia.adapter.resolution import one_resolution
from tarsia.adapter.value import Adapter, Patched
from tarsia.core.attach import Part
from tarsia.core.errors import MergeError
from tarsia.core.method import find as method_of
from tarsia.core.site import Component, Kind, Site
from tarsia.merge.belonging import common
from tarsia.merge.delta import Delta, Grounds, delta_of
from tarsia.merge.inputs import Seen, Watched
from tarsia.merge.thin import lora_part, spectrum
from tarsia.merge.ways import Way, combined, find

MATRICES = frozenset({Kind.WEIGHT, Kind.EXPERT})
"""Kinds of site whose weight is a linear layer's, or one for each expert."""

AS_TRAINED: Final = "as trained"
"""The resolution of a merge's parents, whatever it is."""


@dataclass(frozen=True, eq=False)
class Merged:
    """What came of a merge. ``errors``: by site, how far re-factoring is from the whole result (relative, Frobenius).

    An error is 0 where nothing was re-factored. ``card`` is the adapter's own.
    """

    adapter: Adapter
    errors: Mapping[str, float]

    @property
    def card(self) -> Mapping[str, Any]:
        return self.adapter.card


@dataclass(frozen=True, eq=False)
class _Asked:
    """A merge, checked."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    way: Way
    grounds: Grounds
    scale: float
    components: Mapping[Component, float]
    rank: int | None
    resolution: tuple[int | None, ...]

    @cached_property
    def watched(self) -> tuple[Watched, ...]:
        """The adapters over their probes. Raises MergeError where the base is not open."""
        base = self.grounds.base
        if not isinstance(base, Host):
            raise MergeError(
                f"{self.way.name} looks at what layers are given, and an outline runs nothing.",
                given=base.name,
                do="give the base itself, opened",
            )
        return tuple(Watched(adapter, base) for adapter in self.adapters)

    def factor(self, site: Site) -> float:
        """What the result at a site is multiplied with."""
        return self.scale * self.components.get(site.component, 1.0)


def merge(  # noqa: PLR0913 (the choices of one sum)
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    way: Way | str,
    base: Host | Outline,
    *,
    scale: float = 1.0,
    components: Mapping[str, float] | None = None,
    rank: int | None = None,
    resolution: int | Literal["as trained"] | None = AS_TRAINED,
    **options: Any,
) -> Merged:
    """Make one adapter of several, of any ranks and methods, by a way of ``WAYS`` (with ``options`` of its own).

    ``weights`` are one number an adapter; one of weight 0 takes no part. ``scale`` multiplies the result everywhere,
    ``components`` by component ({"vision": 0.5}). A site that an adapter has not counts as no change. The result at a
    site is a ``lora`` of scale 1 where the change is a product of factors (of any rank where ``rank`` is None, else
    of ``rank`` by SVD, with the error told), a ``bitfit`` where it is of the bias alone, else ``full`` (W + change).
    Where a way is a weighted sum, patches that one adapter alone has, at a coefficient of 1, stay what they are, and
    such as can be (bottlenecks, IA3, BitFit) are joined exactly as one of their kind.

    The result's card says how large it is to see pictures: as its parents were trained to, or, where these were at
    different resolutions, as ``resolution`` says (None: as they are).

    One adapter at weight 1, scale 1 and no other coefficient is that adapter itself, whatever the way.

    ``base`` is the base, opened, or its outline; weights are read only where a method's change depends on them.
    Raises MergeError for what has no meaning, naming the site and the method, BaseMismatch where fingerprints differ,
    and ConfigError where resolutions do and none is chosen.
    """
    chosen = (find(way) if isinstance(way, str) else way).taking(options)
    asked = _asked(adapters, weights, chosen, base, (scale, components or {}, rank, resolution))
    if len(asked.adapters) == 1 and rank is None and asked.weights[0] * scale == 1 and not asked.components:
        return Merged(asked.adapters[0], MappingProxyType(dict.fromkeys(asked.adapters[0].patches, 0.0)))
    patches: dict[str, Patched] = {}
    errors: dict[str, float] = {}
    for path in _paths(asked):
        made, error = _site(asked, path)
        errors[path] = error
        if made is not None:
            patches[path] = made
    if not patches:
        raise MergeError(
            "Nothing is left of these adapters: their changes cancel everywhere.",
            given=", ".join(map(str, weights)),
            do="choose other weights",
        )
    return Merged(_adapter(asked, patches, errors), MappingProxyType(errors))


@dataclass(frozen=True, slots=True)
class Swelling:
    """What becomes of factors where a way keeps none: whole weights at ``sites``, of ``size`` bytes in float32.

    ``before`` are the bytes that the parents hold there, ``rank`` is the most that their factors have side by side.
    """

    sites: int
    size: int
    before: int
    rank: int


def swelling(adapters: Sequence[Adapter], way: Way, base: Host | Outline) -> Swelling | None:
    """What a merge of ``adapters`` (all that take part) makes whole, at most, where it is given no rank; None: nothing.

    Only what ``merge`` makes larger is told: sites where parents hold factors, and none a whole weight already.
    """
    found = []
    for site in base.sites if len(adapters) > 1 and not way.thin else ():
        here = [one.patches[site.path] for one in adapters if site.path in one.patches]
        kept = way.factored(all(hasattr(method_of(one.method).patch, "delta") for one in here))
        ranks = [len(one.tensors["A"]) for one in here if "A" in one.tensors]
        if site.kind is Kind.WEIGHT and ranks and not kept and all(one.method != "full" for one in here):
            before = sum(tensor.nbytes for one in here for tensor in one.tensors.values())
            found.append(Swelling(1, 4 * math.prod(site.shape), before, sum(ranks)))
    if not found:
        return None
    size, before = sum(one.size for one in found), sum(one.before for one in found)
    return Swelling(len(found), size, before, max(one.rank for one in found))


def _asked(
    adapters: Sequence[Adapter], weights: Sequence[float], way: Way, base: Host | Outline, rest: tuple[Any, ...]
) -> _Asked:
    """Raises MergeError and BaseMismatch for what can not be merged at all."""
    scale, components, rank, resolution = rest
    if not adapters or len(adapters) != len(weights):
        raise MergeError(
            "A merge takes adapters, and one weight for each.",
            given=f"{len(adapters)} adapters, {len(weights)} weights",
            do="give as many weights as adapters",
        )
    for name, value in [("weight", w) for w in weights] + [("scale", scale)] + list(components.items()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MergeError(f"{name} must be a finite number.", given=repr(value))
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise MergeError("A rank must be a whole number of at least 1.", given=repr(rank))
    if resolution not in (AS_TRAINED, None) and not (type(resolution) is int and resolution > 0):
        raise MergeError("A resolution is a whole number above 0, or None.", given=repr(resolution))
    unknown = [name for name in components if name not in set(Component)]
    if unknown:
        raise MergeError("There is no such component.", given=", ".join(unknown), allowed=", ".join(Component))
    if scale == 0 or not any(weights):
        raise MergeError(
            "Nothing would be left.",
            given=f"weights {list(weights)}, scale {scale}",
            do="choose a scale and a weight that are not 0",
        )
    taking = [(adapter, float(weight)) for adapter, weight in zip(adapters, weights, strict=True) if weight != 0]
    fingerprint = common({f"adapter {number}": adapter for number, (adapter, _) in enumerate(taking, 1)}, base)
    return _Asked(
        adapters=tuple(adapter for adapter, _ in taking),
        weights=tuple(weight for _, weight in taking),
        way=way,
        grounds=Grounds.of(base, fingerprint),
        scale=float(scale),
        components={Component(name): float(value) for name, value in components.items() if value != 1},
        rank=rank,
        resolution=_resolution(adapters, weights) if resolution == AS_TRAINED else (resolution,),
    )


def _resolution(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[int | None, ...]:
    """That of all that take part. Raises ConfigError where they differ."""
    pairs = enumerate(zip(adapters, weights, strict=True), 1)
    taking = {f"adapter {number}": one for number, (one, weight) in pairs if weight != 0}
    return one_resolution(taking, "choose one for the result on purpose: resolution=336, say, or None")


def _paths(asked: _Asked) -> list[str]:
    """Every site that an adapter has, in the base's order. Raises MergeError for one that the base has not."""
    held = {path for adapter in asked.adapters for path in adapter.patches}
    for path in sorted(held):
        asked.grounds.site(path)
    return [path for path in asked.grounds.sites if path in held]


def _site(asked: _Asked, path: str) -> tuple[Patched | None, float]:
    """The patch at one site (None: no change), and its error of re-factoring."""
    site = asked.grounds.site(path)
    factor = asked.factor(site)
    if factor == 0:
        return None, 0.0
    held = [adapter.patches.get(path) for adapter in asked.adapters]
    if asked.way.linear:
        shares = [factor * share for share in asked.way.shares(asked.weights)]
        whole = _as_it_is(held, shares, asked.rank) or _joined(held, shares, path, asked.rank)
        if whole is not None:
            return whole, 0.0
    if any(one is not None and not method_of(one.method).folds for one in held):
        _refuse_unfolding(held, asked.way, path)
    _check_corrections(asked, held, factor, path)
    found = [Delta() if one is None else delta_of(one, asked.grounds, path) for one in held]
    if asked.way.combining.sees and site.kind is Kind.WEIGHT:
        # one that leaves this layer as it is has inputs too, which the others must leave alone
        found = [replace(delta, inputs=Seen(w, path)) for delta, w in zip(found, asked.watched, strict=True)]
    made = combined(asked.way, found, asked.weights, path, matrix=site.kind in MATRICES).scaled(factor)
    rank = asked.rank
    if rank is None and asked.way.thin:
        rank = max((delta.rank or 0 for delta in found), default=0) or None
    return _patched(made, site, asked.grounds, rank)


def _as_it_is(held: Sequence[Patched | None], shares: Sequence[float], rank: int | None) -> Patched | None:
    """The one patch at a site whose coefficient is 1: a sum with nothing else."""
    alone = [(one, share) for one, share in zip(held, shares, strict=True) if one is not None]
    if len(alone) == 1 and alone[0][1] == 1 and (rank is None or not method_of(alone[0][0].method).folds):
        return alone[0][0]
    return None


def _joined(held: Sequence[Patched | None], shares: Sequence[float], path: str, rank: int | None) -> Patched | None:
    """One patch of the same method whose change is the weighted sum; None where the method has no such."""
    taking = [(one, share) for one, share in zip(held, shares, strict=True) if one is not None]
    methods = {one.method for one, _ in taking}
    if len(methods) > 1:
        return None
    method = method_of(methods.pop())
    if not hasattr(method.patch, "joined") or (rank is not None and method.folds):
        return None
    patch: Any = method.patch
    try:
        constants, tensors = patch.joined([(o.constants, o.tensors) for o, _ in taking], [share for _, share in taking])
    except MergeError as error:
        raise MergeError(f"{path}: {error.what}", given=error.given, allowed=error.allowed, do=error.do) from None
    kept = {
        name: _stored(tensor, [o.tensors[name] for o, _ in taking if name in o.tensors])
        for name, tensor in tensors.items()
    }
    return Patched(method.name, MappingProxyType(constants), MappingProxyType(kept))


def _refuse_unfolding(held: Sequence[Patched | None], way: Way, path: str) -> None:
    methods = sorted({one.method for one in held if one is not None})
    joins = all(hasattr(method_of(name).patch, "joined") for name in methods)
    sums = not way.linear or way.combine == "mean"
    alone = sum(one is not None for one in held) == 1
    raise MergeError(
        f"{' and '.join(methods)} at {path} can not be merged by {way.name}.",
        given=", ".join(methods),
        allowed="patches that are a change of a weight; bottlenecks of one kind, by a plain sum"
        if joins
        else "such a patch of one adapter alone, at weight 1 and scale 1, by a plain sum",
        do="use task_arithmetic (--method task_arithmetic)"
        if sums and (joins or alone)
        else "let the adapters act side by side, or leave one out",
    )


def _check_corrections(asked: _Asked, held: Sequence[Patched | None], factor: float, path: str) -> None:
    """Raise MergeError where what a base lost to its 4 bits would be put back more than once, or in part.

    A patch that ``corrects`` starts as that loss and is trained on from there: both are one pair of factors.
    """
    corrects = [one is not None and method_of(one.method).corrects for one in held]
    if not any(corrects):
        return
    shares = asked.way.shares(asked.weights)
    counted = factor * sum(share for share, does in zip(shares, corrects, strict=True) if does)
    if not asked.way.linear or abs(counted - 1) > 1e-9:
        raise MergeError(
            f"Each of these patches at {path} puts back what the 4 bits took from the weight, so it must count once.",
            given=f"{sum(corrects)} of them, by {asked.way.name}, {counted:g} times together",
            allowed="a weighted sum of them in which their weights add up to 1",
            do="use linear, the weighted mean",
        )


def _patched(made: Delta, site: Site, grounds: Grounds, rank: int | None) -> tuple[Patched | None, float]:
    """The patch that a change is kept as."""
    if made.still:
        if made.bias is None or not bool(made.bias.any()):
            return None, 0.0
        return _single("bitfit", {"added": site.kind is Kind.WEIGHT}, {"change": made.bias}), 0.0
    if made.norm == 0:
        return _patched(Delta(bias=made.bias), site, grounds, None)
    thin, error = _thinned(made, site, rank)
    if thin.factored and thin.bias is None:
        assert thin.up is not None and thin.down is not None
        return _single("lora", {"scale": 1.0, "dropout": 0.0}, {"A": thin.down, "B": thin.up}), error
    if grounds.packed(site):
        raise MergeError(
            f"What is to be added at {site.path} is no product of thin factors, and its weight is in 4 bits.",
            given="a change of the weight and the bias" if made.bias is not None else "a change of every number",
            allowed="a low-rank change",
            do="give a rank, use a way that keeps factors, or fold into the 16-bit base",
        )
    weight, bias = grounds.read(site.path)
    tensors = {"weight": weight.double() + thin.weight().view_as(weight)}
    if bias is not None:
        tensors["bias"] = bias.double() + (0 if thin.bias is None else thin.bias)
    return _single("full", {}, tensors), error


def _thinned(made: Delta, site: Site, rank: int | None) -> tuple[Delta, float]:
    """A change of at most ``rank``, where it has more; factors that are wider than the matrix are made as narrow."""
    if site.kind is not Kind.WEIGHT:
        return made, 0.0
    if rank is None:
        if made.rank is None or made.rank <= min(site.shape):
            return made, 0.0
        rank = min(site.shape)
    elif made.rank is not None and made.rank <= rank:
        return made, 0.0
    found = spectrum(made, rank)
    a, b = found.factors(rank)
    return Delta(up=b, down=a, bias=made.bias), found.off(rank)


def _single(method: str, constants: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Patched:
    kept = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    return Patched(method, MappingProxyType(dict(constants)), MappingProxyType(kept))


def _stored(tensor: Tensor, like: Sequence[Tensor]) -> Tensor:
    """In float32, or what is wider in the tensors that it came of."""
    wide = torch.float32
    for other in like:
        wide = torch.promote_types(wide, other.dtype)
    return tensor.to(wide).contiguous()


def _adapter(asked: _Asked, patches: Mapping[str, Patched], errors: Mapping[str, float]) -> Adapter:
    sites = asked.grounds.sites
    first = asked.adapters[0]
    known = next((adapter for adapter in asked.adapters if adapter.fingerprint is not None), first)
    return Adapter(
        parts=_parts(asked, patches),
        patches=MappingProxyType(dict(patches)),
        layout=layout(asked.grounds.base.model, [(sites[path], one.method) for path, one in patches.items()]),
        base=known.base,
        fingerprint=known.fingerprint,
        card=MappingProxyType(_card(asked, errors, known)),
    )


def _card(asked: _Asked, errors: Mapping[str, float], known: Adapter) -> dict[str, Any]:
    way = asked.way
    parents = [
        {
            "digest": digest(adapter),
            "weight": weight,
            "base": adapter.base,
            # None: nobody knows that it belongs to the base of the others
            "fingerprint": None if adapter.fingerprint is None else adapter.fingerprint.weights,
        }
        for adapter, weight in zip(asked.adapters, asked.weights, strict=True)
    ]
    merged = {
        "way": way.name,
        "axes": {"sparsify": way.sparsify, "align": way.align, "combine": way.combine},
        "options": dict(way.options),
        "scale": asked.scale,
        "components": {str(name): value for name, value in asked.components.items()},
        "rank": asked.rank,
        "largest_error": max(errors.values(), default=0.0),
        "parents": parents,
    }
    card: dict[str, Any] = {"merged": merged}
    if asked.resolution:
        card["recipe"] = {"resolution": asked.resolution[0]}
    # what a base in 4 bits is called in messages is read from here
    return card | ({"four_bits": known.card["four_bits"]} if "four_bits" in known.card else {})


def _parts(asked: _Asked, patches: Mapping[str, Patched]) -> tuple[Part, ...]:
    """What an adapter with these patches would have been attached with."""
    by_method: dict[str, list[str]] = {}
    for path, one in patches.items():
        by_method.setdefault(one.method, []).append(path)
    parts = []
    for name, paths in by_method.items():
        if name == "lora":
            parts.append(lora_part({path: patches[path] for path in paths}))
            continue
        parents = [part for adapter in asked.adapters for part in adapter.parts if part.method == name]
        config = parents[0].config if parents else method_of(name).config()
        parts.append(Part(name, "; ".join(f"@{path}" for path in paths), config))
    return tuple(parts)


def digest(adapter: Adapter) -> str:
    """SHA-256 of what an adapter computes: its patches' methods, constants and tensors, by site."""
    total = hashlib.sha256()
    for path in sorted(adapter.patches):
        one = adapter.patches[path]
        total.update(json.dumps([path, one.method, sorted(one.constants.items())]).encode())
        for name in sorted(one.tensors):
            tensor = one.tensors[name].detach().contiguous()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


__all__ = ["AS_TRAINED", "Merged", "Swelling", "digest", "merge", "swelling"]
