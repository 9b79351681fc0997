"""Bits a parameter, counted in the bytes that are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import safetensors.torch
import torch

from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.quant.codec import BLOCK, NESTED_BLOCK, Quantised, Scheme, encode
from tarsia.quant.state import to_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE: Final = BLOCK * NESTED_BLOCK
"""Numbers that one nested scale covers: a tensor of a multiple of these wastes nothing."""
SIZES: Final = tuple(
    sorted({1, 63, *(2**k for k in range(6, 23)), *(2**k + 1 for k in range(6, 23)), *(3 * 2**k for k in range(5, 21))})
)
PLAIN: Final = Scheme("nf4", nested=False)
NESTED: Final = Scheme("nf4", nested=True)
_GIGA: Final = 1e9

LAYERS: Final = 80
WIDTH: Final = 8192
HIDDEN: Final = 22016
VOCABULARY: Final = 32000
"""LLaMA-65B's shape (arXiv:2302.13971, table 2; the hidden size is that of its published weights)."""


def stored(value: Quantised, *fields: str) -> int:
    """Bits of the tensors of these fields."""
    return sum(8 * t.numel() * t.element_size() for name, t in value.tensors.items() if name in fields)


def measure(desk: Desk) -> Found:
    """Quantise tensors of many sizes and count their bytes."""
    generator = torch.Generator().manual_seed(0)
    series: dict[str, list[float]] = {"sizes": list(SIZES), "plain": [], "nested": []}
    for i, size in enumerate(SIZES):
        desk.show(i / (1 + len(SIZES)), f"a tensor of {size:,} numbers")
        weight = torch.randn(size, generator=generator)
        for name, scheme in (("plain", PLAIN), ("nested", NESTED)):
            value = encode(weight, scheme)
            series[name].append(stored(value, *value.tensors) / size)
    desk.show(0.95, "one whole tensor, part by part")
    rows = _parts() | _saved() | _model() | _files()
    rows |= {f"size: {size:,}": _at(series, size) for size in (1, 64, 4096, WHOLE, WHOLE + 1, 2**22)}
    return Found(rows, series)


def _at(series: dict[str, list[float]], size: int) -> dict[str, Cell]:
    place = SIZES.index(size)
    return {"plain": series["plain"][place], "nested": series["nested"][place]}


def _parts() -> dict[str, Mapping[str, Cell]]:
    """Bits a parameter of 2^20 numbers, by what they hold."""
    size = 64 * WHOLE
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1))
    plain, nested = encode(weight, PLAIN), encode(weight, NESTED)
    fields = {"codes": "codes", "scales": "scales", "nested scales": "nested_scales"}
    rows: dict[str, Mapping[str, Cell]] = {
        f"part: {name}": {"plain": stored(plain, field) / size, "nested": stored(nested, field) / size}
        for name, field in fields.items()
    }
    rows["part: all three"] = {
        "plain": stored(plain, *fields.values()) / size,
        "nested": stored(nested, *fields.values()) / size,
    }
    rows["offset: of a tensor"] = {"bits": stored(nested, "offset")}
    return rows


def _saved() -> dict[str, Mapping[str, Cell]]:
    """What nesting saves a parameter, from the bytes, and what that is for 65 billion."""
    part = _parts()["part: all three"]
    plain, nested = float(part["plain"]), float(part["nested"])
    each = plain - nested
    return {
        "saved: a parameter": {"bits": each, "of the 0.5 bit of scales, %": 100 * each / (plain - 4)},
        "saved: 65 billion parameters": {"gigabytes": each * 65e9 / 8 / _GIGA},
    }


def _model() -> dict[str, Mapping[str, Cell]]:
    """LLaMA-65B from its shapes: linear layers in 4 bits, embeddings and head in 16."""
    part = _parts()["part: all three"]
    linear = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN)
    rest = 2 * VOCABULARY * WIDTH
    whole = {"16 bits": 16.0, "NF4": float(part["plain"]), "NF4, nested": float(part["nested"])}
    rows: dict[str, Mapping[str, Cell]] = {
        f"model: {name}": {
            "bits a linear parameter": bits,
            "linear layers, GB": linear * bits / 8 / _GIGA,
            "with embeddings and head, GB": (linear * bits + rest * 16) / 8 / _GIGA,
        }
        for name, bits in whole.items()
    }
    return rows | {"shape: LLaMA-65B": {"linear parameters": linear, "embeddings and head": rest}}


def _files() -> dict[str, Mapping[str, Cell]]:
    """One weight as a file of its own, under bitsandbytes' names: what it holds besides codes and scales."""
    rows: dict[str, Mapping[str, Cell]] = {}
    for side in (192, 576, 1024, 2048):
        value = encode(torch.randn(side, side, generator=torch.Generator().manual_seed(2)), NESTED)
        parts = to_tensors("model.layers.0.mlp.up_proj.weight", value)
        whole = 8 * len(safetensors.torch.save(parts))
        needed = stored(value, "codes", "scales", "nested_scales")
        rows[f"file: {side:,} x {side:,}"] = {
            "bits a parameter": whole / side**2,
            "besides codes and scales, bytes": (whole - needed) // 8,
        }
    return rows


def draw(found: Found, figure: Figure) -> None:
    """Bits against the tensor's size, and what they are made of."""
    curve, bars = figure.subplots(1, 2, width_ratios=(1.7, 1))
    for name, colour in (("plain", COLOURS[1]), ("nested", COLOURS[0])):
        curve.plot(found.series["sizes"], found.series[name], color=colour, lw=1.2, label=name)
    for bits in (4.5, 4.126953125):
        curve.axhline(bits, color=GREY, lw=0.8, ls=":")
    curve.set_xscale("log", base=2)
    curve.set_xlim(2**5, 2**22)
    curve.set_ylim(3.9, 5.6)
    curve.set_xlabel("numbers in the tensor")
    curve.set_title("bits a parameter")
    curve.legend(frameon=False)
    bottom = {"plain": 0.0, "nested": 0.0}
    for part, colour in (("scales", COLOURS[1]), ("nested scales", COLOURS[3])):
        row = found.rows[f"part: {part}"]
        heights = [float(row[name]) for name in bottom]
        bars.bar(list(bottom), heights, 0.5, bottom=list(bottom.values()), color=colour, label=part)
        bottom = {name: below + height for (name, below), height in zip(bottom.items(), heights, strict=True)}
    for i, total in enumerate(bottom.values()):
        bars.text(i, total + 0.008, f"{total:.5f}", ha="center", fontsize=9)
    bars.set_ylim(0, 0.58)
    bars.set_title("bits a parameter besides the 4 of its code")
    bars.legend(frameon=False)


TEXT: Final = """
*Plain* keeps a float32 scale for each block of 64 numbers: 4 + 32/64 bits. *Nested* (double quantisation,
arXiv:2305.14314, section 3) takes the mean off the scales and rounds them to 8 bits, with a float32 scale for 256 of
them: 4 + 8/64 + 32/(64 x 256). Counted in the bytes of a tensor of 2^20 numbers:

{{ table("part", "bits a parameter") }}
A tensor also keeps the mean of its scales, {{ value("offset: of a tensor", "bits") }} bits whatever its size. Small
tensors and odd sizes pay for what they do not fill, in bits a parameter:

{{ table("size", "numbers") }}
In a file each weight brings along its tables of levels (16 + 256 numbers of float32), a note in JSON and its names, as
bitsandbytes writes them: {{ value("file: 2,048 x 2,048", "besides codes and scales, bytes", ",") }} bytes beside a
weight of 2,048 x 2,048. Files of one weight each:

{{ table("file", "weight") }}
## What nesting saves

It saves {{ value("saved: a parameter", "bits", ".3f") }} bits a parameter, which is
{{ value("saved: a parameter", "of the 0.5 bit of scales, %", ".1f") }} % of what the scales took. For 65 billion
parameters that is {{ value("saved: 65 billion parameters", "gigabytes", ".2f") }} GB. It is sometimes said to be
0.5 GB: half a *bit* a parameter is what scales cost before, and not all of it is saved.

LLaMA-65B from its shapes: {{ value("shape: LLaMA-65B", "linear parameters", ",") }} parameters in linear layers,
{{ value("shape: LLaMA-65B", "embeddings and head", ",") }} in embeddings and head, which stay in 16 bits. Weights
alone, 1 GB = 10^9 bytes:

{{ table("model") }}
"""

CHAPTER: Final = Chapter(
    name="bits",
    title="Bits a parameter",
    question="What does a 4-bit weight really take, and what does double quantisation save?",
    claim=(
        "In tensors of a multiple of 16,384 numbers a parameter takes 4.5 bits, and 4.12695 with double quantisation, "
        "which at 65 billion parameters saves 3.03 GB (0.373 bits each); a file adds at most 4 kB a weight."
    ),
    bounds=(
        Bound("bits, float32 scales", "part: all three", "plain", 4.5, 4.5),
        Bound("bits, nested scales", "part: all three", "nested", 4.126953125, 4.126953125),
        Bound("bits saved", "saved: a parameter", "bits", 0.373046875, 0.373046875),
        Bound("a weight's bytes in a file besides", "file: 2,048 x 2,048", "besides codes and scales, bytes", 4, 4096),
        Bound("GB saved at 65 billion", "saved: 65 billion parameters", "gigabytes", 3.0, 3.06),
    ),
    measure=measure,
    draw=draw,
    picture="bits a parameter against the tensor's size, plain and nested; the scales' share of them",
    text=TEXT,
    order=30,
    minutes=0.2,
    size=(11, 3.8),
)  # fmt: skip
