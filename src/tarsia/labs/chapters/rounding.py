"""What rounding to 4 bits does: to numbers, to layers' outputs, to what a language model says next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from tarsia.evaluate.chat import examined
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.labs.speakers import Subject, dithered, hear, large, small
from tarsia.quant import rounding
from tarsia.quant.codec import BLOCK, Scheme
from tarsia.quant.tensor import Weight4

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEMES: Final[Mapping[str, Scheme]] = {kind.upper(): Scheme(kind, nested=False) for kind in ("nf4", "int4", "fp4")}
NESTED: Final[Mapping[str, Scheme]] = {kind: replace(scheme, nested=True) for kind, scheme in SCHEMES.items()}
NUMBERS: Final = 2**20
MODELS: Final[Mapping[str, Mapping[str, Scheme]]] = {
    "mini-1": {**SCHEMES, "NF4, nested": NESTED["NF4"]},
    "SmolLM2": {**SCHEMES, "NF4, nested": NESTED["NF4"]},
    "SmolLM2, dithered": {kind: SCHEMES[kind] for kind in ("INT4", "FP4")},
}
"""What each model's layers are rounded to."""
DRAWS: Final[Mapping[str, int]] = {"mini-1": 8, "SmolLM2": 3, "SmolLM2, dithered": 3}
"""Roundings of each model: blocks that begin elsewhere by an even part of a block."""
_MEASURES: Final[Mapping[str, str]] = {
    "weights": "weights' squared error",
    "outputs": "outputs' squared error",
    "KL": "KL",
    "loss": "loss added",
}
_MINI: Final = "order: mini-1, FP4 over INT4"
_FP4: Final = "order: SmolLM2, FP4 over INT4"
_DITHERED: Final = "order: SmolLM2, dithered, FP4 over INT4"

Table = dict[str, Mapping[str, Cell]]


def back(weight: Tensor, scheme: Scheme, shift: int = 0) -> Tensor:
    """``weight`` [out, in] in 4 bits and back; the first block begins at number ``shift``."""
    flat = weight.reshape(1, -1).roll(-shift, 1)
    return Weight4(rounding.rounded(flat, scheme)).dense().roll(shift, 1).view_as(weight)


def decibels(error: float, whole: float) -> float:
    """The signal over the noise in dB; infinite without noise."""
    return 10 * math.log10(whole / error) if error else math.inf


def kinds_of_numbers() -> dict[str, Tensor]:
    """Numbers of several distributions, [1024, 1024] each."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(NUMBERS, generator=generator).view(1024, -1)
    chi = torch.randn(3, NUMBERS, generator=generator).square().mean(0).sqrt().view(1024, -1)
    uneven = torch.ones(normal.shape[1])
    uneven[torch.randperm(len(uneven), generator=generator)[: len(uneven) // 64]] = 20
    return {
        "uniform": torch.rand(NUMBERS, generator=generator).mul(2).sub(1).view(1024, -1),
        "normal": normal,
        "Student's t, 3 degrees": torch.randn(NUMBERS, generator=generator).view(1024, -1) / chi,
        "normal, a column in 64 is 20 times larger": normal * uneven,
    }


def of_numbers() -> Table:
    """Signal over noise of each type of levels, by distribution, and what nesting costs on normal numbers."""
    rows: Table = {}
    kinds = kinds_of_numbers()
    for name, weight in kinds.items():
        whole = float(weight.square().mean())
        rows[f"numbers: {name}"] = {title: decibels(_error(weight, s), whole) for title, s in SCHEMES.items()}
    plain = {title: _error(kinds["normal"], scheme) for title, scheme in SCHEMES.items()}
    rows |= {
        f"normal: {title}": {"mean squared error": error, "over NF4's": times(error, plain["NF4"])}
        for title, error in plain.items()
    }
    rows["ratio: normal"] = {"FP4 over INT4": times(plain["FP4"], plain["INT4"])}
    return rows | {"nested: normal numbers": _nesting([kinds["normal"]])}


def _error(weight: Tensor, scheme: Scheme, shift: int = 0) -> float:
    return float((back(weight, scheme, shift) - weight).square().mean())


def times(a: float, b: float) -> float:
    """a / b; no number where b is 0."""
    return a / b if b else math.nan


def _nesting(weights: Sequence[Tensor]) -> dict[str, Cell]:
    """What double quantisation adds to the squared error of these weights, percent, by type of levels."""

    def all_of(scheme: Scheme) -> float:
        return sum(_error(weight, scheme) * weight.numel() for weight in weights)

    return {title: 100 * (times(all_of(NESTED[title]), all_of(scheme)) - 1) for title, scheme in SCHEMES.items()}


def of_model(subject: Subject, desk: Desk, begin: float, end: float) -> tuple[Table, dict[str, list[float]]]:
    """Each type of levels in all linear layers: error of weights and of outputs, divergence and loss, over draws."""
    series: dict[str, list[float]] = {}
    draws = DRAWS[subject.name]
    with examined(subject.host.model):
        _put(subject)
        heard = hear(subject)
        whole = sum(float(w.square().sum()) for w in subject.weights)
        aloud = sum(float((x @ w.T).square().sum()) for x, w in zip(heard, subject.weights, strict=True))
        base = subject.speak()
        at_first = _loss(base, subject.ids)
        rows: Table = {
            f"{subject.name}: 32 bits": {"loss": at_first},
            f"nested: {subject.name}'s weights": _nesting(subject.weights),
            f"before: {subject.name}": {"blocks of 32 with at most 16 values, %": _few(subject.weights)},
        }
        tried = MODELS[subject.name]
        for i, (title, scheme) in enumerate(tried.items()):
            found: list[tuple[float, float, float, float]] = []
            for draw in range(draws):
                desk.show(begin + (end - begin) * (i + draw / draws) / len(tried), f"{subject.name} in {title}")
                error, loud = _round(subject, scheme, draw * BLOCK // draws, heard)
                said = subject.speak()
                found.append((error / whole, loud / aloud, _divergence(base, said), _loss(said, subject.ids)))
            errors, louds, kls, losses = map(list, zip(*found, strict=True))
            added = [value - at_first for value in losses]
            for what, values in (("KL", kls), ("weights", errors), ("outputs", louds), ("loss", added)):
                series[f"{subject.name} {title} {what}"] = values
            rows[f"{subject.name}: {title}"] = {
                "loss": fmean(losses),
                "KL": fmean(kls),
                "least": min(kls),
                "most": max(kls),
                "weights, dB": decibels(fmean(errors), 1),
                "outputs, dB": decibels(fmean(louds), 1),
            }
    _put(subject)
    return rows, series


def _put(subject: Subject) -> None:
    """Its own weights into every layer."""
    for layer, weight in zip(subject.layers, subject.weights, strict=True):
        layer.weight.data.copy_(weight)


def _few(weights: Sequence[Tensor]) -> float:
    """The share of aligned blocks of 32 that hold 16 values at most, percent: those of a weight rounded before do."""
    few = count = 0
    for weight in weights:
        ordered = weight.reshape(-1, 32).sort(1).values
        few += int(((ordered[:, 1:] != ordered[:, :-1]).sum(1) < 16).sum())
        count += len(ordered)
    return 100 * few / count


def _divergence(base: Tensor, said: Tensor) -> float:
    """KL(base || said), nats, the mean over tokens of log-probabilities [tokens, vocabulary]; a part at a time."""
    parts = zip(base.split(64), said.split(64), strict=True)
    return sum(float((p.exp() * (p - q)).sum()) for p, q in parts) / len(base)


def _loss(said: Tensor, ids: Tensor) -> float:
    return -float(said.gather(1, ids[:, None]).mean())


def _round(subject: Subject, scheme: Scheme, shift: int, heard: Sequence[Tensor]) -> tuple[float, float]:
    """Put rounded weights into every layer. Returns the squared errors of all weights and of all outputs heard."""
    error = loud = 0.0
    for layer, weight, x in zip(subject.layers, subject.weights, heard, strict=True):
        layer.weight.data.copy_(back(weight, scheme, shift))
        change = layer.weight.detach() - weight
        error += float(change.square().sum())
        loud += float((x @ change.T).square().sum())
    return error, loud


def orders(name: str, series: Mapping[str, Sequence[float]]) -> Table:
    """One type beside another on one model: by squared error of weights and of outputs, and by divergence."""
    table: Table = {}
    for one, other in (("INT4", "NF4"), ("FP4", "INT4")):
        if f"{name} {other} KL" not in series:
            continue
        both = {what: [series[f"{name} {kind} {what}"] for kind in (one, other)] for what in _MEASURES}
        table[f"order: {name}, {one} over {other}"] = {
            **{title: times(*map(fmean, both[what])) for what, title in _MEASURES.items()},
            "draws": len(both["KL"][0]),
            "less KL in": sum(a < b for a, b in zip(*both["KL"], strict=True)),
            "less loss in": sum(a < b for a, b in zip(*both["loss"], strict=True)),
        }
    return table


def measure(desk: Desk) -> Found:
    """Numbers first, then mini-1, then SmolLM2 where it is."""
    desk.show(0.0, "rounding numbers")
    rows = of_numbers()
    series: dict[str, list[float]] = {}
    bases = {}
    subject = small(desk.work)
    subjects = [(subject, 0.05, 1.0)]
    if "smol" in desk.folders:
        smol = large(desk.folders["smol"])
        subjects = [(subject, 0.05, 0.3), (smol, 0.3, 0.75), (dithered(smol), 0.75, 1.0)]
    for subject, begin, end in subjects:
        found, more = of_model(subject, desk, begin, end)
        rows |= found | orders(subject.name, more)
        series |= more
        bases[subject.name.partition(",")[0]] = subject.host.fingerprint.weights
    return Found(rows, series, bases)


def draw(found: Found, figure: Figure) -> None:
    """Signal over noise by distribution; loss against squared error for every model that was measured."""
    models = [name for name in MODELS if f"{name}: INT4" in found.rows]
    plots = figure.subplots(1, 1 + len(models), width_ratios=(1.2, *[0.9] * len(models)))
    _numbers(plots[0], found)
    for axes, name in zip(plots[1:], models, strict=True):
        for title, colour in zip(SCHEMES, COLOURS, strict=False):
            if title not in MODELS[name]:
                continue
            errors, added = found.series[f"{name} {title} weights"], found.series[f"{name} {title} loss"]
            axes.plot([100 * e for e in errors], added, "o", color=colour, ms=5, alpha=0.75, label=title)
        axes.set_xlim(0, 1.75)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.set_xlabel("squared error of the weights, %")
        axes.set_ylabel("loss added, nats a token")
        axes.set_title(f"{name}, a dot a draw")
        axes.legend(frameon=False, loc="lower left")


def _numbers(axes: Axes, found: Found) -> None:
    names = [name for name in found.rows if name.startswith("numbers: ")]
    for k, (title, colour) in enumerate(zip(SCHEMES, COLOURS, strict=False)):
        at = [i + (k - 1) * 0.26 for i in range(len(names))]
        axes.barh(at, [float(found.rows[name][title]) for name in names], 0.24, color=colour, label=title)
    axes.set_yticks(range(len(names)), [_short(name.removeprefix("numbers: ")) for name in names])
    axes.invert_yaxis()
    axes.tick_params(left=False)
    axes.grid(axis="x", color=GREY, lw=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.set_title("signal over noise, dB (blocks of 64)")
    axes.legend(frameon=False, loc="lower right", fontsize=8, framealpha=0.9)


def _short(name: str) -> str:
    return name.replace(", ", ",\n", 1).replace("in 64 is", "in 64\n")


TEXT: Final = """
## Numbers

Each block of 64 numbers is scaled by its largest and rounded to the nearest of the type's sixteen levels. Signal over
noise (more is better) of a million numbers of each kind:

{{ table("numbers", "dB") }}
On normal numbers FP4 has {{ value("ratio: normal", "FP4 over INT4", ".2f") }} times INT4's squared error:

{{ table("normal") }}
No type is best for all. Even numbers want even steps; where a few columns are far larger than the rest, FP4, whose
levels lie closer to zero, passes INT4.

## Language models

All linear layers of the language model are rounded, nothing else. KL is how far what it says next moves from the base,
in nats a token: the mean over draws, the least and the most. In each draw the blocks begin elsewhere, which is
another rounding as good as any. The loss is that of the right tokens, and the error of outputs is measured on what
enters each layer.

{{ table("mini-1", "mini-1, its held-out questions") }}
{% if "smol" in lacking %}
SmolLM2-135M was not measured here: `--with smol=FOLDER` does.

{% else %}
{{ table("SmolLM2", "SmolLM2-135M, English prose") }}
{% endif %}
One type over another, below 1 where the first is better. *Loss added* is what rounding adds to the base's loss; the
last two columns count the draws in which the first type does less harm:

{{ table("order") }}
Squared error of the weights misorders. FP4 has more of it than INT4 everywhere and adds less loss in the mean of
the draws, as the paper finds on larger models by perplexity (arXiv:2305.14314, table 2).
{% if "smol" in lacking %}
KL from the base and the squared error of outputs do not take its side on mini-1.
{% else %}
KL from the base and the squared error of outputs (on real inputs, of which some are far larger than others) take FP4's
side on SmolLM2 as it is, and not on the other two.
{% endif %}
So no cheap number orders types that are this close, and a draw or a measure decides. NF4 is the best of them by
every measure on SmolLM2, and on mini-1 by all but KL, which is very small there whatever the type.

## Double quantisation

What rounding the scales again adds to the squared error, percent; the rows "NF4, nested" above show what becomes of it
in a model:

{{ table("nested") }}
## What to doubt

These are few draws, one text and two small models, and why loss and KL part here is not explained.
{% if "smol" not in lacking %}
SmolLM2's weights come out of a file that holds them in 4 bits already (GGUF, Q4_1): of its blocks of 32 numbers
{{ value("before: SmolLM2", "blocks of 32 with at most 16 values, %", ".0f") }} % have at most 16 values, of mini-1's
{{ value("before: mini-1", "blocks of 32 with at most 16 values, %", ".0f") }} %. To see whether the order hangs on
that, *dithered* has noise of a step's width on every weight, and is compared with itself: it is a worse model, of loss
{{ value("SmolLM2, dithered: 32 bits", "loss", ".3f") }} for {{ value("SmolLM2: 32 bits", "loss", ".3f") }}, whose
weights lie on no grid. The prose is the language reference that comes with Python.

{{ table("SmolLM2, dithered", "SmolLM2, dithered") }}
{% endif %}
"""

CHAPTER: Final = Chapter(
    name="rounding",
    title="What rounding does",
    question="Which 4-bit type is better, and can its squared error tell?",
    claim=(
        "Squared error of the weights misorders 4-bit types: FP4 has at least 1.2 times INT4's on mini-1 and on "
        "SmolLM2, and adds less loss (at most 0.95 times); on SmolLM2 with its grid dithered away, too, but there "
        "FP4's KL is no less; double quantisation adds at most 0.2 % to NF4's squared error."
    ),
    bounds=(
        Bound("normal numbers: FP4's error over INT4's", "ratio: normal", "FP4 over INT4", 1.2, 1.4),
        Bound("mini-1: FP4's error over INT4's", _MINI, "weights' squared error", 1.2),
        Bound("mini-1: loss that FP4 adds over INT4's", _MINI, "loss added", 0, 0.95),
        Bound("SmolLM2: FP4's error over INT4's", _FP4, "weights' squared error", 1.2, uses="smol"),
        Bound("SmolLM2: loss that FP4 adds over INT4's", _FP4, "loss added", 0, 0.95, uses="smol"),
        Bound("SmolLM2: FP4's KL over INT4's", _FP4, "KL", 0, 0.98, uses="smol"),
        Bound("dithered: FP4's error over INT4's", _DITHERED, "weights' squared error", 1.2, uses="smol"),
        Bound("dithered: loss that FP4 adds over INT4's", _DITHERED, "loss added", 0, 0.95, uses="smol"),
        Bound("dithered: FP4's KL over INT4's", _DITHERED, "KL", 1, uses="smol"),
        Bound("normal numbers: nesting adds, %", "nested: normal numbers", "NF4", 0, 0.2),
        Bound("mini-1: nesting adds, %", "nested: mini-1's weights", "NF4", 0, 0.2),
    ),
    measure=measure,
    draw=draw,
    picture="signal over noise of NF4, INT4 and FP4 by distribution; loss added against squared error on real models",
    text=TEXT,
    order=20,
    minutes=6,
    size=(15, 4),
    uses=("smol",),
)  # fmt: skip
