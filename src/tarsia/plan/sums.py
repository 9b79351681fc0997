"""Sums of memory from assumptions: training whole, QLoRA, what double quantisation saves, ten tasks.

Activations are those of text; a picture's tokens are counted by a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from tarsia.plan.assumptions import Assumptions
from tarsia.plan.figure import GIGA, Figure, Line, Said
from tarsia.plan.geometry import BYTES, block, inside, lora, loss, passing, quantised

WEIGHTS, GRADIENTS, MASTER, FIRST, SECOND = "weights", "gradients", "master copy", "first moment", "second moment"
CODES, CONSTANTS, REST, ADAPTERS = "4-bit codes", "constants", "16-bit rest", "adapters"
ACTIVATIONS, PEAK, ONCE = "activations", "at the peak", "not at once"
FP32: Final[Mapping[str, Any]] = {"weights": "float32", "gradients": "float32", "master": None, "moments": "float32"}
"""Everything in float32: no further master copy."""
JOBS: Final = 10
"""Tasks that are each a model, or each an adapter."""
NESTED, PLAIN = 1 / 64 + 4 / (64 * 256), 4 / 64
TYPES: Final = ("weights", "gradients", "master", "moments")
STEP: Final = ("batch", "length", "checkpointing", "accumulation")
_QLORA: Final = ("shapes", "rank", "patches", "moments", "nested", *STEP, "unpacked")


def training(a: Assumptions, *without: str) -> tuple[Line, ...]:
    """Weights, gradients, master copy and Adam's two moments of every parameter, but for those named in ``without``."""
    held = {WEIGHTS: a.weights, GRADIENTS: a.gradients, MASTER: a.master, FIRST: a.moments, SECOND: a.moments}
    return tuple(tensor(w, a.parameters, dtype) for w, dtype in held.items() if dtype is not None and w not in without)


def kept(a: Assumptions, *, full: bool) -> tuple[Line, Line]:
    """Activations: what all blocks keep, and what the highest moment of a pass adds to it.

    ``full``: every weight is trained. That moment is the loss, or a block on the way back: gone through again with
    checkpointing, and beside one weight in 16 bits where they are held in 4 (and no kernel multiplies with those).
    """
    d, tokens, width = a.decoder, a.batch * a.length, BYTES[a.weights]
    held = inside(d, a.batch, a.length, width, full=full, checkpointing=a.checkpointing)
    what = "inputs of" if a.checkpointing else "all of"
    how = f"{what} {d.layers} blocks, {a.batch} x {a.length:,} tokens, {width} bytes a number"
    most = max(loss(d, tokens, width, full), _again(a, full))
    return Line(ACTIVATIONS, how, held), Line(PEAK, "the larger of the loss and one block on the way back", most)


def _again(a: Assumptions, full: bool) -> int:
    d, tokens, width = a.decoder, a.batch * a.length, BYTES[a.weights]
    wide = 0 if full or not a.unpacked else 2 * max(out * into for out, into in d.weights.values())
    return passing(d, tokens, width) + wide + (block(d, tokens, width, full) if a.checkpointing else 0)


def turns(a: Assumptions, gradients: int) -> int:
    """Bytes by which a single pass stays below its sum: a block's activations go as its ``gradients`` come.

    The highest of three moments: the loss, the last block's way back (no gradient yet), the first one's (all others).
    """
    activations, most = kept(a, full=False)
    blocks, again = a.decoder.layers, _again(a, False)
    first = (activations.bytes + (blocks - 1) * gradients) // blocks
    highest = max(activations.bytes + most.bytes, first + again)
    return activations.bytes + most.bytes + gradients - highest


def patched(a: Assumptions) -> tuple[Line, ...]:
    """Adapters of ``a.rank`` over every linear layer of the blocks, their gradients and Adam's moments."""
    numbers = lora(a.decoder, a.rank)
    named = ((ADAPTERS, a.patches), (GRADIENTS, a.patches), (FIRST, a.moments), (SECOND, a.moments))
    return tuple(tensor(what, numbers, dtype) for what, dtype in named)


def qlora(a: Assumptions) -> tuple[Line, ...]:
    """All that a QLoRA of ``a.shapes`` holds: blocks in 4 bits, the rest in 16, adapters, activations."""
    d = a.decoder
    codes, scales = quantised(d, a.nested)
    rest = a.geometry.parameters - d.linear
    a = replace(a, weights="bfloat16")
    trained, gradients = patched(a), next(line for line in patched(a) if line.what == GRADIENTS)
    once = Line(ONCE, "blocks let go as gradients come, in a step of one pass", -turns(a, gradients.bytes))
    return (
        Line(CODES, f"{number(d.linear)} in the blocks' linear layers x 1/2 byte", codes),
        Line(CONSTANTS, f"{number(d.linear)} x {_scales(a.nested)} bytes", scales),
        Line(REST, f"{number(rest)} in embedding, head, norms (and tower) x 2 bytes", 2 * rest),
        *trained,
        *kept(a, full=False),
        *((once,) if a.accumulation == 1 else ()),
    )


def fine(name: str, a: Assumptions, said: tuple[Said, ...] = (), text: str = "", note: str = "") -> Figure:
    """A QLoRA as a figure."""
    formula = "N (1/2 + s) + 2 R + L (2 p + 2 m) + activations, N in blocks, R the rest, L = layers x r x sum(out + in)"
    return Figure(name, text, a.words(*_QLORA), formula, qlora(a), said, note)


def saving(name: str, parameters: int, said: tuple[Said, ...] = (), text: str = "", note: str = "") -> Figure:
    """What double quantisation saves ``parameters``."""
    lines = (
        Line("constants in float32", f"{number(parameters)} x {_scales(False)} bytes", round(parameters * PLAIN)),
        Line("constants nested", f"-{number(parameters)} x {_scales(True)} bytes", -round(parameters * NESTED)),
    )
    formula = "P x (32/64 - 8/64 - 32/(64 x 256)) / 8"
    return Figure(name, text, {"parameters": f"{parameters:,}", "block": "64, nested 256"}, formula, lines, said, note)


def checkpoints(name: str, a: Assumptions, said: tuple[Said, ...] = (), text: str = "", note: str = "") -> Figure:
    """A whole model for every task."""
    held = JOBS * a.parameters * BYTES[a.weights]
    line = Line(
        f"{JOBS} checkpoints", f"{JOBS} x {number(a.parameters)} x {BYTES[a.weights]} bytes ({a.weights})", held
    )
    return Figure(name, text, a.words("parameters", "weights"), "10 P w", (line,), said, note)


def adapters(name: str, a: Assumptions, note: str = "") -> Figure:
    """One model, and an adapter for every task."""
    numbers, width = lora(a.decoder, a.rank), BYTES[a.patches]
    how = f"{JOBS} x {number(numbers)} (rank {a.rank}) x {width} bytes ({a.patches})"
    lines = (tensor("the base, once", a.parameters, a.weights), Line(f"{JOBS} adapters", how, JOBS * numbers * width))
    assumed = a.words("parameters", "shapes", "weights", "rank", "patches")
    return Figure(name, "", assumed, "P w + 10 L p, L = layers x r x sum(out + in)", lines, (), note)


def tensor(what: str, parameters: int, dtype: str) -> Line:
    """``parameters`` numbers of ``dtype``."""
    return Line(what, f"{number(parameters)} x {BYTES[dtype]} bytes ({dtype})", parameters * BYTES[dtype])


def four_bits(a: Assumptions) -> tuple[Line, ...]:
    """Every parameter in 4 bits with its constants."""
    return (
        Line(CODES, f"{number(a.parameters)} x 1/2 byte", -(-a.parameters // 2)),
        Line(
            CONSTANTS,
            f"{number(a.parameters)} x {_scales(a.nested)} bytes",
            round(a.parameters * (NESTED if a.nested else PLAIN)),
        ),
    )


def _scales(nested: bool) -> str:
    return "(1/64 + 4/(64 x 256))" if nested else "4/64"


def number(parameters: int) -> str:
    """A count in four digits: "64.76e9", "799.5e6"."""
    return f"{parameters / GIGA:.4g}e9" if parameters >= GIGA else f"{parameters / 10**6:.4g}e6"
