"""Which tensors of a base's files a fold changes, and to what: each set of them that belongs together, by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tarsia.core.errors import MergeError, QuantError
from tarsia.core.patch import Patch
from tarsia.core.site import Site
from tarsia.merge.remains import Remains, check_rounded, sampled
from tarsia.merge.units import Stored, Unit, unfoldable
from tarsia.methods.lora import LoRA
from tarsia.quant.codec import Quantised, Scheme
from tarsia.quant.rounding import lost, rounded
from tarsia.quant.tensor import Weight4

Layers = Sequence[Mapping[Site, Patch]]
"""Patches by site, of one adapter after the other: the first is folded first."""

Measure = Callable[[], None]
"""Measures what remains of a change. Raises MergeError where what was written is not what was meant."""


@dataclass(frozen=True)
class Job:
    """Units of the files that can only be made together, and the sites whose patches change them."""

    units: tuple[Unit, ...]
    sites: tuple[Site, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for unit in self.units for key in unit.keys)


@dataclass
class Folding:
    """The patches and what they are folded into.

    ``coarse`` are parameters that stand in 16 bits in the files and that the live base has in 4: they are rounded as
    it does, to ``scheme``, before the fold. ``fine`` are those that are written in 4 bits, to ``into``. ``also`` are
    written anew though nobody changes them: the files hold them in 4 bits, and are not to. ``remains`` fills as
    parameters are made.
    """

    stored: Stored
    layers: Layers
    coarse: frozenset[str] = frozenset()
    scheme: Scheme | None = None
    fine: frozenset[str] = frozenset()
    into: Scheme | None = None
    also: frozenset[str] = frozenset()
    remains: dict[str, Remains] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = {site.path: site for layer in self.layers for site in layer}
        self.jobs = tuple(self._jobs())
        self.by_key = {key: job for job in self.jobs for key in job.keys}

    def names(self, site: Site) -> tuple[str, ...]:
        """The parameters of a site that the files hold: its weight, under one name or more, and its bias.

        Raises MergeError where they have no weight of it.
        """
        held = [name for name in (site.weight, *site.tied) if name in self.stored.units]
        if not held:
            raise MergeError(
                f"The base's files hold no weight of {site.path}.",
                given=site.weight,
                do="save the base anew with the installed transformers (model.save_pretrained), and fold into that",
            )
        alone = all(isinstance(patch, LoRA) for patch in self.patches(site))
        bias = [site.bias] if site.bias is not None and not alone else []
        for name in bias:
            if name not in self.stored.units:
                raise MergeError(
                    f"The base's files hold no bias of {site.path}.", given=name, do="fetch the base again"
                )
        return (*held, *bias)

    def patches(self, site: Site) -> list[Patch]:
        """The patches of a site, in the order in which they are folded."""
        return [layer[site] for layer in self.layers if site in layer]

    def _jobs(self) -> Iterator[Job]:
        """Units that share a site, or a converter, belong together."""
        groups: list[tuple[dict[int, Unit], dict[str, Site]]] = []
        wanted: list[tuple[tuple[str, ...], Site | None]] = [(self.names(site), site) for site in self.sites.values()]
        others = sorted(self.coarse | self.fine | self.also)
        if missing := [name for name in others if name not in self.stored.units]:
            raise MergeError("The base's files hold no such weight.", given=missing[0], do="fetch the base again")
        wanted += [((name,), None) for name in others]
        at: dict[int, int] = {}
        for names, site in wanted:
            units = {id(self.stored.units[name]): self.stored.units[name] for name in names}
            met = sorted({at[key] for key in units if key in at})
            sites = {} if site is None else {site.path: site}
            for number in met:
                units |= groups[number][0]
                sites = groups[number][1] | sites
                groups[number] = ({}, {})
            at |= dict.fromkeys(units, len(groups))
            groups.append((units, sites))
        for found, members in groups:
            if found:
                yield Job(tuple(found.values()), tuple(members.values()))

    def quick(self, job: Job) -> LoRA | None:
        """The patch, where all that a job is is one LoRA in one tensor that stays as it is: it is folded in place."""
        if len(job.units) != 1 or len(job.sites) != 1 or not job.units[0].plain:
            return None
        (name,) = job.units[0].names
        patches = self.patches(job.sites[0])
        only = patches[0] if len(patches) == 1 else None
        return only if isinstance(only, LoRA) and name not in self.coarse | self.fine else None

    @torch.no_grad()
    def in_place(self, job: Job, patch: LoRA, weight: Tensor) -> Measure:
        """Fold a LoRA into ``weight`` itself. What is given back is to be called while ``weight`` is there.

        It holds the result to the sum and measures what remains, of a large weight on a sample of rows; any thread may.
        """
        a, b = (factor.detach().float() for factor in patch.factors())
        squares = torch.mm(b, a @ a.T).mul_(b).sum(1)  # of what each row changes by, but for the scale
        rows = sampled(weight.shape, squares)
        before = weight.to(torch.float32, copy=True) if rows is None else weight[rows].float()
        patch.fold_into(weight, weight)

        def measure() -> None:
            exact = torch.addmm(before, b if rows is None else b[rows], a, alpha=patch.scale)
            name, stored = job.units[0].names[0], weight if rows is None else weight[rows]
            check_rounded(name, exact, stored)
            found = Remains.of(before, exact, stored)
            if rows is not None:
                found = found.spread(len(weight), len(rows), patch.scale**2 * float(squares.sum(dtype=torch.float64)))
            self.remains[name] = found

        return measure

    def check_measured(self) -> None:
        """Raise MergeError where a parameter that the patches change was not measured: none says that it is there."""
        missing = {name for site in self.sites.values() for name in self.names(site)} - self.remains.keys()
        if missing:
            raise MergeError(
                "What remains of a change was not measured.",
                given=f"{min(missing)} ({len(missing)} parameters)",
                do="report this; nothing was left behind",
            )

    @torch.no_grad()
    def made(self, job: Job) -> dict[str, Tensor | Quantised]:
        """What the files are to hold for a job's keys: of a key that is to be in 4 bits the whole weight."""
        kept, exact = self._before(job)
        before = {name: exact[name] for name in exact}
        for site in job.sites:
            self._fold(site, exact)
        return {key: value for unit in job.units for key, value in self._written(unit, kept, before, exact).items()}

    def _before(self, job: Job) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All parameters of a job as the files hold them, and those that change as the live base has them, wide."""
        touched = {name for site in job.sites for name in self.names(site)}
        touched |= self.coarse | self.fine | self.also
        kept: dict[str, Tensor] = {}
        for unit in job.units:
            kept |= self.stored.parameters(unit)
        wide: dict[str, Tensor] = {}
        for name, value in kept.items():
            if name not in touched:
                continue
            if not value.is_floating_point():
                raise MergeError(f"{name} is no floating-point tensor in the base's files.", given=str(value.dtype))
            form = self.scheme if name in self.coarse else None
            wide[name] = value.to(_wide(value)) if form is None else _coarse(name, value, form)
        return kept, wide

    def _fold(self, site: Site, exact: dict[str, Tensor]) -> None:
        """Put the site's folded weight and bias in the place of those in ``exact``."""
        names = self.names(site)
        alike = [name for name in names if name != site.bias]
        weight = exact[alike[0]]
        for other in alike[1:]:
            if not torch.equal(exact[other], weight):
                raise MergeError(
                    "The base's files hold two tensors for what its configuration says is one.",
                    given=" and ".join(alike),
                    do="set tie_word_embeddings to what the files hold, and train over that base",
                )
        bias = exact[str(site.bias)] if site.bias in names else None
        for patch in self.patches(site):
            shape = weight.shape
            weight, changed = patch.fold(weight, bias)
            if weight.shape != shape or (changed is None) != (bias is None):
                raise MergeError(f"The patch at {site.path} does not fold into what the files hold.", given=shape)
            bias = changed
        exact |= dict.fromkeys(alike, weight)
        if bias is not None:
            exact[str(site.bias)] = bias

    def _written(
        self, unit: Unit, kept: Mapping[str, Tensor], before: Mapping[str, Tensor], exact: Mapping[str, Tensor]
    ) -> dict[str, Tensor | Quantised]:
        """A unit's tensors, rounded to what they are stored in; what that left of the change is noted."""
        values: dict[str, Tensor] = {name: kept[name] for name in unit.names}
        for name in unit.names:
            if name not in exact:
                continue
            if name in self.fine:
                return {unit.keys[0]: self._fine(unit, name, before[name], exact[name])}
            dtype = self.stored.quantised(unit).dtype if unit.packed else kept[name].dtype
            values[name] = exact[name].to(dtype)
            check_rounded(name, exact[name], values[name])
            self.remains[name] = Remains.of(before[name], exact[name], values[name])
        if unit.packed:
            return {unit.keys[0]: values[unit.names[0]]}
        return {**self.stored.tensors(unit, values)}

    def _fine(self, unit: Unit, name: str, before: Tensor, exact: Tensor) -> Quantised:
        """A weight in 4 bits, as it is in the files where nobody changes it and they hold this form."""
        if unit.converter is not None:
            raise unfoldable(unit, "4 bits have no such form")
        assert self.into is not None
        if unit.packed:
            value = self.stored.quantised(unit)
            if exact is before and value.scheme == self.into:
                return value
            dtype = value.dtype
        else:
            dtype = self.stored.read(unit.keys[0]).dtype
            if exact is before and name in self.coarse and self.scheme == self.into:
                return rounded(self.stored.read(unit.keys[0]), self.into)
        try:
            value = rounded(exact, self.into, dtype)
            lost(exact, value)  # held to what its levels allow
        except QuantError as error:
            raise error.about(name) from None
        was = Weight4(rounded(before, self.into, dtype)).dense(exact.dtype)
        self.remains[name] = Remains.of(before, exact, Weight4(value).dense(exact.dtype), was)
        return value


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _coarse(name: str, value: Tensor, scheme: Scheme) -> Tensor:
    """The numbers that a weight has once it was rounded to 4 bits as a base is opened."""
    try:
        held: Any = Weight4(rounded(value, scheme, value.dtype))
    except QuantError as error:
        raise error.about(name) from None
    dense: Tensor = held.dense(torch.float32)
    return dense
