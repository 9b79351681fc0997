"""A seed's configuration: a world, rows and a recipe, drawn from the whole space; what can not be run is drawn again.

Families and methods come round in shuffled turns, so that any 20 seeds in a row have every method and any 12 every
family; all else is drawn freely. DEVELOPMENT are the seeds to build by, HELD_OUT those to judge by.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from bench.grid.rows import Rows
from bench.grid.worlds import FAMILIES, RESOLUTIONS, World, build

DEVELOPMENT: Final = range(80)
HELD_OUT: Final = range(10_000, 10_060)
STEPS: Final = 3
BUDGET: Final = 170.0
"""Billions of operations that a run may take, by ``Configuration.work``."""

TIMES: Final = 40
"""How often lengths alone are drawn again before all else is too."""
TOO_MUCH: Final = "too much work"
UNTIED: Final = "tables that can not be tied"
NO_PLACE: Final = "prompts in a tower that has all pictures in one sequence"
QWEN: Final = "qwen"

T = TypeVar("T")
Values = dict[str, Any]

LOW_RANK: Final = ("lora", "rslora", "loraplus", "dora", "loftq", "pissa")
NECKS: Final = ("houlsby", "pfeiffer", "parallel", "scaled_parallel")
LEADS: Final = ("prompt", "prefix", "prefix_mlp")
SHOWN: Final = ("vpt", "vpt_deep")
METHODS: Final = (*LOW_RANK, "vera", "oft", "ia3", "bitfit", "full", *NECKS, *LEADS, *SHOWN)

ANYWHERE: Final[Mapping[str, tuple[str, ...]]] = {
    "language": (
        *("language", "language.-2..", "language.*.{q,v}", "language.*.{q,k,v,o}", "language.*.{gate,up,down}"),
        "language.0..1",
    ),
    "vision": ("vision", "vision.-3..", "vision.0..1"),
    "projector": ("projector",),
}
"""Selections by component."""
BLOCKS: Final[Mapping[str, tuple[str, ...]]] = {
    "language": ("language", "language.-2..", "language.0..1"),
    "vision": ("vision", "vision.-3.."),
}
WHERE: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    **dict.fromkeys((*LOW_RANK, "vera", "oft"), ANYWHERE),
    **dict.fromkeys(NECKS, BLOCKS),
    **{name: {"language": ("language",)} for name in LEADS},
    "full": {**BLOCKS, "projector": ("projector",)},
    "bitfit": {"vision": ("vision", "vision.-3.."), "projector": ("projector",), "language": ("language",)},
    "ia3": {"language": ("language", "language.*.{k,v}"), "vision": ("vision",)},
    "vpt": {"vision": ("vision", "vision.0..1")},
    "vpt_deep": {"vision": ("vision", "vision.-3..")},
}
"""Selections of each method by component."""


@dataclass(frozen=True)
class Configuration:
    """One run. ``recipe`` is without its places: the model's, the rows' and the run's folder.

    ``redrawn`` says why each draw before this one could not be run.
    """

    seed: int
    world: World
    rows: Rows
    recipe: Mapping[str, Any]
    redrawn: tuple[str, ...] = field(default=(), compare=False)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(part["method"] for part in self.recipe["parts"])

    @property
    def pictures(self) -> int:
        """The most pictures of a row."""
        return max(self.rows.pictures)

    @property
    def work(self) -> float:
        """Billions of operations of the run, from the sizes alone; a rough figure."""
        world, recipe = self.world, self.recipe
        rows: int = recipe["batch"] * recipe["accumulate"]
        seen = sum(self.rows.pictures) / len(self.rows.pictures)
        words = 2.5 * (self.rows.question + self.rows.answer)
        patches, tokens = _picture(world)
        block = world.hidden * (2 * world.hidden + 3 * world.intermediate) * 1.3
        tower = 12 * world.tower_hidden**2 * world.tower_layers
        head = world.vocabulary * world.hidden * 2.5 * self.rows.answer * rows
        language = (words + seen * tokens) * rows * block * world.layers
        once = 6 * (language + head + seen * patches * rows * tower) * STEPS
        slower = (3 if recipe["precision"] == "bfloat16" else 1) * (1.3 if recipe["checkpointing"] else 1)
        return once * slower / 1e9

    def write(self, folder: Path) -> Path:
        """Build the world, the rows and the recipe in ``folder``. Returns the recipe's file."""
        import yaml

        base = folder / "base"
        build(self.world, base, self.seed)
        rows = self.rows.write(folder / "rows", self.seed)
        places = {"model": str(base), "data": {"train": [{"path": str(rows)}]}, "out": str(folder / "out")}
        values = {**self.recipe, **places}
        if "features" in values:
            values["features"] = {"path": str(folder / "features"), "limit": "1GB"}
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf8")
        return path


def configuration(seed: int) -> Configuration:
    """The configuration of this seed. Raises ValueError where a thousand draws give none that can be run."""
    chance = random.Random(seed)
    family, method = _turn(tuple(FAMILIES), seed), _turn(METHODS, seed)
    redrawn: list[str] = []
    for _ in range(1000):
        recipe, pictures, resolution = _recipe(chance, method), _pictures(chance), chance.choice(RESOLUTIONS)
        world = _world(chance, family, resolution)
        for _ in range(TIMES):
            drawn = Configuration(seed, world, _rows(chance, recipe, pictures, resolution), recipe)
            why = refused(drawn)
            if why is None:
                return replace(drawn, redrawn=tuple(redrawn))
            redrawn.append(why)
            if why == NO_PLACE:
                family = chance.choice(tuple(FAMILIES))
            if why not in (TOO_MUCH, UNTIED):
                break
            # fewer layers, words and rows, so that wide models are not left out
            world = replace(world, layers=max(4, world.layers - 1), tied=world.tied and why != UNTIED)
            recipe = _fewer(recipe) if why == TOO_MUCH and chance.random() < 0.08 else recipe
    raise ValueError(f"seed {seed}: {family} with {method}: {', '.join(sorted(set(redrawn)))}")


def refused(drawn: Configuration) -> str | None:
    """Why this can not be run, or is not worth it; None where it can."""
    recipe, methods, world = drawn.recipe, drawn.methods, drawn.world
    parts = [(part["method"], part["select"].partition(".")[0]) for part in recipe["parts"]]
    seen = {component for _, component in parts}
    four = recipe.get("four_bits")
    quantised = set() if four is None else {"language", "vision"} if four["select"] is None else {four["select"]}
    reasons = {
        "no picture for the tower or the projector": not drawn.pictures and seen != {"language"},
        "two parts of one component": len(seen) < len(parts),
        "a prompt with packed rows": recipe["batching"] == "packed" and not set(methods).isdisjoint(LEADS),
        "a prompt with checkpointing": recipe["checkpointing"] and not set(methods).isdisjoint(LEADS),
        "rows that can not be packed": recipe["batching"] == "packed" and world.family in _UNPACKED,
        "nothing to group": recipe["batching"] == "grouped" and recipe["accumulate"] == 1,
        "nothing to pack": recipe["batching"] == "packed" and recipe["batch"] == 1,
        "LoftQ over weights that are not in 4 bits": any(m == "loftq" and c not in quantised for m, c in parts),
        "full training of weights in 4 bits": any(m == "full" and c in quantised for m, c in parts),
        "no biases to train": any(m == "bitfit" and not _biased(c, world.family) for m, c in parts),
        "a projector without a linear layer": world.family in _BARE
        and any(m in (*LOW_RANK, "vera", "oft") and c == "projector" for m, c in parts),
        "layers that look at pictures, and none": world.family == "mllama" and not drawn.pictures,
        "gates that are experts": world.family == "qwen3_vl_moe"
        and any("gate" in part["select"] for part in recipe["parts"]),
        "features of a tower that is trained": "features" in recipe and "vision" in seen,
        "features of a tower that ends with a projector that is trained": "features" in recipe
        and "projector" in seen
        and world.family.startswith(QWEN),
        "features of no picture": "features" in recipe and not drawn.pictures,
        NO_PLACE: world.family.startswith(QWEN) and not set(methods).isdisjoint(SHOWN),
        "prompts through two stacks of blocks": world.family == "mllama"
        and any((part["method"], part["select"]) == ("vpt", "vision") for part in recipe["parts"]),
        UNTIED: world.tied and world.family in _UNTIED,
        TOO_MUCH: drawn.work > BUDGET,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


_BIASED: Final = ("llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl")
"""Families whose language model has biases, in its attention."""
_BARE: Final = ("gemma3",)
"""Families whose projector is a bare matrix and a norm."""
_UNBIASED: Final = ("idefics3", "smolvlm", *_BARE)
"""Families whose projector has no biases."""
_UNPACKED: Final = ("mllama", "gemma3")
_UNTIED: Final = ("mllama",)


def _biased(component: str, family: str) -> bool:
    unbiased = {"language": family not in _BIASED, "projector": family in _UNBIASED}
    return not unbiased.get(component, False)


def _turn(names: Sequence[T], seed: int) -> T:
    """Each name once in as many seeds, in an order of its own each time."""
    turn, place = divmod(seed, len(names))
    order = list(names)
    random.Random(f"{turn} of {len(names)}").shuffle(order)
    return order[place]


def _picture(world: World) -> tuple[int, int]:
    """Patches that the tower sees of a picture, and tokens that the language model sees; a rough figure."""
    tile, ratio = world.cells**2, world.resolution // 112
    family = world.family
    if FAMILIES[family].fixed:
        return tile, tile // 4 if family == "gemma3" else tile
    if family.startswith("qwen"):
        patches = round(0.7 * (world.resolution / FAMILIES[family].patch) ** 2)
        return patches, patches // 4
    tiles = {"mllama": 4, "llava_next": 4, "llava_onevision": 4}.get(family, 1 + ratio**2 * (ratio > 1))
    return tiles * tile, {"mllama": 1, "llava_next": tiles * tile, "llava_onevision": tiles * tile}.get(
        family, tiles * tile // 4
    )


def _pictures(chance: random.Random) -> tuple[int, ...]:
    most = chance.randint(0, 4)
    return (most, *(chance.randint(0, most) for _ in range(chance.randint(0, 2))))


def _rows(chance: random.Random, recipe: Values, pictures: tuple[int, ...], resolution: int) -> Rows:
    return Rows(
        count=max(6, recipe["batch"] * recipe["accumulate"]),
        pictures=pictures,
        resolution=resolution,
        question=chance.choice((4, 10, 24, 60)),
        answer=chance.choice((2, 8, 20, 50)),
        uneven=chance.choice((0.0, 0.3, 0.8)),
    )


def _world(chance: random.Random, family: str, resolution: int) -> World:
    head = chance.choice((32, 64, 128))
    hidden = chance.choice([size for size in (256, 384, 512, 640, 768) if size % head == 0])
    heads = hidden // head
    tower, tower_heads = chance.choice(((192, 3), (192, 6), (256, 4), (256, 8), (320, 4), (320, 5), (384, 6)))
    return World(
        family=family,
        vocabulary=chance.choice((8192, 12_000, 16_384, 24_576, 32_000)),
        hidden=hidden,
        intermediate=chance.choice((2, 3, 4)) * hidden,
        layers=chance.randint(4, 8),
        heads=heads,
        key_values=heads // chance.choice([group for group in (1, 2, 3, 4) if heads % group == 0]),
        tower_hidden=tower,
        tower_layers=chance.randint(3, 6),
        tower_heads=tower_heads,
        resolution=resolution,
        tied=chance.random() < 0.4,
    )


def _recipe(chance: random.Random, method: str) -> Values:
    batch, accumulate = chance.choice((1, 1, 2, 2, 3, 4)), chance.choice((1, 1, 2, 3))
    values: Values = {
        "parts": [_part(chance, method), *(_part(chance, chance.choice(METHODS)) for _ in range(_more(chance)))],
        "steps": STEPS,
        "batch": batch,
        "accumulate": accumulate,
        "batching": chance.choice(("plain", "plain", "grouped", "packed")),
        "warmup": 0,
        "clip": chance.choice((None, 1.0, 1.0)),
        "precision": chance.choice(("float32", "bfloat16")),
        "checkpointing": chance.random() < 0.3,
        "seed": chance.randrange(1000),
        "threads": 1,
        "device": "cpu",
    }
    if chance.random() < 0.45:
        kind, select = chance.choice(("nf4", "nf4", "fp4", "int4")), chance.choice((None, None, "language"))
        values["four_bits"] = {"kind": kind, "nested": chance.random() < 0.7, "select": select}
    if chance.random() < 0.2:
        values["features"] = {}
    if chance.random() < 0.15:
        values["resolution"] = chance.choice((96, 160))
    return values


def _fewer(recipe: Values) -> Values:
    """The recipe with a row less in a micro-batch where that still packs, else a micro-batch less where that groups."""
    least = {"packed": (2, 1), "grouped": (1, 2), "plain": (1, 1)}[recipe["batching"]]
    if recipe["batch"] > least[0]:
        return recipe | {"batch": recipe["batch"] - 1}
    return recipe | {"accumulate": max(least[1], recipe["accumulate"] - 1)}


def _more(chance: random.Random) -> int:
    return chance.choice((0, 0, 0, 1, 1, 2))


def _part(chance: random.Random, method: str) -> Values:
    component = chance.choice(tuple(WHERE[method]))
    part = {"method": method, "select": chance.choice(WHERE[method][component]), "lr": 1e-4}
    return part | _options(chance, method)


def _options(chance: random.Random, method: str) -> Values:
    """The options that change what is held or computed."""
    if method in LOW_RANK:
        dropout = 0.0 if method == "pissa" else chance.choice((0.0, 0.0, 0.1))
        return {"rank": chance.choice((2, 8, 16, 64)), "dropout": dropout}
    if method in NECKS:
        return {"reduction": chance.choice((2, 8, 16)), "norm": chance.random() < 0.3}
    if method == "prefix_mlp":
        return {"length": chance.choice((4, 16, 50)), "inner": chance.choice((64, 256))}
    if method in (*LEADS, *SHOWN):
        return {"length": chance.choice((4, 16, 50))}
    if method == "vera":
        return {"rank": chance.choice((32, 256))}
    return {"block": chance.choice((16, 32))} if method == "oft" else {}
