"""Ways to merge, as data: which frame, which numbers are kept in it, and how they are made one.

At each site the deltas are laid into a frame (``align``), made sparse there (``sparsify``), combined, and brought back.
A way is a row of a table; anyone may make another from the same axes.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tarsia.core.errors import MergeError
from tarsia.merge import fast
from tarsia.merge.align import ALIGN, Frame, core, outputs, whole
from tarsia.merge.combine import COMBINE, Combine, check_weights
from tarsia.merge.delta import Delta
from tarsia.merge.sparsify import SPARSIFY, check_density, seed_for

NONE = "none"
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "elect": ("total", "frequency"),
    "weigh": ("after", "before"),
    "normalise": ("count", "weights", "none"),
    "sides": ("input", "output", "both"),
}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to merge: its place on each axis, where it comes from, and its options with their values.

    ``thin``: where no rank is asked for, the result is re-factored to the largest rank that a parent has there.
    """

    name: str
    sparsify: str = NONE
    align: str = NONE
    combine: str = "sum"
    source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    thin: bool = False

    def __post_init__(self) -> None:
        axes: dict[str, Mapping[str, object]] = {"sparsify": SPARSIFY, "align": ALIGN, "combine": COMBINE}
        for axis, table in axes.items():
            if getattr(self, axis) not in table and (axis == "combine" or getattr(self, axis) != NONE):
                raise MergeError(
                    f"There is no such {axis}.",
                    given=getattr(self, axis),
                    allowed=", ".join([*table, *([] if axis == "combine" else [NONE])]),
                )
        known = self.known
        for name, value in self.options.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.3)
                raise MergeError(
                    f"The way {self.name!r} has no option {name!r}.",
                    given=f"{name}={value!r}",
                    allowed=", ".join(known) or "(no options)",
                    do=f"did you mean {near[0]}?" if near else "remove it",
                )
            _check(name, value)
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def known(self) -> tuple[str, ...]:
        """Names of the options that the axes take."""
        names = ["density"] if self.sparsify != NONE else []
        names += ["seed"] if self.sparsify == "dare" else []
        return (*names, *self.choices)

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the options that go to what combines."""
        parameters = inspect.signature(COMBINE[self.combine].run).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "inputs")

    @property
    def combining(self) -> Combine:
        return COMBINE[self.combine]

    @property
    def linear(self) -> bool:
        """Whether the result is a weighted sum of the adapters: exact in factors, and for patches that join."""
        return self.combining.linear and self.sparsify == NONE and self.align == NONE

    def factored(self, given: bool) -> bool:
        """Whether factors come of a matrix: of any change in a frame; else where factors are all that is ``given``, and
        no number of a product is looked at alone."""
        combining = self.combining
        return self.align != NONE or (given and self.sparsify == NONE and (combining.invariant or combining.sees))

    def taking(self, options: Mapping[str, Any]) -> Way:
        """The same way with these options. Raises MergeError for one that it does not have, or a value that is none."""
        return replace(self, options={**self.options, **options})

    def check(self, weights: Sequence[float]) -> None:
        """Raise MergeError for weights that mean nothing here: in a mean, and in a vote, those below 0."""
        check_weights(self.combine, torch.tensor([float(w) for w in weights], dtype=torch.float64), self.options)

    def shares(self, weights: Sequence[float]) -> list[float]:
        """What each adapter is multiplied with where the way is linear. Raises MergeError as ``check`` does."""
        self.check(weights)
        if self.combine == "mean":
            return [weight / sum(weights) for weight in weights]
        return [float(weight) for weight in weights]


def _check(name: str, value: Any) -> None:
    if name in _CHOICES:
        good, allowed = value in _CHOICES[name], ", ".join(_CHOICES[name])
    elif name == "density":
        check_density(value)
        return
    elif name == "seed":
        good, allowed = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif name == "common":
        good, allowed = isinstance(value, int | float) and 0 < value <= 1, "above 0, at most 1"
    else:
        good, allowed = isinstance(value, int | float) and 0 <= value < math.inf, "a finite number of at least 0"
    if not good or isinstance(value, bool):
        raise MergeError(f"{name} can not be that.", given=repr(value), allowed=allowed)


_TIES: Mapping[str, Any] = {"density": 0.2}
_DARE: Mapping[str, Any] = {"density": 0.3, "seed": 0}

WAYS: Mapping[str, Way] = {
    way.name: way
    for way in (
        Way("linear", combine="mean", source="weighted mean, arXiv:2203.05482; mergekit's linear"),
        Way("task_arithmetic", source="arXiv:2212.04089, section 3"),
        Way("cat", source="the sum with factors side by side: PEFT's cat, exact at any rank"),
        Way("svd", source="the sum at the parents' largest rank: PEFT's svd (Eckart-Young, 1936)", thin=True),
        Way("magnitude", "magnitude", source="PEFT's magnitude_prune", options=_TIES),
        Way("ties", "magnitude", combine="ties", source="arXiv:2306.01708, algorithm 1", options=_TIES),
        Way("dare", "dare", source="arXiv:2311.03099", options=_DARE),
        Way("dare_ties", "dare", combine="ties", source="arXiv:2311.03099 with 2306.01708", options=_DARE),
        Way("knots_ties", "magnitude", "knots", "ties", "arXiv:2410.19735", _TIES),
        Way("knots_dare_ties", "dare", "knots", "ties", "arXiv:2410.19735 with 2311.03099", _DARE),
        Way("iso_c", combine="iso_c", source="arXiv:2502.04959, Iso-C"),
        Way("iso_cts", combine="iso_cts", source="arXiv:2502.04959, Iso-CTS"),
        Way("tsv", combine="tsv", source="arXiv:2412.00081, TSV-M"),
        Way("core_task_arithmetic", align="core", source="arXiv:2509.17786: the plain sum, by way of the cores"),
        Way("core_ties", "magnitude", "core", "ties", "arXiv:2509.17786 with 2306.01708", _TIES),
        Way("core_dare_ties", "dare", "core", "ties", "arXiv:2509.17786 with 2311.03099", _DARE),
        Way("core_iso_c", align="core", combine="iso_c", source="arXiv:2509.17786 with 2502.04959"),
        Way("core_iso_cts", align="core", combine="iso_cts", source="arXiv:2509.17786 with 2502.04959"),
        Way("core_tsv", align="core", combine="tsv", source="arXiv:2509.17786 with 2412.00081"),
        Way("wudi", combine="wudi", source="arXiv:2503.08099 (WUDI), solved in the core with a ridge"),
        Way("regmean", combine="regmean", source="arXiv:2212.09849 (RegMean), on each adapter's own probe"),
        Way(
            "wudi_both",
            combine="wudi",
            source="arXiv:2503.08099 asked of inputs and outputs",
            options={"sides": "both"},
        ),
    )
}
"""The ways that are shipped, by name."""


def find(name: str) -> Way:
    """The way of this name. Raises MergeError, naming the nearest, where there is none."""
    if name not in WAYS:
        near = difflib.get_close_matches(name, WAYS, 1, 0.3)
        raise MergeError(
            "There is no such way to merge.",
            given=name,
            allowed=", ".join(WAYS),
            do=f"did you mean {near[0]}?" if near else "choose one of these",
        )
    return WAYS[name]


def combined(way: Way, deltas: Sequence[Delta], weights: Sequence[float], path: str, *, matrix: bool = True) -> Delta:
    """The deltas of all adapters at one site (``Delta()`` for one that has none) made one, by ``way``.

    ``matrix`` says whether the weight is a linear layer's, or one for each expert: what some ways look at as a matrix.
    Any other tensor, and every bias, is taken number by number. Raises MergeError for weights that mean nothing here.
    """
    held = torch.tensor([float(w) for w in weights], dtype=torch.float64)
    check_weights(way.combine, held, way.options)
    biased = [delta.bias for delta in deltas if delta.bias is not None]
    bias = None
    if biased:
        entries = [torch.zeros_like(biased[0]) if delta.bias is None else delta.bias for delta in deltas]
        bias = _rest(way, torch.stack(entries), held, _seeds(way, deltas, path, "bias"))
    if all(delta.still for delta in deltas):
        return Delta(bias=bias)
    if way.linear:
        made = _side_by_side(deltas, way.shares(weights))
    else:
        made = _framed(way, deltas, held, _seeds(way, deltas, path, "weight"), path, matrix)
    return Delta(made.up, made.down, made.whole, bias)


def _side_by_side(deltas: Sequence[Delta], shares: Sequence[float]) -> Delta:
    """The weighted sum: factors above one another and side by side, so nothing is lost; whole where one is."""
    moving = [(share, delta) for share, delta in zip(shares, deltas, strict=True) if not delta.still]
    if any(not delta.factored for _, delta in moving):
        return Delta(whole=_added(moving))
    ups = [share * delta.up for share, delta in moving if delta.up is not None]
    return Delta(up=torch.cat(ups, 1), down=torch.cat([delta.down for _, delta in moving if delta.down is not None]))


def _added(moving: Sequence[tuple[float, Delta]]) -> Tensor:
    """The weighted sum as one tensor, of which no more than two are there at a time."""
    (share, first), *others = moving
    total = share * first.weight()
    for share, delta in others:
        total += delta.weight() if share == 1 else share * delta.weight()
    return total


def _framed(way: Way, deltas: Sequence[Delta], weights: Tensor, seeds: Sequence[int], path: str, matrix: bool) -> Delta:
    if not matrix or (way.combining.sees and _experts(deltas)):
        return Delta(whole=_rest(way, whole(deltas).parts, weights, seeds))
    made = fast.merged(way, deltas, weights, seeds)
    if made is not None:
        return made
    if way.combining.sees:
        return _seen(way, deltas, weights, path)
    frame = _frame(way, deltas)
    if frame.parts.ndim > 3:  # a matrix for each expert
        each = [_merged(way, frame.parts[:, i], weights, seeds) for i in range(frame.parts.shape[1])]
        return frame.back(torch.stack(each))
    return frame.back(_merged(way, frame.parts, weights, seeds))


def _seen(way: Way, deltas: Sequence[Delta], weights: Tensor, path: str) -> Delta:
    """With what the layer is given, by each adapter that can tell; one that changes it must."""
    if any(delta.inputs is None and not delta.still for delta in deltas):
        raise MergeError(
            f"{way.name} looks at what layers are given, and nobody can tell that of {path}.",
            do="give the base itself, opened, and adapters that were saved with a probe",
        )
    taking = [(delta, w) for delta, w in zip(deltas, weights, strict=True) if delta.inputs is not None]
    held = [delta for delta, _ in taking]
    frame = outputs(held) if all(delta.factored or delta.still for delta in held) else whole(held)
    options = {name: value for name, value in way.options.items() if name in way.choices}
    seen = [delta.inputs() for delta in held if delta.inputs is not None]
    return frame.back(way.combining.run(frame.parts, torch.stack([w for _, w in taking]), inputs=seen, **options))


def _experts(deltas: Sequence[Delta]) -> bool:
    return any(delta.whole is not None and delta.whole.ndim > 2 for delta in deltas)


def _frame(way: Way, deltas: Sequence[Delta]) -> Frame:
    moving = [delta for delta in deltas if not delta.still]
    if _experts(moving):
        return whole(deltas)
    if way.align != NONE:
        return ALIGN[way.align](deltas)
    # what does not depend on the basis is done in the core, where it is small
    if way.combining.invariant and way.sparsify == NONE and all(delta.factored for delta in moving):
        return core(deltas)
    return whole(deltas, torch.float64 if way.combining.invariant and way.sparsify == NONE else torch.float32)


def _merged(way: Way, parts: Tensor, weights: Tensor, seeds: Sequence[int]) -> Tensor:
    options = {name: value for name, value in way.options.items() if name in way.choices}
    return way.combining.run(_sparse(way, parts, seeds), weights, **options).double()


def _rest(way: Way, parts: Tensor, weights: Tensor, seeds: Sequence[int]) -> Tensor:
    """What is no matrix, number by number: with the way's own rule where that looks at single numbers."""
    if way.combining.rest is not None:
        return way.combining.rest(_sparse(way, parts, seeds), weights).double()
    return _merged(way, parts, weights, seeds)


def _sparse(way: Way, parts: Tensor, seeds: Sequence[int]) -> Tensor:
    if way.sparsify == NONE:
        return parts
    return SPARSIFY[way.sparsify](parts, way.options["density"], seeds)


def _seeds(way: Way, deltas: Sequence[Delta], path: str, what: str) -> list[int]:
    if way.sparsify != "dare":
        return [0] * len(deltas)
    return [seed_for(way.options["seed"], path, delta.digest, what) for delta in deltas]
