"""What 4 bits do to a small change: folded over 4 bits and rounded again, how much of an adapter is there?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from tarsia.adapter import Adapter, FourBits, Host, open_base, put
from tarsia.core.attach import activate, patches
from tarsia.core.patch import Patch
from tarsia.core.site import Kind, Site
from tarsia.labs import folding, jobs, parity
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.merge.remains import NOTHING, Remains
from tarsia.quant.codec import Scheme
from tarsia.quant.rounding import rounded
from tarsia.quant.tensor import Weight4

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NF4: Final = Scheme("nf4", nested=True)
SIZES: Final = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""|d| / |W| that a trained change is scaled to, every site by itself."""
STRENGTHS: Final = (0.25, 0.5, 1.0)
"""Of the trained adapter, in the runs whose answers are counted."""
MEASURED: Final = 200

Table = dict[str, Mapping[str, Cell]]
Change = tuple[Site, Tensor, Tensor, Tensor]
"""A site, its weight in the files, the numbers that its 4 bits stand for, and the trained change: float32 [out, in]."""


def four(weight: Tensor) -> Tensor:
    """``weight`` in 4 bits and back."""
    return Weight4(rounded(weight, NF4)).dense(torch.float32)


FORMS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "4 bits again": four,
    "bfloat16": lambda weight: weight.bfloat16().float(),
}


def changes(host: Host, adapter: Adapter) -> list[Change]:
    """What an adapter over 4 bits changes at each linear layer of the language model."""
    activate(host.model)
    found = []
    for site, patch in _linear(host, adapter).items():
        held: Any = host.model.get_parameter(site.weight)
        grid = held.dense(torch.float32)
        with torch.no_grad():
            change = patch.fold(grid, None)[0] - grid
        found.append((site, host.origin(site).float(), grid, change))
    return found


def _linear(host: Host, adapter: Adapter) -> dict[Site, Patch]:
    if "delta" not in {name for slot in host.model.modules() for name in getattr(slot, "patches", ())}:
        put(host, adapter, "delta")
    own = patches(host.model, "delta")
    return {s: p for s, p in own.items() if s.kind is Kind.WEIGHT and isinstance(_held(host, s), Weight4)}


def _held(host: Host, site: Site) -> nn.Parameter:
    return host.model.get_parameter(site.weight)


def kept(found: Sequence[Change]) -> Table:
    """The share of the change that is there after rounding, by its size: over 4 bits, and over the original."""
    rows: Table = {}
    for size in SIZES:
        shares: dict[str, Cell] = {}
        for name, parts in _rounded(found, size).items():
            shares[name] = 100 * sum(parts, NOTHING).share
        rows[f"share: {size:g}"] = shares
    return rows


def _rounded(found: Sequence[Change], size: float) -> dict[str, list[Remains]]:
    """What remains at each site of its change, scaled to ``size`` times the weight."""
    draw = torch.Generator().manual_seed(0)
    parts: dict[str, list[Remains]] = {}
    for _, original, grid, change in found:
        scaled = change * (size * grid.norm() / change.norm())
        noise = torch.randn(grid.shape, generator=draw)
        noise *= scaled.norm() / noise.norm()
        for form, act in FORMS.items():
            for name, weight, step in (("", grid, scaled), (", original", original, scaled), (", noise", grid, noise)):
                if form == "bfloat16" and name == ", noise":
                    continue
                exact = weight + step
                parts.setdefault(form + name, []).append(Remains.of(weight, exact, act(exact)))
    return parts


def trained(job: str, found: Sequence[Change]) -> Table:
    """The size of a trained change by role, and what remains of it as it is."""
    rows: Table = {}
    roles = sorted({site.role for site, *_ in found})
    for role in (None, *roles):
        some = [one for one in found if role in (None, one[0].role)]
        again = [Remains.of(grid, grid + d, four(grid + d)) for _, _, grid, d in some]
        whole = sum(again, NOTHING)
        rows[f"trained {job}: {'all' if role is None else role}"] = {
            "d over W": whole.size,
            "left, %": 100 * whole.share,
        }
    return rows


@contextmanager
def folded(host: Host, found: Sequence[Change], strength: float, act: Callable[[Tensor], Any] | None) -> Iterator[None]:
    """Inside, the layers have the folded weight as ``act`` rounds it (None: the numbers of the 4 bits alone)."""
    kept: dict[str, nn.Parameter] = {}
    try:
        for site, _, grid, change in found:
            module: Any = host.model.get_submodule(site.module)
            kept[site.module] = module._parameters["weight"]
            exact = grid + strength * change
            module._parameters["weight"] = nn.Parameter(grid if act is None else act(exact), requires_grad=False)
        yield
    finally:
        for path, parameter in kept.items():
            host.model.get_submodule(path)._parameters["weight"] = parameter


def answers(job: str, host: Host, found: Sequence[Change], desk: Desk) -> Table:
    """Right answers of a job, percent: nothing folded, folded exactly, and rounded again, by strength.

    What the adapter changes elsewhere (the projector, whole) is there in all of them.
    """
    file = parity.rows(job, "held-out", desk.work)
    own = {site.path for site, *_ in found}
    slots: Any = [s for s in host.model.modules() if getattr(s, "sites", None)]
    activate(host.model, "delta")
    for slot in slots:
        if any(site.path in own for site in slot.sites.values()):
            slot.active = ()
    rows: Table = {}
    ways: dict[str, Callable[[Tensor], Tensor] | None] = {"unchanged": None, "exact": lambda w: w, **FORMS}
    for strength in STRENGTHS:
        row: dict[str, Cell] = {}
        for name, act in ways.items():
            desk.show(0.4 + 0.5 * STRENGTHS.index(strength) / len(STRENGTHS), f"{job}: {name} at {strength:g}")
            with folded(host, found, strength, act):
                row[name] = 100 * fmean(jobs.marks(host, _few(file, desk), 8))
        rows[f"answers {job}: {strength:g}"] = row
    activate(host.model)
    return rows


def _few(file: Any, desk: Desk) -> Any:
    """The first rows of a file, in a file of their own."""
    import pyarrow.parquet as pq

    path = desk.work / f"few-{file.stem}.parquet"
    if not path.is_file():
        pq.write_table(pq.read_table(file).slice(0, MEASURED), path)
    return path


def measure(desk: Desk) -> Found:
    """Train each job over 4 bits once, scale its change, round it, and let it answer."""
    first, other = folding.JOBS
    rows: Table = {"measured: job": {"name": first, "other": other, "rows": MEASURED}}
    bases = {}
    series: dict[str, Sequence[float]] = {}
    for number, job in enumerate(folding.JOBS):
        desk.show(number / len(folding.JOBS), f"training {job} over 4 bits")
        adapter = folding.learnt(job, "QLoRA", desk.work)
        host = open_base("mini-1", four_bits=FourBits())
        bases["mini-1"] = host.fingerprint.weights
        found = changes(host, adapter)
        if number == 0:
            rows |= kept(found)
            for name in rows[f"share: {SIZES[0]:g}"]:
                series[name] = [float(rows[f"share: {size:g}"][name]) for size in SIZES]
        rows |= trained(job, found)
        rows |= answers(job, host, found, desk)
    return Found(rows, series, bases)


def draw(found: Found, figure: Figure) -> None:
    """Share left by size of the change; right answers by strength."""
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    marks = {"4 bits again": "o-", "4 bits again, noise": "s--", "4 bits again, original": "^-"}
    marks |= {"bfloat16, original": "v-", "bfloat16": "D:"}
    titles = {"4 bits again": "NF4 again", "4 bits again, noise": "NF4 again, a random change"}
    titles |= {"4 bits again, original": "NF4, over the files' numbers", "bfloat16": "bfloat16, over NF4's numbers"}
    titles |= {"bfloat16, original": "bfloat16 again"}
    for (name, mark), colour in zip(marks.items(), COLOURS, strict=False):
        left.plot(SIZES, found.series[name], mark, color=colour, ms=4, label=titles[name])
    for job in folding.JOBS:
        size = float(found.rows[f"trained {job}: all"]["d over W"])
        left.axvline(size, color=GREY, lw=0.8)
        left.text(size, 106, f"{job} ", rotation=90, fontsize=7, va="bottom", ha="right", color="0.4")
    left.set_xscale("log")
    left.set_ylim(0, 140)
    left.set_yticks(range(0, 101, 20))
    left.set_xlabel("length of the change over that of the weight, at each site")
    left.set_title("share of the change that is left, %")
    left.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0.36, 0.62))
    job = folding.JOBS[0]
    for (name, title), colour in zip(
        (("exact", "folded, 32 bits"), ("bfloat16", "folded, 16 bits"), ("4 bits again", "folded, 4 bits again")),
        COLOURS,
        strict=False,
    ):
        shares = [float(found.rows[f"answers {job}: {s:g}"][name]) for s in STRENGTHS]
        right.plot(STRENGTHS, shares, "o-", color=colour, ms=4, label=title)
    right.axhline(float(found.rows[f"answers {job}: 1"]["unchanged"]), color=GREY, lw=0.8, ls="--")
    right.set_xlabel("strength of the adapter")
    right.set_ylim(0, 103)
    right.set_title(f"right answers on {job}, %")
    right.legend(frameon=False, fontsize=8)


TEXT: Final = """
QLoRA trains a change d over numbers Q that lie on the grid of NF4. Folded, Q + d lies beside the grid; rounded to
4 bits again, most of it goes back to where it was. What is left is the projection of what is stored on what was meant,
<round(Q + d) - Q, d> / |d|^2.

## Shares

The change that mini-1 learnt for {{ value("measured: job", "name") }}, scaled at each of its layers to a share of the
weight's length. Percent of it that is left:

{{ table("share", "d over W") }}
Over the original numbers W, which lie on no grid, the change is not lost in the mean: the rounding's error, which is
there anyway, hides it as a dither does. What it costs is the noise of another rounding, which the adapter was not
trained to make up for.

In 16 bits all of it is there, over NF4's numbers, which lie on no grid of bfloat16. Over the files' own, which do, the
same happens as in 4 bits, to changes a hundred times smaller: of a change of a thousandth of the weight
{{ value("share: 0.001", "bfloat16, original", ".0f") }} % is left, of one of a ten-thousandth {{ "" -}}
{{ value("share: 0.0001", "bfloat16, original", ".0f") }} %. `tarsia fold` measures that, and refuses too.

## Real changes

Trained as they are, by role of the layer:

{{ table("trained " + value("measured: job", "name"), value("measured: job", "name")) }}
{{ table("trained " + value("measured: job", "other"), value("measured: job", "other")) }}
## Answers

Right answers of {{ value("measured: job", "rows") }} held-out rows, percent, with the change folded at a part of its
strength. *Unchanged* has no change in the language model (the projector's is there).

{{ table("answers " + value("measured: job", "name"), value("measured: job", "name")) }}
{{ table("answers " + value("measured: job", "other"), value("measured: job", "other")) }}
## What to doubt

One small model and one seed. How large a change is hangs on the model, the rate and the rank: measure it, as
`tarsia fold --requantise` does before it refuses.
"""

_SMALL: Final = "share: 0.01"

CHAPTER: Final = Chapter(
    name="delta",
    title="What 4 bits do to a small change",
    question="An adapter over 4 bits is folded in and rounded to 4 bits again: how much of it is left?",
    claim=(
        "Of a trained change of a hundredth of the weight at most 20 % is left when it is folded over NF4's own "
        "numbers and rounded to NF4 again, at least 90 % over the original ones or in bfloat16; of one as large as the "
        "weight at least 90 % is left. Folded over bfloat16's own numbers in bfloat16, of a change of a thousandth at "
        "most 80 % is left."
    ),
    bounds=(
        Bound("left of 0.01, NF4 again, %", _SMALL, "4 bits again", -5, 20),
        Bound("left of 0.01, over the original, %", _SMALL, "4 bits again, original", 90, 115),
        Bound("left of 0.01, bfloat16, %", _SMALL, "bfloat16", 90, 110),
        Bound("left of 0.001, bfloat16 again, %", "share: 0.001", "bfloat16, original", 0, 80),
        Bound("left of 1, NF4 again, %", "share: 1", "4 bits again", 90, 110),
    ),
    measure=measure,
    draw=draw,
    picture="share of a change that is left after rounding against its size; right answers of a folded adapter",
    text=TEXT,
    order=45,
    minutes=12,
    size=(12, 4.2),
)
