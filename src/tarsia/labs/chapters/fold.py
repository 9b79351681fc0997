"""A folded adapter says what the live one says, and costs nothing to run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from tarsia.adapter import Adapter, Host, load, open_base, put, save
from tarsia.core.method import METHODS
from tarsia.labs import folding
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.merge.fold import Folded
from tarsia.merge.fold import fold as folded
from tarsia.merge.live import Bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {"vera": {"rank": 64}}
TIMED: Final = "lora"
"""The method whose latency is measured."""
ROUNDS: Final = 40

Table = dict[str, Mapping[str, Cell]]


def names() -> list[str]:
    """Methods that fold over a base that is not quantised."""
    return sorted(name for name, method in METHODS.items() if method.folds and not method.corrects)


def held_to(method: str, desk: Desk, keep: bool = False) -> tuple[Folded, Adapter]:
    """mini-1 with an adapter of this method folded into its 16-bit files, proved."""
    select = folding.selects([method])[method]
    adapter = folding.moved(method, OPTIONS.get(method, {}), select, desk.work)
    out = desk.work / f"folded-{method}"
    shutil.rmtree(out, ignore_errors=True)
    found = folded("mini-1", adapter, out, bar=Bar(keep=0))
    if not keep:
        shutil.rmtree(out)
    return found, adapter


def of_methods(desk: Desk) -> Table:
    """Every method's proof: differences of logits as shares of the largest."""
    rows: Table = {}
    for number, method in enumerate(names()):
        desk.show(0.6 * number / len(names()), f"folding {method}")
        found, _ = held_to(method, desk, keep=method == TIMED)
        proof = found.proof
        rows[f"method: {method}"] = {
            "adapter moves, %": 100 * proof.moved / proof.peak,
            "fold differs, %": 100 * proof.difference / proof.peak,
            "rounding does, %": 100 * proof.noise / proof.peak,
            "differs / rounding": proof.difference / proof.noise,
            "same token, %": 100 * proof.agreement,
        }
    rows["worst: all"] = {
        "differs / rounding": max(float(row["differs / rounding"]) for row in rows.values()),
        "same token, %": min(float(row["same token, %"]) for row in rows.values()),
    }
    return rows


def latency(desk: Desk) -> tuple[Table, dict[str, Sequence[float]]]:
    """Seconds of a forward pass with pictures, in turns: the base, the live adapter, the folded model."""
    live = open_base("mini-1")
    inputs = folding.shown(live, desk.work)
    adapter = load(_saved(desk))
    put(live, adapter, "live")
    models = {
        "base": open_base("mini-1", processor=False),
        "live": live,
        "folded": open_base(str(desk.work / f"folded-{TIMED}"), processor=False),
    }
    sizes = {name: _size(host.model) for name, host in models.items()}
    rows: Table = {f"model: {name}": {**size} for name, size in sizes.items()}
    rows["more: folded"] = {key: sizes["folded"][key] - sizes["base"][key] for key in sizes["base"]}
    rows["measured: rows"] = {"rows": len(inputs["input_ids"])}
    took = _raced({name: _forward(host, inputs) for name, host in models.items()}, desk)
    for name in ("live", "folded"):
        ratios = [a / b for a, b in zip(took[name], took["base"], strict=True)]
        rows[f"time: {name} over base"] = {"median": median(ratios), "rounds": ROUNDS}
    rows |= {f"seconds: {name}": {"median": median(values)} for name, values in took.items()}
    return rows, dict(took)


def _saved(desk: Desk) -> Any:
    """The adapter that was folded, as files."""
    folder = desk.work / f"adapter-{TIMED}"
    adapter = folding.moved(TIMED, {}, folding.selects([TIMED])[TIMED], desk.work)
    save(adapter, folder)
    return folder


def _size(model: nn.Module) -> dict[str, int]:
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "modules": sum(1 for _ in model.modules()),
    }


def _forward(host: Host, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return host.model(**inputs, use_cache=False).logits

    return run


def _raced(steps: Mapping[str, Callable[[], Any]], desk: Desk) -> dict[str, list[float]]:
    """Seconds of each step, in turns that go forwards and backwards."""
    took: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for number in range(ROUNDS):
        desk.show(0.7 + 0.3 * number / ROUNDS, "timing")
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            steps[name]()
            took[name].append(time.perf_counter() - began)
    return took


def measure(desk: Desk) -> Found:
    """Fold every method, then time one."""
    rows = of_methods(desk)
    more, series = latency(desk)
    digest = open_base("mini-1", processor=False).fingerprint.weights
    return Found(rows | more, series, {"mini-1": digest})


def draw(found: Found, figure: Figure) -> None:
    """Differences by method; seconds of a pass."""
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    methods = [name.removeprefix("method: ") for name in found.rows if name.startswith("method: ")]
    columns = ("adapter moves, %", "rounding does, %", "fold differs, %")
    for column, mark, colour in zip(columns, ("s", "D", "o"), COLOURS, strict=False):
        values = [float(found.rows[f"method: {name}"][column]) for name in methods]
        left.plot(values, range(len(methods)), mark, color=colour, ms=5, label=column.removesuffix(", %"))
    left.set_xscale("log")
    left.set_yticks(range(len(methods)), methods)
    left.invert_yaxis()
    left.grid(axis="y", color=GREY, lw=0.4, alpha=0.5)
    left.set_xlabel("largest difference of a logit, % of the largest logit")
    left.set_title("mini-1, 16-bit files")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    kinds = ("base", "folded", "live")
    right.boxplot([[1e3 * s for s in found.series[kind]] for kind in kinds], showfliers=False, widths=0.5)
    right.set_xticks((1, 2, 3), kinds)
    right.set_title("milliseconds of a pass with pictures")
    right.set_ylim(0, None)


TEXT: Final = """
Every method that is a change of weights folds into them: what was computed beside a layer is then part of it.
`tarsia fold` writes the base anew, with only the touched tensors changed, and holds what plain Transformers makes of
the new files to what the live adapter says on the old ones.

## Equality

Adapters of every such method, moved at random, on rows with pictures. mini-1's files are in bfloat16, so the folded
weights are rounded to that. *Rounding does* is what random noise of just that size in the same weights does; a fold
that differed by much more would have an error in it. Shares are of the largest logit:

{{ table("method", "method") }}
In float32 files nothing is rounded away: the tests hold fourteen families to a difference of one part in 100,000.

## Latency

A pass over {{ value("measured: rows", "rows") }} rows with pictures, in turns, as a multiple of the base's time:

{{ table("time", "time") }}
The folded model has the base's modules and parameters, so it is the base's time but for the noise of the clock; the
live adapter has its small products at each layer:

{{ table("model", "model") }}
## What to doubt

The adapters are random. mini-1 is so small that a live adapter's overhead is mostly that of calls, not of arithmetic.
"""

CHAPTER: Final = Chapter(
    name="fold",
    title="Folding loses nothing and costs nothing",
    question="Is a folded adapter the live one, and is it free to run?",
    claim=(
        "For every method that folds, the folded 16-bit model differs from the live adapter by at most 4 times what "
        "random noise of the rounding's size does, and at least 98 % of the positions keep their likeliest token; it "
        "has the base's parameters and takes 0.9 to 1.1 of the base's time, where the live adapter takes more than 1.1."
    ),
    bounds=(
        Bound("difference over rounding's, worst method", "worst: all", "differs / rounding", 0, 4),
        Bound("same likeliest token, worst method, %", "worst: all", "same token, %", 98, 100),
        Bound("folded over base, time", "time: folded over base", "median", 0.9, 1.1),
        Bound("live over base, time", "time: live over base", "median", 1.1),
        Bound("parameters more than the base's", "more: folded", "parameters", 0, 0),
    ),
    measure=measure,
    draw=draw,
    picture="largest difference of a folded model's logits by method; milliseconds of a pass",
    text=TEXT,
    order=47,
    minutes=3,
    size=(12, 4.6),
)
