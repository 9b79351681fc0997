"""The 4-bit operators on a GPU: first whether they are right, then how fast: ``python -m bench.gpu_quant``.

Right: every scheme and dtype unpacked on the GPU has the bits that the reference has on the processor; products are
those of the unpacked weight, rounded once. Nothing is written where one is not.

Fast: calls in a CUDA graph, so that the kernels are timed and not Python; weights rotate beyond the second cache; the
contestants take turns and ratios are medians over rounds. "eager us" is a call as Python makes it. Beside each time
stands the least that the GPU allows: the bytes that must move over the bandwidth of a copy, or the operations over the
rate of a large product, both measured here. Without a GPU this says so, writes nothing and ends with 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu_check import BATCHES, check
from bench.gpu_check import SHAPES as SHAPES_CHECKED
from bench.gpu_time import Call, Row, eager, least, limits, race, summary
from bench.run import RESULTS, record
from tarsia.quant import cuda
from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu.plan import Tiles
from tarsia.quant.levels import levels, scale_levels

SHAPES: Final = ((4096, 4096), (11008, 4096), (4096, 11008))
DEVICE = "cuda"
ROTATED: Final = 512 << 20
"""Bytes of weights that are used in turn: ten times the second cache of an H100."""

DTYPE: Final = torch.bfloat16


def packed_bytes(rows: int, columns: int) -> float:
    """Bytes of a weight with nested scales: 4.127 bits a number."""
    count = rows * columns
    return count / 2 + count / 64 + 4 * count / (64 * 256)


def product_limit(m: int, rows: int, columns: int, bandwidth: float, rate: float) -> float:
    """The fewest seconds for the product of m rows with a 4-bit weight [rows, columns]."""
    moved = packed_bytes(rows, columns) + 2 * m * (rows + columns)
    return least(moved, 2 * m * rows * columns, bandwidth, rate)


def weights(rows: int, columns: int) -> list[Packed4]:
    """Random weights with nested scales, as many as rotate beyond the cache."""
    count, chance = rows * columns, torch.Generator(DEVICE).manual_seed(0)

    def one() -> Packed4:
        codes, scales = (
            torch.randint(256, size, generator=chance, dtype=torch.uint8, device=DEVICE)
            for size in ((count // 2, 1), (count // 64,))
        )
        coarse = torch.rand(-(-count // 64 // 256), generator=chance, device=DEVICE) * 0.01
        offset = torch.tensor(0.05, device=DEVICE)
        return Packed4(codes, scales, coarse, offset, levels("nf4").to(DEVICE), 64, rows, columns)

    return [one() for _ in range(max(2, int(ROTATED / packed_bytes(rows, columns))))]


def dense(rows: int, columns: int) -> list[Tensor]:
    """Random weights in 16 bits, as many as rotate beyond the cache."""
    count = max(2, ROTATED // (2 * rows * columns))
    return [torch.randn(rows, columns, dtype=DTYPE, device=DEVICE) * 0.02 for _ in range(count)]


def theirs(weight: Packed4) -> Any:
    """The same weight for bitsandbytes."""
    QuantState = import_module("bitsandbytes.functional").QuantState
    fine = QuantState(absmax=weight.nested_scales, code=scale_levels().to(DEVICE), blocksize=256, dtype=torch.float32)
    return QuantState(
        absmax=weight.scales,
        shape=torch.Size((weight.rows, weight.columns)),
        code=weight.levels,
        blocksize=weight.block,
        quant_type="nf4",
        dtype=DTYPE,
        offset=weight.offset,
        state2=fine,
    )


def timed(found: Mapping[str, float], peer: bool) -> dict[str, Row]:
    """Unpacking, products there and back, and LoRA inside the product, for each shape."""
    values: dict[str, Row] = {}
    for rows, columns in SHAPES:
        packed, full = weights(rows, columns), dense(rows, columns)
        states = [theirs(w) for w in packed] if peer else []
        name = f"{rows}x{columns}"
        calls: dict[str, list[Call]] = {"ours": [partial(cuda.dequantise4, w, DTYPE) for w in packed]}
        if peer:
            unpack = import_module("bitsandbytes.functional").dequantize_4bit
            calls["bitsandbytes"] = [partial(unpack, w.codes, s) for w, s in zip(packed, states, strict=True)]
        moved = packed_bytes(rows, columns) + 2 * rows * columns
        values[f"unpack {name}"] = _row(calls, least(moved, 0, **found))
        for m in BATCHES:
            x, y = (torch.randn(m, width, dtype=DTYPE, device=DEVICE) for width in (columns, rows))
            calls = {
                "ours": [partial(cuda.linear4, x, w, None) for w in packed],
                "dense": [partial(F.linear, x, w) for w in full],
            }
            if peer:
                product = import_module("bitsandbytes").matmul_4bit
                calls["bitsandbytes"] = [partial(product, x, w.codes, s) for w, s in zip(packed, states, strict=True)]
            limit = product_limit(m, rows, columns, **found)
            values[f"{m} rows {name}"] = _row(calls, limit)
            back: dict[str, list[Call]] = {
                "ours": [partial(cuda.product4, y, w) for w in packed],
                "dense": [partial(torch.mm, y, w) for w in full],
            }
            values[f"{m} rows back {name}"] = _row(back, limit)
    return values


def _row(calls: Mapping[str, Sequence[Call]], limit: float) -> Row:
    return {**summary(race(calls), limit), "eager us": round(1e6 * eager(calls["ours"]), 2)}


def chosen(found: Mapping[str, float]) -> dict[str, Row]:
    """Whether ``plan`` chooses well: packed against unpacked, LoRA inside against behind, its tiles against others."""
    values: dict[str, Row] = {}
    for rows, columns in SHAPES:
        packed = weights(rows, columns)
        values |= _packed_or_not(packed, found) | _lora(packed, found) | _tiles(packed, found["bandwidth"])
    return values


def _packed_or_not(packed: Sequence[Packed4], found: Mapping[str, float]) -> dict[str, Row]:
    from tarsia.quant.gpu import batch, linear, plan

    rows, columns = packed[0].rows, packed[0].columns
    values = {}
    for m in (16, 32, 64, 128):
        x = torch.randn(m, columns, dtype=DTYPE, device=DEVICE)
        tiles = plan.forward(m, rows, columns // 64, 64, _processors())
        calls: dict[str, list[Call]] = {
            "packed": [partial(batch.forward, x, w, None, None, tiles) for w in packed],
            "unpacked": [partial(linear._many, x, w, None, None) for w in packed],
        }
        limit = product_limit(m, rows, columns, **found)
        values[f"choice of {m} rows {rows}x{columns}"] = summary(race(calls), limit)
    return values


def _lora(packed: Sequence[Packed4], found: Mapping[str, float]) -> dict[str, Row]:
    from tarsia.quant.gpu import linear
    from tarsia.quant.gpu.update import Update

    rows, columns = packed[0].rows, packed[0].columns
    x, up = torch.randn(16, columns, dtype=DTYPE, device=DEVICE), torch.randn(rows, 16, dtype=DTYPE, device=DEVICE)
    low = torch.randn(16, 16, dtype=DTYPE, device=DEVICE)

    def behind(weight: Packed4) -> Tensor:
        return linear.linear4(x, weight, None).addmm_(low, up.t(), alpha=2.0)

    calls: dict[str, list[Call]] = {
        "inside": [partial(linear.linear4, x, w, None, Update(low, up, 2.0)) for w in packed],
        "behind": [partial(behind, w) for w in packed],
    }
    return {f"LoRA, 16 rows {rows}x{columns}": summary(race(calls), product_limit(16, rows, columns, **found))}


def _tiles(packed: Sequence[Packed4], bandwidth: float) -> dict[str, Row]:
    from tarsia.quant.gpu import batch, decode, plan
    from tarsia.quant.gpu.vector import vector

    rows, columns = packed[0].rows, packed[0].columns
    x = torch.randn(16, columns, dtype=DTYPE, device=DEVICE)
    y = torch.randn(16, rows, dtype=DTYPE, device=DEVICE)
    shape = (rows, columns // 64, 64, _processors())
    one, some, back = plan.vector(*shape), plan.forward(16, *shape), plan.backward(16, *shape)
    kernels: dict[str, tuple[Tiles, Sequence[Tiles], Callable[[Tiles], list[Call]]]] = {
        "1 row": (
            one,
            candidates(one, (4, 8, 16), (8, 16, 32), (1,)),
            lambda tiles: [partial(vector, x[0], w, None, None, tiles) for w in packed],
        ),
        "16 rows": (
            some,
            candidates(some, (32, 64, 128), (2, 4), (2, 3, 4)),
            lambda tiles: [partial(batch.forward, x, w, None, None, tiles) for w in packed],
        ),
        "16 rows back": (
            back,
            candidates(back, (32, 64), (1, 2, 4), (2, 3, 4)),
            lambda tiles: [partial(batch.backward, y, w, None, tiles) for w in packed],
        ),
    }
    found = {f"tiles of {name} {rows}x{columns}": best(*kernel) for name, kernel in kernels.items()}
    numbers = (plan.NUMBERS, *(n for n in (1024, 2048, 4096, 8192, 16384) if n != plan.NUMBERS))
    unpacking: dict[str, list[Call]] = {str(n): [partial(decode.whole, w, DTYPE, n) for w in packed] for n in numbers}
    limit = packed_bytes(rows, columns) + 2 * rows * columns
    return {**found, f"numbers a program unpacks {rows}x{columns}": summary(race(unpacking), limit / bandwidth)}


def _processors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def candidates(plan: Tiles, rows: Sequence[int], blocks: Sequence[int], stages: Sequence[int]) -> list[Tiles]:
    """Other tiles than the plan's: rows, blocks and stages of these, half and twice the splits, 4 or 8 warps."""
    splits = sorted({max(1, plan.splits // 2), plan.splits, plan.splits * 2})
    every = itertools.product(rows, blocks, splits, (4, 8), stages)
    made = [replace(plan, rows=r, blocks=b, splits=s, warps=w, stages=n) for r, b, s, w, n in every]
    return [tiles for tiles in made if tiles != plan]


def best(plan: Tiles, others: Sequence[Tiles], calls: Callable[[Tiles], Sequence[Call]]) -> Row:
    """The plan's microseconds, and the fastest of the others."""
    ours = median(race({"plan": calls(plan)}, 9)["plan"])
    others_ = [(median(race({"other": calls(tiles)}, 5)["other"]), tiles) for tiles in others]
    least_, tiles = min(others_, key=lambda pair: pair[0])
    shape = (
        f"{tiles.rows} rows, {tiles.blocks} blocks, {tiles.splits} splits, {tiles.warps} warps, {tiles.stages} stages"
    )
    return {
        "us": round(1e6 * ours, 2),
        "best us": round(1e6 * least_, 2),
        "plan / best": round(ours / least_, 3),
        "best": shape,
    }


def versions() -> Row:
    """The GPU and what runs on it."""
    properties = torch.cuda.get_device_properties(0)
    row: Row = {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
    row["capability"] = f"{properties.major}.{properties.minor}"
    for name in ("torch", "triton", "bitsandbytes"):
        try:
            row[name] = version(name)
        except PackageNotFoundError:
            row[name] = "none"
    return {**row, "cuda": str(torch.version.cuda)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, append a line to quant_gpu.jsonl in the folder of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of quant_gpu.jsonl")
    parser.add_argument("--commit", help="what is measured, where the sources are no git repository")
    parser.add_argument("--check", action="store_true", help="compare with the reference, time nothing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skipped: there is no GPU here")
        return 0
    if cuda.kernels() is None:
        print(f"nothing to measure: {cuda.status()}")
        return 1
    torch.manual_seed(0)
    values: dict[str, Row] = {"machine": versions(), "right": check(DEVICE, SHAPES_CHECKED)}
    print(json.dumps(values), flush=True)
    if options.check:
        return 0
    found = limits()
    values["machine"] |= {"GB/s": round(found["bandwidth"] / 1e9), "TFLOP/s": round(found["rate"] / 1e12)}
    for part in (timed(found, values["machine"]["bitsandbytes"] != "none"), chosen(found)):
        values |= part
        print(json.dumps(part), flush=True)
    record("quant_gpu", values, options.results, options.commit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
