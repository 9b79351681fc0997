"""Throughput against the number of adapters that are asked for, in a pool that holds few of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Final

from tarsia.adapter import put
from tarsia.core.attach import activate, detach
from tarsia.labs import tenants
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.library.opening import open_adapter
from tarsia.serve.load import inside
from tarsia.serve.load.asked import shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tarsia.adapter import Host
    from tarsia.library import Library
    from tarsia.serve.engine import Engine

MOST: Final = 2000
NUMBERS: Final = (1, 5, 200, MOST)
POOL: Final = 32
ROWS: Final = 32
TOKENS: Final = 16
WORDS: Final = 12
ROUNDS: Final = 3
CHECKED: Final = 2
ZIPF: Final = 1.1
MADE: Final = tenants.lora("language.*.{q,v}; vision.*.{q,v}", 0.1)
KEPT: Final = 0.8
"""Share of the throughput with 5 adapters that is left with all of them, at least."""
AHEAD: Final = 2.0
"""Times by which one mixed batch is ahead of one adapter after the other, at least."""


@dataclass
class Rates:
    """Tokens a second of each round, by the number of adapters; how many different ones it had; pages that came."""

    mixed: dict[int, list[float]] = field(default_factory=dict)
    apart: dict[int, list[float]] = field(default_factory=dict)
    different: dict[int, list[int]] = field(default_factory=dict)
    loads: dict[int, int] = field(default_factory=dict)


def name(i: int) -> str:
    """What adapter ``i`` is called."""
    return f"task-{i:04d}"


def drawn(turn: int, many: int) -> list[str]:
    """Whom a round's questions are for, by Zipf's law."""
    picked = random.Random(f"{turn} of {many}").choices(range(many), cum_weights=shares(many, ZIPF), k=ROWS)
    return [name(i) for i in picked]


def measure(desk: Desk) -> Found:
    """Rounds of every number of adapters in turn, in one engine; the same questions one adapter after the other."""
    plain = tenants.host()
    wanted = [(name(i), MADE, i) for i in range(MOST)]

    def made(i: int) -> None:
        if i % 50 == 0:
            desk.show(0.6 * i / MOST, f"{i} of {MOST} adapters are drawn")

    held = tenants.library(desk.work / "library", plain, wanted, made)
    engine = tenants.engine(held, POOL, ROWS)
    turns = {many: [drawn(turn, many) for turn in range(ROUNDS + 1)] for many in NUMBERS}
    _proved(engine, sorted({one for rounds in turns.values() for names in rounds for one in names}), desk.show)
    rates = Rates()
    for turn in range(ROUNDS + 1):
        desk.show(0.75 + 0.25 * turn / (ROUNDS + 1), f"round {turn + 1}")
        for many in NUMBERS if turn % 2 else NUMBERS[::-1]:
            _round(engine, plain, held, rates, turn, many, turns[many][turn])
    engine.pages.close()
    return found(rates, plain.fingerprint.weights)


def _proved(engine: Engine, names: Sequence[str], show: Callable[[float, str], None]) -> None:
    """Let each adapter be proved once, before time is taken."""
    prompt = inside.encoded(engine.host, inside.Text("So?"))
    for i in range(0, len(names), 16):
        show(0.6 + 0.15 * i / len(names), f"{i} of {len(names)} adapters are proved")
        some = names[i : i + 16]
        inside.run(engine, [prompt] * len(some), some, 1)


def _round(
    engine: Engine, plain: Host, held: Library, rates: Rates, turn: int, many: int, names: Sequence[str]
) -> None:
    texts = inside.texts(NUMBERS.index(many) + turn * len(NUMBERS), ROWS, WORDS, pictured=True)
    before = engine.pages.stats()["adapter_loads"]
    mixed = inside.run(engine, [inside.encoded(plain, one) for one in texts], names, TOKENS)
    loads = engine.pages.stats()["adapter_loads"] - before
    ids, seconds = apart(plain, held, names, texts)
    for i in range(ROWS):
        if mixed.ids[i] != ids[i]:
            alone = tenants.alone(plain, held, names[i], texts[i : i + 1], TOKENS)[0]
            if mixed.ids[i] != alone:  # a padded batch may round otherwise; the row alone is what counts
                raise AssertionError(f"{names[i]} answers {mixed.ids[i]} in a mixed batch and {alone} alone")
    if not turn:
        return  # warms up
    rates.mixed.setdefault(many, []).append(mixed.rate)
    rates.apart.setdefault(many, []).append(ROWS * TOKENS / seconds)
    rates.different.setdefault(many, []).append(len(set(names)))
    rates.loads[many] = rates.loads.get(many, 0) + loads


def apart(
    plain: Host, held: Library, names: Sequence[str], texts: Sequence[inside.Text], tokens: int = TOKENS
) -> tuple[list[tuple[int, ...]], float]:
    """Each adapter put in, its rows as one batch of Transformers' ``generate``, and taken out: ids and seconds."""
    ids: list[tuple[int, ...]] = [()] * len(names)
    seconds = 0.0
    for one in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == one]
        began = time.perf_counter()
        activate(plain.model)
        put(plain, open_adapter(held, one), one)
        seconds += time.perf_counter() - began
        ran = inside.plainly(plain, [texts[i] for i in rows], tokens)
        seconds += ran.seconds
        detach(plain.model, one)
        for i, said in zip(rows, ran.ids, strict=True):
            ids[i] = said
    return ids, seconds


def found(rates: Rates, base: str) -> Found:
    """Tables and series of what the rounds gave; ``base`` is the digest of the model."""
    rows: dict[str, Mapping[str, Cell]] = {}
    few = rates.mixed[5]
    for many in NUMBERS:
        against = median(a / b for a, b in zip(rates.mixed[many], few, strict=True))
        rows[f"rate: {many:,}"] = {
            "different in a round": round(median(rates.different[many])),
            "pages read a round": round(rates.loads[many] / ROUNDS, 1),
            "mixed, tokens/s": round(median(rates.mixed[many])),
            "of that with 5, %": round(100 * against, 1),
            "one after the other, tokens/s": round(median(rates.apart[many])),
            "times ahead": round(median(a / b for a, b in zip(rates.mixed[many], rates.apart[many], strict=True)), 2),
        }
    series = {
        "adapters": [float(many) for many in NUMBERS],
        "mixed": [median(rates.mixed[many]) for many in NUMBERS],
        "apart": [median(rates.apart[many]) for many in NUMBERS],
    }
    return Found(rows, series, {"mini-1": base})


def draw(found: Found, figure: Figure) -> None:
    """Tokens a second against the number of adapters, both ways."""
    axes = figure.subplots()
    numbers = found.series["adapters"]
    for label, key, colour in (
        ("all in one batch", "mixed", COLOURS[0]),
        ("one adapter after the other", "apart", COLOURS[1]),
    ):
        values = found.series[key]
        axes.plot(numbers, values, "o-", color=colour, lw=2)
        axes.text(numbers[-1] * 1.12, values[-1], label, color=colour, va="center")
        for x, y in zip(numbers, values, strict=True):
            axes.annotate(f"{y:,.0f}", (x, y), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(POOL, color=GREY, lw=1, ls=":")
    axes.text(POOL * 1.05, 0.02, f"the pool holds {POOL}", transform=axes.get_xaxis_transform(), color=GREY, fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 20000)
    axes.set_xticks(numbers, [f"{int(number):,}" for number in numbers])
    axes.minorticks_off()
    axes.set_ylim(0, 1.1 * max(map(max, (found.series["mixed"], found.series["apart"]))))
    axes.set_xlabel("adapters that are asked for")
    axes.set_title("tokens a second")


TEXT: Final = f"""
Of {MOST:,} tenants' adapters the next {ROWS} questions are for a few of them, nobody knows which. {MOST:,} adapters
of mini-1 are drawn (LoRA of rank 4 on queries and values of the language model and of the vision tower), each with a
probe that it is held to when it is first read; the engine may keep {POOL} of them in memory. In a round {ROWS}
questions are asked at once, each about a picture of its own that was never shown before, whom being drawn by Zipf's
law (exponent {ZIPF:g}), and {TOKENS} tokens are said to each. *Mixed* is the engine; *one after the other* puts in
one adapter, has all its questions answered as one batch by Transformers' `generate`, takes it out, and goes to the
next. Every answer of the engine is, token for token, the adapter's own. Medians of {ROUNDS} rounds that take turns;
files in the page cache; every adapter proved once before.

{{{{ table("rate", "adapters") }}}}
With many adapters a round has many different ones, and pages come from disk; what that takes from the throughput is
the third last column. With one adapter Transformers' own batch has less to do than an engine. mini-1 is small, so
that a page is a large part of its work: of a larger base it is a smaller one (`bench/cases/serve_many.py` measures
it).
"""

CHAPTER: Final = Chapter(
    name="serving",
    title="One base, 1 to 2,000 adapters",
    question="How much of a server's throughput is left when 2,000 adapters are asked for instead of five?",
    claim=f"With {MOST:,} adapters in a pool of {POOL} the engine gives at least {100 * KEPT:g} % of the tokens a "
    f"second that it gives with 5, and at least {AHEAD:g} times those of one adapter after the other; every answer is "
    "the adapter's own.",
    bounds=(
        Bound("of that with 5, %", f"rate: {MOST:,}", "of that with 5, %", 100 * KEPT, 150),
        Bound("times ahead", f"rate: {MOST:,}", "times ahead", AHEAD),
        Bound("pages read a round", f"rate: {MOST:,}", "pages read a round", 1),
    ),
    measure=measure,
    draw=draw,
    picture="tokens a second against the number of adapters, mixed and one after the other",
    text=TEXT,
    order=172,
    minutes=4.0,
    size=(9.5, 4.4),
)
"""The times are of the machine that wrote the page; the ratios are what carries over."""
