"""The 4-bit kernels on the processor, beside bitsandbytes and beside the dense product of the same dtype.

Shapes of a 7B model's blocks, two threads, NF4 with nested scales, weights in turn from more than the cache holds.
Each contestant is in a process of its own and takes turns; medians over 9 rounds of 6 calls. ``limit`` is what memory
allows: for a product the bytes of the dense weight over those of the packed one, for the others billions of numbers a
second at the bandwidth that a copy of the same bytes has. Products in bfloat16 are measured where the processor
multiplies it itself; elsewhere their rows are left out, and that is said.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch

from bench.kernels import CALLS
from bench.race import THREADS, Result, Runner, race
from bench.run import Values
from tarsia.adapter.host import native_bf16
from tarsia.quant import native

SQUARE, UP, DOWN = (4096, 4096), (11008, 4096), (4096, 11008)
BITS = {"float32": 32, "bfloat16": 16}
PACKED = 4.126953125


def measure() -> Values:
    """Every row."""
    dtypes = ["float32", *(["bfloat16"] if native_bf16(torch.device("cpu")) else [])]
    if len(dtypes) == 1:
        print("quant_kernels: no row of bfloat16 products: this processor only emulates them", file=sys.stderr)
    values: dict[str, dict[str, float | int | str]] = {}
    for dtype in ("float32", "bfloat16"):
        values |= {f"{what}, {dtype}": _flow(what, dtype) for what in ("quantise", "dequantise")}
    for dtype in dtypes:
        for shape in (SQUARE, UP, DOWN):
            for rows in (1, 16, 256) if shape == SQUARE else (1,):
                values[f"{shape[0]}x{shape[1]}, {rows} rows, {dtype}"] = _product(shape, rows, dtype)
    return values


def _race(what: str, shape: tuple[int, int], dtype: str, rows: int, who: tuple[str, ...]) -> dict[str, Result]:
    arguments = {"what": what, "shape": shape, "dtype": dtype, "rows": rows}
    return race([Runner(one, "bench.kernels:call", {"who": one, **arguments}) for one in who], counted=False)


def _flow(what: str, dtype: str) -> dict[str, float | int | str]:
    found = _race(what, SQUARE, dtype, 0, ("Tarsia", "bitsandbytes"))
    numbers = SQUARE[0] * SQUARE[1]
    speed = {name: CALLS * numbers / median(one.seconds) / 1e9 for name, one in found.items()}
    return {
        "Tarsia, 1e9/s": round(speed["Tarsia"], 2),
        "bitsandbytes, 1e9/s": round(speed["bitsandbytes"], 3),
        "limit, 1e9/s": round(bandwidth() / ((BITS[dtype] + PACKED) / 8) / 1e9, 1),
        **_how(),
    }


def _product(shape: tuple[int, int], rows: int, dtype: str) -> dict[str, float | int | str]:
    found = _race("product", shape, dtype, rows, ("Tarsia", "bitsandbytes", "dense"))
    dense = found["dense"]
    return {
        "Tarsia ms": round(1e3 * median(found["Tarsia"].seconds) / CALLS, 3),
        "dense ms": round(1e3 * median(dense.seconds) / CALLS, 3),
        "bitsandbytes ms": round(1e3 * median(found["bitsandbytes"].seconds) / CALLS, 3),
        "dense / Tarsia": round(dense.over(found["Tarsia"]), 2),
        "dense / bitsandbytes": round(dense.over(found["bitsandbytes"]), 2),
        "limit": round(BITS[dtype] / PACKED, 2),
        **_how(),
    }


def bandwidth() -> float:
    """Bytes a second of a copy, read and written, of more than the cache holds."""
    torch.set_num_threads(THREADS)
    source = torch.ones(2**27)
    target, times = torch.zeros_like(source), []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes / median(times)


def _how() -> dict[str, float | int | str]:
    return {"kernel": str(native.status()).partition(" ")[0], "threads": THREADS}
