"""The memory wall as numbers: what the texts print, from their assumptions, line by line, and whether it holds.

Nothing is typed beside its sum: a printed number is judged against the lines (``Said``), and the notes are computed.
"""

from __future__ import annotations

from dataclasses import replace

from tarsia.plan.assumptions import Assumptions, assume
from tarsia.plan.figure import GIGA, Figure, Relation, Said
from tarsia.plan.geometry import MODELS, quantised
from tarsia.plan.sums import (
    FIRST,
    FP32,
    GRADIENTS,
    JOBS,
    MASTER,
    NESTED,
    PLAIN,
    SECOND,
    STEP,
    TYPES,
    WEIGHTS,
    adapters,
    checkpoints,
    fine,
    four_bits,
    kept,
    number,
    saving,
    tensor,
    training,
)


def rows(own: Assumptions | None = None) -> tuple[Figure, ...]:
    """The texts' figures; given assumptions of one's own, the same sums from those, which no text has printed."""
    return texts() if own is None else of(own)


def texts() -> tuple[Figure, ...]:
    """Every figure of the texts (and the two of the QLoRA paper that stand behind them), in their order."""
    return (*_whole(), *_fourteen(), *_seventy(), *_qloras(), *_ten())


def of(a: Assumptions) -> tuple[Figure, ...]:
    """The sums from ``a``. Without shapes, 4 bits are those of all parameters; no adapters, and a note that says so."""
    known = isinstance(a.shapes, str) and a.geometry.parameters == a.parameters
    name = str(a.shapes) if known else f"{number(a.parameters)} parameters"
    single = replace(a, **FP32)
    alone = (tensor(WEIGHTS, a.parameters, a.weights),)
    figures = [
        Figure(f"{name}: trained whole", "", a.words("parameters", *TYPES), "P x (w + g + m + 2 s)", training(a)),
        Figure(f"{name}: in float32", "", single.words("parameters", *TYPES), "P x (4 + 4 + 2 x 4)", training(single)),
        Figure(f"{name}: weights alone", "", a.words("parameters", "weights"), "P x w", alone),
        saving(f"{name}: double quantisation", a.parameters),
        checkpoints(f"{name}: {JOBS} checkpoints", a),
    ]
    if a.shapes is None:
        why = f"Adapters and activations need shapes: name a model ({', '.join(MODELS)})."
        return (
            *figures,
            Figure(f"{name}: in 4 bits", "", a.words("parameters", "nested"), "P x (1/2 + s)", four_bits(a), (), why),
        )
    return (*figures, adapters(f"{name}: {JOBS} adapters", a), fine(f"{name}: QLoRA", a))


def _whole() -> tuple[Figure, ...]:
    """7B trained whole, in mixed precision and in float32; 70B ten times as much."""
    mixed, single = assume("7B"), assume("7B", **FP32)
    states, adam = (MASTER, FIRST, SECOND), (FIRST, SECOND)
    real = MODELS["LLaMA-2-7B"].parameters
    parts = (Said(14, of=(WEIGHTS,)), Said(14, of=(GRADIENTS,)), Said(84, of=states))
    thirds = (Said(28, of=(WEIGHTS,)), Said(28, of=(GRADIENTS,)), Said(56, of=adam))
    per = sum(line.bytes for line in training(mixed)) // mixed.parameters
    return (
        Figure(
            "7B, mixed precision",
            '14 + 14 + 84 = 112 GB, over an 80 GB card; "four copies of every parameter"',
            mixed.words("parameters", *TYPES),
            "P x (2 + 2 + 4 + 2 x 4)",
            training(mixed),
            (*parts, Said(112), Said(80, Relation.OVER)),
            f"Loose: {len(training(mixed))} tensors, not four, the 84 GB being three of them; no activations. "
            f"LLaMA-2-7B has {number(real)} parameters: {per * real / GIGA:.1f} GB.",
        ),
        Figure(
            "7B, float32",
            '28 GB of weights, 56 of Adam\'s states, 28 of gradients: over 80 GB; with activations "past 100 GB"',
            single.words("parameters", *TYPES),
            "P x (4 + 4 + 2 x 4)",
            training(single),
            (*thirds, Said(80, Relation.OVER), Said(100, Relation.OVER)),
            f"Loose: the sum is past 100 GB before any activation. Mixed precision saves none of it: "
            f"{per} bytes a parameter either way, what weights and gradients save going to the master copy.",
        ),
        Figure(
            "70B, mixed precision",
            "ten times worse",
            assume("70B").words("parameters", *TYPES),
            "P x (2 + 2 + 4 + 2 x 4)",
            training(assume("70B")),
            (Said(1120),),
            f"LLaMA-2-70B has {number(MODELS['LLaMA-2-70B'].parameters)} parameters.",
        ),
    )


def _fourteen() -> tuple[Figure, ...]:
    """14B in float32, without and with what a step adds."""
    a = assume("14B", length=2048, checkpointing=False, **FP32)
    model = f"The nearest model's shapes, {a.shapes} ({number(a.geometry.parameters)} parameters)"
    parts = (Said(56, of=(WEIGHTS,)), Said(112, of=(FIRST, SECOND)))
    fewer = sum(line.bytes for line in kept(replace(a, checkpointing=True), full=True)) / GIGA
    return (
        Figure(
            "14B, weights and Adam in float32",
            "56 + 112 = 168 GB",
            a.words("parameters", "weights", "moments"),
            "P x (4 + 2 x 4)",
            training(a, GRADIENTS),
            (*parts, Said(168)),
        ),
        Figure(
            "14B, a step in float32",
            'with gradients (56 GB) and activations "well past 224 GB"',
            a.words("parameters", *TYPES, "shapes", *STEP),
            "P x (4 + 4 + 2 x 4) + activations",
            (*training(a), *kept(a, full=True)),
            (Said(56, of=(GRADIENTS,)), Said(224, Relation.OVER)),
            f"Loose: gradients make it 224 GB, no more; what goes past it are activations, which depend on what is "
            f"assumed. {model}; with checkpointing they are {fewer:.1f} GB. In a step of one pass they go as gradients "
            f"come, and are not on top of all of those.",
        ),
    )


def _seventy() -> tuple[Figure, ...]:
    """The base alone in 16 bits, and the QLoRA paper's full training of 65B."""
    a = assume("70B")
    real = MODELS["LLaMA-2-70B"]
    four = (sum(quantised(real.decoder, True)) + 2 * (real.parameters - real.decoder.linear)) / GIGA
    paper = assume("LLaMA-65B", master=None)
    master = 4 * paper.parameters / GIGA
    return (
        Figure(
            "70B in bfloat16",
            "140 GB for the base alone",
            a.words("parameters", "weights"),
            "2 P",
            (tensor(WEIGHTS, a.parameters, "bfloat16"),),
            (Said(140),),
            f"LLaMA-2-70B has {number(real.parameters)} parameters: {2 * real.parameters / GIGA:.1f} GB, "
            f"{four:.1f} GB with its blocks in 4 bits.",
        ),
        Figure(
            "65B, full 16-bit training",
            "more than 780 GB",
            paper.words("parameters", *TYPES),
            "P x (2 + 2 + 2 x 4)",
            training(paper),
            (Said(780, Relation.OVER),),
            f"Loose beside the texts' 7B: no master copy is counted, which would add {master:.0f} GB.",
            "arXiv:2305.14314, section 1",
        ),
    )


def _qloras() -> tuple[Figure, ...]:
    """65B and 70B on a card of 48 GB: what it takes, and what it does not survive."""
    said = (Said(48, Relation.UNDER),)
    text = "65B to 70B models on a single 48 GB GPU"
    a = assume("LLaMA-65B")
    card = (
        f"Judged at 48 x 10^9 bytes; a card sold as 48 GB has 48 GiB, {48 * 2**30 / GIGA:.1f} GB, less what CUDA takes."
    )
    changed: tuple[tuple[str, Assumptions], ...] = (
        ("adapters in float32", replace(a, patches="float32")),
        ("adapters of rank 16 in float32", replace(a, patches="float32", rank=16)),
        ("constants in float32", replace(a, nested=False)),
        ("without checkpointing", replace(a, checkpointing=False)),
        ("4 rows of 528 tokens", replace(a, batch=4, length=528, accumulation=4)),
        ("16 rows a batch", replace(a, batch=16, accumulation=1)),
    )
    large = assume("Qwen2.5-VL-72B")
    few = fine("", replace(large, rank=16)).gigabytes
    over = (
        f"Over 48 GB before any picture, by its vocabulary and tower in 16 bits; {few:.1f} GB with adapters of rank 16."
    )
    first = fine("", a).gigabytes
    theirs = " The rows of the authors' script (artidoro/qlora, scripts/finetune_guanaco_65b.sh), all of full length."

    def against(other: Assumptions) -> str:
        more = f"{fine('', other).gigabytes - first:+.2f} GB beside the 65B QLoRA above."
        return more + theirs if other.length == 528 else more

    bits = 8 * (PLAIN - NESTED)
    dq = f"The bits are {8 * PLAIN:g} a parameter before and {8 * NESTED:.3f} after, {bits:.3f} saved."
    return (
        fine("65B QLoRA", a, said, text, f"{card} The paper prints 45.0 GB in its figure of memory."),
        *(fine(f"65B QLoRA, {what}", other, said, text, against(other)) for what, other in changed),
        fine("70B QLoRA", assume("LLaMA-2-70B"), said, text),
        fine("72B VLM, QLoRA", large, (), "", over),
        saving(
            "65B, double quantisation", 65 * GIGA, (Said(0.5, decimals=1),), "an additional 0.5 GB per 65B model", dq
        ),
    )


def _ten() -> tuple[Figure, ...]:
    """Ten tasks: ten models, or one model and ten adapters."""
    a = assume("7B", weights="float32")
    b = assume("LLaMA-2-7B", weights="float32", rank=16, patches="float32")
    one = adapters(f"7B, {JOBS} adapters", b)
    each = checkpoints("", b)
    note = f"{each.bytes / one.bytes:.1f} times less than {JOBS} checkpoints of the same model; a switch reads "
    note += f"{one.lines[1].bytes / JOBS / 10**6:.0f} MB in place of {each.bytes / JOBS / GIGA:.1f} GB."
    half = f"Loose: weights are published in 16 bits, {2 * b.parameters / GIGA:.1f} GB for LLaMA-2-7B."
    said = (Said(10 * 28),)
    return (
        checkpoints(f"7B, {JOBS} checkpoints", a, said, "10 distinct 28 GB checkpoints", half),
        replace(one, note=note),
    )
