"""What a recipe can do without so that it takes less memory, and what each such change gives up.

A change is data: which values of the recipe it sets, and in words what is lost. Changes of one kind stand on a ladder,
each rung lower than the one before. *Exact* ladders change no number that is trained but for the last bits (a
micro-batch is split, activations are computed twice, states are kept elsewhere); all others do, some more than others:
``weight`` puts them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from types import SimpleNamespace
from typing import Any, Final

from tarsia.core.errors import ConfigError
from tarsia.core.method import find
from tarsia.core.select import parse
from tarsia.core.site import Component
from tarsia.methods.lora import LoRAConfig
from tarsia.train.guidance import advise
from tarsia.train.recipe import LEAST_BUDGET, PartRecipe, Recipe

Values = Mapping[str, Any]
"""A recipe as plain values, as a YAML file holds them."""

SIDES: Final = (3 / 4, 1 / 2, 3 / 8, 1 / 4)
"""Shares of the longest side that pictures are shrunk to."""
HALVINGS: Final = 4
"""How often a rank is halved at most."""

WEIGHTS: Final[Mapping[str, tuple[int, ...]]] = {
    "8-bit states": (1,),  # arXiv:2110.02861, table 1: the same results as with 32 bits
    "4 bits": (2,),  # arXiv:2305.14314, table 3: NF4 with LoRA at all layers reaches 16 bits
    "rank": (2, 4, 6, 8),  # arXiv:2106.09685, table 6: little is lost down to 8; PEFT's runs lose more below
    "resolution": (3, 5, 7, 9),  # what is small in a picture can no longer be read: no paper's figure fits every task
    "full to LoRA": (10,),  # arXiv:2405.09673: full training learns more, and forgets more
}
"""How much each rung of a ladder that changes numbers gives up; a judgement, from these sources. They are added up."""


@dataclass(frozen=True, slots=True)
class Change:
    """One rung: ``text`` says what is changed, ``gives_up`` what is lost; ``apply`` makes the values anew.

    ``slug`` is what the change is called in the name of a file.
    """

    kind: str
    slug: str
    text: str
    gives_up: str
    apply: Callable[[Values], dict[str, Any]]
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Ladder:
    """Changes of one kind, each taking less memory, and giving up more, than the one before."""

    kind: str
    rungs: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """What the changes of a recipe depend on, beside itself.

    ``side`` is the most pixels along a side of a picture as it is now, ``parameters`` the base's, ``quantised`` whether
    its files hold weights in 4 bits.
    """

    side: int
    parameters: int
    quantised: bool


def plain(recipe: Recipe) -> dict[str, Any]:
    """The values that a recipe was given, as plain ones; what it left to defaults is left out."""
    return recipe.model_dump(mode="json", exclude_unset=True)


def legal(values: Values) -> Recipe | None:
    """The recipe of these values; None where it is none."""
    try:
        return Recipe.of(values)
    except ConfigError:
        return None


def split(recipe: Recipe) -> Ladder:
    """The same rows a step in smaller micro-batches, down to single rows."""
    whole = recipe.batch
    rungs = [_split(recipe, whole // size) for size in range(whole - 1, 0, -1) if whole % size == 0]
    return _standing(recipe, "micro-batch", rungs)


def _split(recipe: Recipe, parts: int) -> Change:
    batch, accumulate = recipe.batch // parts, recipe.accumulate * parts
    changed: dict[str, Any] = {"batch": batch, "accumulate": accumulate}
    unpacked = recipe.batching == "packed" and batch == 1
    if unpacked:
        changed["batching"] = "plain"  # a single row has nothing to be packed with
    drawn = any(part.options.get("dropout") for part in recipe.parts)
    same = "no number: the same rows a step, the same loss and gradient" + (" but for dropout's draws" if drawn else "")
    return Change(
        "micro-batch",
        f"batch{batch}",
        f"batch {recipe.batch} -> {batch}, accumulate {recipe.accumulate} -> {accumulate}"
        + (", packed -> plain" if unpacked else ""),
        f"{same}; {batch} of {recipe.batch} rows are computed at once",
        lambda values: {**values, **changed},
    )


def grouped(recipe: Recipe) -> Ladder:
    """A step's rows dealt out to its micro-batches by length: less padding."""
    gives_up = "no number: the same rows a step; rows are sorted by length within it"
    name = "grouped"
    change = Change(name, name, "batching grouped", gives_up, lambda values: {**values, "batching": name})
    return Ladder("grouped", (change,) if recipe.batching == "plain" else ())


def checkpointing(recipe: Recipe) -> Ladder:
    """Activations computed again in the backward pass."""
    gives_up = "no number; activations are computed twice, which takes time"
    name = "checkpointing"
    change = Change(name, name, name, gives_up, lambda values: {**values, "checkpointing": True})
    return _standing(recipe, "checkpointing", [] if recipe.checkpointing else [change])


def features(recipe: Recipe) -> Ladder:
    """The cache of a frozen tower's outputs on, where it is off, or off, where it is on."""
    if recipe.features is None:
        folder = f"{recipe.out}/features"
        change = Change(
            "features",
            "features",
            "features kept",
            f"no number; up to 4 GB of disk in {folder}",
            lambda values: {**values, "features": {"path": folder}},
        )
    else:
        change = Change(
            "features",
            "no-features",
            "features not kept",
            "no number; the vision tower computes every picture anew in every epoch",
            lambda values: {key: value for key, value in values.items() if key != "features"},
        )
    return _standing(recipe, "features", [change])


def paging(recipe: Recipe, budget: int, states: int) -> Change:
    """At most ``budget`` bytes of ``states`` bytes of the optimiser's states are in the device's memory."""
    held = max(LEAST_BUDGET, budget // LEAST_BUDGET * LEAST_BUDGET)
    where = "disk" if recipe.device != "cuda" else "pinned memory of the host"
    return Change(
        "paging",
        "paged",
        f"optimiser paged, {_mega(held)} of {_mega(states)} MB stay",
        f"no number; the rest of the states goes to {where} and comes back in every step",
        lambda values: {**values, "optimiser": {**_optimiser(values), "paged": True, "budget": held}},
    )


def numbers(recipe: Recipe, known: Known) -> tuple[Ladder, ...]:
    """The ladders that change what is trained or computed with, by what they give up."""
    found = (
        _standing(recipe, "8-bit states", _eight(recipe)),
        _standing(recipe, "4 bits", _four(recipe, known)),
        _standing(recipe, "rank", _ranks(recipe)),
        _standing(recipe, "resolution", _sides(recipe, known)),
        _standing(recipe, "full to LoRA", _low_rank(recipe, known)),
    )
    return tuple(ladder for ladder in found if ladder.rungs)


def _standing(recipe: Recipe, kind: str, rungs: Iterable[Change]) -> Ladder:
    """The rungs that make a recipe, with their weights."""
    weights = WEIGHTS.get(kind, repeat(0))
    weighed = [replace(rung, weight=weight) for rung, weight in zip(rungs, weights, strict=False)]
    values = plain(recipe)
    return Ladder(kind, tuple(rung for rung in weighed if legal(rung.apply(values)) is not None))


def _optimiser(values: Values) -> dict[str, Any]:
    """The table that stands for the optimiser, with the words of a text in it."""
    given = values.get("optimiser")
    return dict(given) if isinstance(given, Mapping) else {}


def _eight(recipe: Recipe) -> Iterator[Change]:
    if recipe.optimiser is None or recipe.optimiser.bits == 32:
        yield Change(
            "8-bit states",
            "8bit",
            "optimiser 8-bit",
            "AdamW's states are rounded to 8 bits, block by block (arXiv:2110.02861)",
            lambda values: {**values, "optimiser": {**_optimiser(values), "bits": 8}},
        )


def _four(recipe: Recipe, known: Known) -> Iterator[Change]:
    if recipe.four_bits is not None or known.quantised:
        return
    # weights that are trained themselves have no place in 4 bits
    trained = {c for part in recipe.parts if find(part.method).replaces for c in components(part)}
    able = [component for component in (Component.LANGUAGE, Component.VISION) if component not in trained]
    if able:
        form = {"kind": "nf4"} | ({} if len(able) == 2 else {"select": str(able[0])})
        yield Change(
            "4 bits",
            "nf4",
            f"four_bits nf4 ({' and '.join(map(str, able))})",
            "the frozen weights are rounded to 4 bits: the base answers a little worse before training (QLoRA, "
            "arXiv:2305.14314)",
            lambda values: {**values, "four_bits": form},
        )


def components(part: PartRecipe) -> set[Component]:
    """What a part's selection names; all, where it goes by paths."""
    terms = parse(part.select)
    return {c for term in terms for c in (term.components if term.glob is None else tuple(Component))}


def _ranks(recipe: Recipe) -> Iterator[Change]:
    configs = [part.configure() for part in recipe.parts]
    ranks = {
        number: (config.rank, *config.ranks.values())
        for number, config in enumerate(configs)
        if isinstance(config, LoRAConfig)
    }
    most = {number: _halvings(held) for number, held in ranks.items()}
    for times in range(1, min(HALVINGS, max(most.values(), default=0)) + 1):
        lowered = {number: _lowered(configs[number], min(times, most[number])) for number in ranks if most[number]}
        said = ", ".join(f"{configs[n].rank} -> {changed['rank']}" for n, changed in lowered.items())
        yield Change(
            "rank",
            f"rank{min(changed['rank'] for changed in lowered.values())}",
            f"rank {said}",
            f"1 of every {2**times} directions of the change is left; its scale stays",
            _with_options(lowered),
        )


def _halvings(ranks: Sequence[int]) -> int:
    """How often all of these can be halved."""
    return min((rank & -rank).bit_length() - 1 for rank in ranks)


def _lowered(config: LoRAConfig, times: int) -> dict[str, Any]:
    """The options for ranks halved so often, where the scale at every site is what it was."""
    share: int = 2**times
    rank = config.rank // share
    anywhere: Any = SimpleNamespace(path="")
    alone = replace(config, ranks={}, alphas={})
    # all rules are powers of the rank: one factor holds for every rank
    factor = alone.scale(anywhere)[1] / replace(alone, rank=rank).scale(anywhere)[1]
    return {
        "rank": rank,
        "alpha": config.alpha * factor,
        **({"ranks": {glob: held // share for glob, held in config.ranks.items()}} if config.ranks else {}),
        **({"alphas": {glob: alpha * factor for glob, alpha in config.alphas.items()}} if config.alphas else {}),
    }


def _with_options(options: Mapping[int, Mapping[str, Any]]) -> Callable[[Values], dict[str, Any]]:
    """Set options of the parts of these numbers."""
    return lambda values: {**values, "parts": [{**p, **options.get(n, {})} for n, p in enumerate(values["parts"])]}


def _sides(recipe: Recipe, known: Known) -> Iterator[Change]:
    if not known.side:
        return
    for share in SIDES:
        yield Change(
            "resolution",
            f"resolution{round(known.side * share)}",
            f"resolution {round(known.side * share)}",
            f"pictures of up to {known.side} pixels a side are shrunk to {share:.3g} of that: {share**2:.0%} of the "
            "pixels are left of the largest, and what is small can not be read any more",
            _resolution(round(known.side * share)),
        )


def _resolution(side: int) -> Callable[[Values], dict[str, Any]]:
    return lambda values: {**values, "resolution": side}


def _low_rank(recipe: Recipe, known: Known) -> Iterator[Change]:
    full = [number for number, part in enumerate(recipe.parts) if part.method == "full"]
    if not full:
        return
    advice = advise("lora", parameters=known.parameters)
    options = {number: advice.elsewhere(recipe.parts[number].select).part for number in full}
    named = ", ".join(recipe.parts[number].select for number in full)
    yield Change(
        "full to LoRA",
        "lora",
        f"{named}: full -> LoRA of rank {advice['rank']}",
        f"ANOTHER METHOD: {named} is no longer trained in full, only by changes of rank {advice['rank']}, at another "
        "learning rate",
        _with_options(options),
    )


def _mega(size: int) -> str:
    return f"{size / 1e6:.3g}"
