"""What a low-rank patch can start from: nothing, the weight's principal part, or what 4 bits took from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import tarsia
from tarsia.adapter import FourBits, Host, open_base
from tarsia.base.texts import text
from tarsia.core.attach import Part, attach, detach, patches
from tarsia.core.site import Site
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.methods.lora import LoRA, LoRAConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANKS: Final = (8, 16, 64)
GRID: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LINEAR: Final = "language.*.{q,k,v,o,gate,up,down}"
FORM: Final = FourBits(kind="nf4", nested=True, select=LINEAR)
ROWS: Final = 4
LENGTH: Final = 256
QUESTIONS: Final = 200
MINI, SMOL = "mini-1", "SmolLM2"

Rows = dict[str, Mapping[str, Cell]]
Series = dict[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Text to read: ``ids`` and attention ``mask`` [rows, length], and which tokens count as predicted, ``wanted``."""

    ids: Tensor
    mask: Tensor
    wanted: Tensor

    def logs(self, model: Any) -> Tensor:
        """Logarithms of the probabilities at the wanted tokens, [tokens, vocabulary]."""
        logits: Tensor = model(input_ids=self.ids, attention_mask=self.mask).logits
        return logits[:, :-1][self.wanted[:, 1:]].float().log_softmax(-1)

    @property
    def tokens(self) -> Tensor:
        """The wanted tokens, in the order of ``logs``."""
        return self.ids[:, 1:][self.wanted[:, 1:]]


def questions(host: Host) -> Sample:
    """Text questions of mini-1's kind with their answers, a row each; the answers are wanted."""
    tokenizer: Any = host.processor.tokenizer
    rows = []
    for number in range(QUESTIONS):
        _, asked, answer = text(1_000_000 + number)
        said = [{"role": "user", "content": asked}]
        prompt = host.processor.apply_chat_template(said, add_generation_prompt=True)
        parts = [tokenizer(piece, add_special_tokens=False).input_ids for piece in (prompt, answer)]
        rows.append((torch.tensor(parts[0] + parts[1]), len(parts[0])))
    ids = pad_sequence([row for row, _ in rows], batch_first=True)
    place = torch.arange(ids.shape[1])
    mask = torch.stack([place < len(row) for row, _ in rows])
    return Sample(ids, mask.long(), mask & torch.stack([place >= asked for _, asked in rows]))


def sources(host: Host) -> Sample:
    """Tarsia's own algebra as text, which no model has seen; every token is wanted."""
    folder = Path(tarsia.__file__).parent / "core"
    whole = "\n".join(path.read_text(encoding="utf8") for path in sorted(folder.glob("*.py")))
    found: Tensor = host.processor.tokenizer(whole, return_tensors="pt", add_special_tokens=False).input_ids
    ids = found[0, : ROWS * LENGTH].view(ROWS, LENGTH)
    return Sample(ids, torch.ones_like(ids), torch.ones_like(ids).bool())


def _near(logs: Tensor, exact: Tensor, sample: Sample) -> dict[str, float]:
    """Loss on the text, and how far the probabilities are from the exact ones: mean KL in nats."""
    apart = F.kl_div(logs, exact, log_target=True, reduction="sum") / len(exact)
    return {"loss": float(F.nll_loss(logs, sample.tokens)), "KL to 16 bits": max(0.0, float(apart))}


def _sites(host: Host) -> tuple[Site, ...]:
    assert host.quantisation is not None
    return host.quantisation.sites


def _error(host: Host, site: Site) -> tuple[Tensor, Tensor]:
    """A weight as it was, and what of it 4 bits do not hold, both float64."""
    was = host.origin(site).double()
    held: Any = host.model.get_parameter(site.weight)
    return was, was - held.dense().double()


def spectra(host: Host, desk: Desk, at: float) -> tuple[Rows, Series]:
    """How much of a weight, its error, and white noise of its shape no product of rank r holds; means over sites."""
    generator = torch.Generator().manual_seed(0)
    left: dict[str, list[Tensor]] = {"weight": [], "error": [], "noise": []}
    noise: dict[tuple[int, ...], Tensor] = {}
    sites = _sites(host)
    for i, site in enumerate(sites):
        desk.show(at, f"singular values, layer {i + 1} of {len(sites)}")
        if site.shape not in noise:
            noise[site.shape] = _left(torch.randn(site.shape, generator=generator))
        was, error = _error(host, site)
        for name, value in (("weight", _left(was)), ("error", _left(error)), ("noise", noise[site.shape])):
            left[name].append(value)
    means = {name: torch.stack(values).mean(0) for name, values in left.items()}
    rows: Rows = {
        f"rank {rank}": {
            "of the weight, %": 100 * float(1 - means["weight"][GRID.index(rank)]),
            "of its error, %": 100 * float(1 - means["error"][GRID.index(rank)]),
            "of white noise, %": 100 * float(1 - means["noise"][GRID.index(rank)]),
        }
        for rank in RANKS
    }
    return rows, {name: values.tolist() for name, values in means.items()}


def _left(matrix: Tensor) -> Tensor:
    """The share of the squared norm that is outside the GRID's ranks."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().t()
    energy = torch.linalg.eigvalsh(wide @ wide.t()).flip(0).clamp(min=0)
    held = energy.cumsum(0)
    return torch.stack([1 - held[min(rank, len(held)) - 1] / held[-1] for rank in GRID]).clamp(min=0)


@torch.no_grad()
def corrected(host: Host, sample: Sample, exact: Tensor, desk: Desk, at: float) -> tuple[Rows, Rows]:
    """Weights' error and the model's outputs in 4 bits, and with LoftQ of each rank over them."""
    sites = _sites(host)
    relative = torch.tensor([float(e.norm() / w.norm()) for w, e in (_error(host, site) for site in sites)]).mean()
    weights: Rows = {"NF4": {"relative error, %": 100 * float(relative), "of NF4's, %": 100.0}}
    before = _near(sample.logs(host.model), exact, sample)
    outputs: Rows = {"16 bits": _near(exact, exact, sample), "NF4": before | {"of NF4's KL, %": 100.0}}
    for rank in RANKS:
        desk.show(at, f"LoftQ of rank {rank}")
        attach(host.model, host.sites, [Part("loftq", LINEAR, LoRAConfig(rank, float(rank)))], origin=host.origin)
        shares = []
        for site, patch in patches(host.model, "default").items():
            assert isinstance(patch, LoRA)
            was, error = _error(host, site)
            a, b = (t.double() for t in patch.factors())
            shares.append(float((error - b @ a).norm() / was.norm()))
        now = float(torch.tensor(shares).mean())
        weights[f"LoftQ, rank {rank}"] = {
            "relative error, %": 100 * now,
            "of NF4's, %": 100 * now / float(relative),
            "parameters of the patch, % of the weights'": _added(host, sites),
        }
        after = _near(sample.logs(host.model), exact, sample)
        outputs[f"LoftQ, rank {rank}"] = after | {
            "of NF4's KL, %": 100 * after["KL to 16 bits"] / before["KL to 16 bits"]
        }
        detach(host.model, "default")
    return weights, outputs


def _added(host: Host, sites: Sequence[Site]) -> float:
    added = sum(p.numel() for patch in patches(host.model, "default").values() for p in patch.parameters())
    return 100 * added / sum(site.shape[0] * site.shape[1] for site in sites)


def slopes(host: Host, sample: Sample) -> Rows:
    """Norm of the patches' gradient at step 0, over the model in 4 bits, and how far a new patch moves an output."""
    rows: Rows = {}
    with torch.no_grad():
        bare = sample.logs(host.model)
    for method in ("lora", "pissa"):
        attach(host.model, host.sites, [Part(method, LINEAR, LoRAConfig(8, 8.0))])
        logs = sample.logs(host.model)
        moved = float((logs.detach() - bare).abs().max())
        F.nll_loss(logs, sample.tokens).backward()
        made = patches(host.model, "default").values()
        norms = [float(torch.stack([getattr(patch, name).grad.norm() for patch in made]).norm()) for name in "AB"]
        rows[{"lora": "LoRA", "pissa": "PiSSA"}[method]] = {
            "of A": norms[0],
            "of B": norms[1],
            "of both": (norms[0] ** 2 + norms[1] ** 2) ** 0.5,
            "largest change of an output at step 0": moved,
        }
        detach(host.model, "default")
    return rows


def measure(desk: Desk) -> Found:
    """Both models, or mini-1 alone."""
    names = {MINI: MINI} | ({SMOL: str(desk.folders["smol"])} if "smol" in desk.folders else {})
    rows: Rows = {}
    series: Series = {"ranks": GRID}
    bases = {}
    for i, (name, where) in enumerate(names.items()):
        at = i / len(names)
        desk.show(at, f"{name} in 16 bits")
        whole = open_base(where)
        sample = questions(whole) if name == MINI else sources(whole)
        with torch.no_grad():
            exact = sample.logs(whole.model)
        del whole
        host = open_base(where, four_bits=FORM, processor=False)
        bases[name] = host.fingerprint.weights
        held, curves = spectra(host, desk, at + 0.1 / len(names))
        weights, outputs = corrected(host, sample, exact, desk, at + 0.4 / len(names))
        parts = {"held": held, "weights": weights, "outputs": outputs}
        if name == MINI:
            parts["slope"] = slopes(host, sample)
        rows |= {f"{name} {part}: {row}": values for part, table in parts.items() for row, values in table.items()}
        rows[f"{name} size: all"] = {"layers in 4 bits": len(_sites(host)), "tokens of text": len(sample.tokens)}
        series |= {f"{name} {what}": values for what, values in curves.items()}
        largest = held[f"rank {RANKS[-1]}"]
        rows[f"ratio: {name}"] = {
            "error over noise": float(largest["of its error, %"]) / float(largest["of white noise, %"])
        }
    slope = {name: float(rows[f"{MINI} slope: {name}"]["of both"]) for name in ("PiSSA", "LoRA")}
    rows["ratio: PiSSA over LoRA"] = {"gradient at step 0": slope["PiSSA"] / slope["LoRA"]}
    return Found(rows, series, bases)


def draw(found: Found, figure: Figure) -> None:
    """What is left of weights and errors against the rank, and how near the outputs come."""
    name = SMOL if f"{SMOL} weight" in found.series else MINI
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    _curves(left, found, name)
    labels = ["NF4", *(f"LoftQ, rank {rank}" for rank in RANKS)]
    values = [float(found.rows[f"{name} outputs: {label}"]["KL to 16 bits"]) for label in labels]
    right.bar(range(len(labels)), values, 0.6, color=[COLOURS[1], *[COLOURS[0]] * len(RANKS)])
    right.set_xticks(range(len(labels)), ["NF4", *(f"rank {rank}" for rank in RANKS)])
    for i, value in enumerate(values):
        right.text(i, value, f"{value:.3g}", ha="center", va="bottom", fontsize=8)
    right.set_title(f"{name}: KL of the next token to the 16-bit model, nats")


def _curves(axes: Axes, found: Found, name: str) -> None:
    looks = {"weight": ("the weight", COLOURS[2]), "error": ("its error in NF4", COLOURS[0]), "noise": ("noise", GREY)}
    for what, (label, colour) in looks.items():
        values = [100 * v for v in found.series[f"{name} {what}"]]
        axes.plot(found.series["ranks"], values, "o-", ms=3, lw=1.2, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(GRID, [str(rank) for rank in GRID])
    axes.set_ylim(0, 102)
    axes.set_xlabel("rank")
    axes.set_title(f"{name}: squared norm that a product of this rank does not hold, %")
    axes.legend(frameon=False)


TEXT: Final = """
A LoRA starts from nothing: B is zero. Two papers start it from something, at the same sites and of the same shape.
**PiSSA** (arXiv:2404.02948) starts from the principal part of W, so that what is trained is where W is largest.
**LoftQ** (arXiv:2310.08659) starts from the error of the quantisation, so that training begins nearer to the 16-bit
model. In their papers both also change the base's bytes. Here they do not: PiSSA trains W + B A - B0 A0, and LoftQ
makes its first step alone, for the 4 bits that are there. A base then carries many adapters, whatever each of them
started from.

## What a rank can hold

The share of the squared norm that the best product of a rank holds, a mean over the linear layers of the language
model in NF4 with double quantisation:

{% if "smol" not in lacking %}
{{ table("SmolLM2 held", "SmolLM2") }}
{% endif %}
{{ table("mini-1 held", "mini-1") }}
White noise has no direction that is better than another; what is above it is structure. A weight has some, the
principal part that PiSSA starts from. Its error in 4 bits has less: the rounding of one number says little of the next.
{% if "smol" not in lacking %}
At rank 64 a product holds {{ value("ratio: SmolLM2", "error over noise", ".2f") }} times as much of SmolLM2's error
as of noise.
{% endif %}
So most of what LoftQ takes away is what any matrix of that shape would give up to so many parameters.

## What is left of the error

The norm of W - (Q + B A) over that of W, a mean over the layers; after LoftQ it is the tail of the error's singular
values, less is impossible at this rank (Eckart-Young):

{% if "smol" not in lacking %}
{{ table("SmolLM2 weights", "SmolLM2") }}
{% endif %}
{{ table("mini-1 weights", "mini-1") }}
## How near the outputs come

Loss, and the mean divergence of the next token's probabilities from the 16-bit model's, in nats.
{% if "smol" not in lacking %}
SmolLM2 reads {{ value("SmolLM2 size: all", "tokens of text") }} tokens of Tarsia's own sources:

{{ table("SmolLM2 outputs", "SmolLM2") }}
{% endif %}
mini-1 answers questions of its own kind, {{ value("mini-1 size: all", "tokens of text") }} tokens of answers:

{{ table("mini-1 outputs", "mini-1") }}
The divergence falls faster than the error of the weights.
{% if "smol" not in lacking %}
The loss is a noisier measure on so little text: from {{ value("SmolLM2 outputs: NF4", "loss", ".3f") }} in NF4 to
{{ value("SmolLM2 outputs: LoftQ, rank 8", "loss", ".3f") }} at rank 8 and
{{ value("SmolLM2 outputs: LoftQ, rank 64", "loss", ".3f") }} at rank 64, where 16 bits have
{{ value("SmolLM2 outputs: 16 bits", "loss", ".3f") }}.
{% endif %}

## What a gradient finds at step 0

Rank 8, scale 1, over mini-1 in 4 bits, the norm over all patches:

{{ table("mini-1 slope", "mini-1") }}
LoRA's A has no gradient, for B is zero. Both of PiSSA's factors learn from the first step on, and together they have
{{ value("ratio: PiSSA over LoRA", "gradient at step 0", ".1f") }} times the gradient of LoRA's. That is the effect of a
larger step too: it says nothing of where training ends.

{% if "smol" not in lacking %}
Small print: SmolLM2's weights come from a GGUF file of 5 bits a weight (Q4_1), the form in which they could be had
offline. What is called 16 bits here was rounded before, on another grid.
{% endif %}
mini-1 is small: rank 64 is a large part of its layers.
"""

CHAPTER: Final = Chapter(
    name="starts",
    title="What a low-rank patch can start from",
    question="How much of the 4-bit error does LoftQ take away, and what does PiSSA's start change?",
    claim=(
        "LoftQ of rank 8 takes 3 to 6 % of NF4's error off SmolLM2's weights and at least 4 % of the divergence off "
        "its outputs, of rank 64 at least 20 and 25 %, which is at most 1.3 times what noise would give; on mini-1, "
        "whose layers are small, rank 8 takes at least 7 and 10 %; PiSSA's first gradient is at least 3 times LoRA's, "
        "and a new PiSSA changes no output."
    ),
    bounds=(
        Bound("SmolLM2's error, rank 8, % of NF4's", "SmolLM2 weights: LoftQ, rank 8", "of NF4's, %", 94, 97, "smol"),
        Bound("SmolLM2's error, rank 64", "SmolLM2 weights: LoftQ, rank 64", "of NF4's, %", high=80, uses="smol"),
        Bound("SmolLM2's KL, rank 8, % of NF4's", "SmolLM2 outputs: LoftQ, rank 8", "of NF4's KL, %", 0, 96, "smol"),
        Bound("SmolLM2's KL, rank 64", "SmolLM2 outputs: LoftQ, rank 64", "of NF4's KL, %", high=75, uses="smol"),
        Bound("held of SmolLM2's error over noise", "ratio: SmolLM2", "error over noise", 1, 1.3, "smol"),
        Bound("mini-1's error, rank 8, % of NF4's", "mini-1 weights: LoftQ, rank 8", "of NF4's, %", high=93),
        Bound("mini-1's KL, rank 8, % of NF4's", "mini-1 outputs: LoftQ, rank 8", "of NF4's KL, %", high=90),
        Bound("PiSSA's gradient over LoRA's", "ratio: PiSSA over LoRA", "gradient at step 0", 3),
        Bound("a new PiSSA's change", "mini-1 slope: PiSSA", "largest change of an output at step 0", 0, 0),
    ),
    measure=measure,
    draw=draw,
    picture="what a product of a rank does not hold of a weight, its 4-bit error and noise; KL to the 16-bit model",
    text=TEXT,
    order=40,
    minutes=4.0,
    size=(12.0, 4.0),
    uses=("smol",),
)  # fmt: skip
