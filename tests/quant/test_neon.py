"""The kernel for ARM, cross-compiled and run on an emulated processor: the reference's bits, products within rounding.

Debian has what it takes: qemu-user, gcc-aarch64-linux-gnu, libc6-dev-arm64-cross. ``driver.c`` calls the library there.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tarsia.quant import build, codec, native
from tarsia.quant.codec import Scheme
from tarsia.quant.levels import KINDS, levels, scale_levels

CC, QEMU, SYSTEM = "aarch64-linux-gnu-gcc", "qemu-aarch64", Path("/usr/aarch64-linux-gnu")
DTYPES = tuple(native.DTYPES)
QUANTISE, DEQUANTISE, ROWS = range(3)
HEAD = ("rows", "columns", "block", "nested", "m", "bias", "row0", "row1", "col0", "col1", "stride")

pytestmark = pytest.mark.skipif(
    not (shutil.which(CC) and shutil.which(QEMU) and SYSTEM.exists()),
    reason=f"{CC}, {QEMU} or {SYSTEM} is not there: no ARM processor to compile for and to emulate",
)


@dataclass(frozen=True)
class Call:
    """One call of the library, and what its output is held to."""

    operation: int
    dtype: torch.dtype
    arrays: list[Tensor]
    numbers: dict[str, int]
    holds: Callable[[int, bytes], bool]
    offset: float = 0.0
    isa: str | None = None
    name: str = field(default="")

    def packed(self, isa: str) -> bytes:
        numbers = {"block": 64, **self.numbers}
        head = [self.operation, native.SETS[self.isa or isa], native.DTYPES[self.dtype]]
        head += [int(numbers.get(name, 0)) for name in HEAD]
        return struct.pack("<14qf", *head, self.offset) + b"".join(map(raw, self.arrays))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def read(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver and the library, compiled for ARM with warnings as errors."""
    folder = tmp_path_factory.mktemp("arm")
    library = build.compile_library(build.FOUR_BITS, folder / build.FOUR_BITS.file, "aarch64", [CC, "-Werror"])
    source, made = Path(__file__).with_name("driver.c"), folder / "driver"
    linked = ["-I", str(build.FOUR_BITS.folder), str(source), str(library), f"-Wl,-rpath,{folder}", "-o", str(made)]
    subprocess.run([CC, "-O2", "-Wall", "-Wextra", "-Werror", *linked], check=True)
    return made


@pytest.fixture(params=["neon", pytest.param("portable", marks=pytest.mark.slow)])
def wrong(driver: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[list[Call]], list[str]]:
    """Names of the calls whose output is not what they are held to; all are made in one emulated process."""

    def wrong(calls: list[Call]) -> list[str]:
        files = [(tmp_path / f"{i}.in", tmp_path / f"{i}.out") for i in range(len(calls))]
        for call, (given, _) in zip(calls, files, strict=True):
            given.write_bytes(call.packed(request.param))
        subprocess.run([QEMU, "-L", SYSTEM, driver, *(name for pair in files for name in pair)], check=True)
        found = [path.read_bytes() for _, path in files]
        good = [call.holds(*struct.unpack("<q", data[:8]), data[8:]) for call, data in zip(calls, found, strict=True)]
        return [call.name for call, right in zip(calls, good, strict=True) if not right]

    return wrong


def numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Of every size, with a block of zeros, one of even steps, and one of the smallest that there are."""
    drawn = torch.randn(rows * columns, generator=torch.Generator().manual_seed(rows + columns))
    drawn *= torch.logspace(-6, 3, rows * columns)
    if rows * columns >= 192:
        drawn[:64] = 0
        drawn[64:128] = torch.linspace(-1, 1, 64)
        drawn[128:192] *= 1e-30
    return drawn.view(rows, columns).to(dtype)


def quantise(w: Tensor, kind: str, block: int, isa: str | None = None) -> Call:
    codes, scales = codec.quantise(w, Scheme(kind, nested=False, block=block))
    expected = raw(codes) + raw(scales)
    shape = {"rows": w.shape[0], "columns": w.shape[1], "block": block}
    name = f"quantise {kind} {tuple(w.shape)} {block} {w.dtype}"
    return Call(QUANTISE, w.dtype, [levels(kind), w], shape, lambda done, d: (done, d) == (0, expected), 0.0, isa, name)


def test_quantise(wrong) -> None:
    shapes = [((8, 128), 64), ((7, 33), 64), ((5, 200), 32), ((3, 257), 128)]
    cases = product(shapes, KINDS, DTYPES)
    assert wrong([quantise(numbers(*shape, dtype), kind, block) for (shape, block), kind, dtype in cases]) == []


def test_a_wrong_bit_would_be_seen(wrong) -> None:
    w = numbers(8, 128, torch.float32)
    planted = quantise(w, "nf4", 64)
    planted.arrays[1] = w.index_put((torch.tensor(4), torch.tensor(3)), -3 * w[4, 3])
    assert wrong([quantise(w, "nf4", 64), planted]) == [planted.name]


def test_what_is_not_finite_is_found(wrong) -> None:
    calls = []
    for at, what, dtype in product([3, 64 * 4 + 1], [torch.inf, -torch.inf, torch.nan], DTYPES):
        w = numbers(5, 64, dtype)
        w.view(-1)[at] = what
        shape = {"rows": 5, "columns": 64}
        held = Call(QUANTISE, dtype, [levels("nf4"), w], shape, lambda done, _: done == native.NOT_FINITE, name="found")
        calls.append(held)
    assert wrong(calls) == []


def parts(value: codec.Quantised) -> tuple[list[Tensor], float]:
    stored = [levels(value.scheme.kind), value.codes, value.scales]
    if value.nested_scales is None or value.offset is None:
        return stored, 0.0
    return [*stored, scale_levels(), value.nested_scales], value.offset.item()


def dequantise(value: codec.Quantised, tile: tuple[int, int, int, int], dtype: torch.dtype) -> Call:
    row0, row1, col0, col1 = tile
    expected = torch.zeros(row1 - row0, col1 - col0 + 3, dtype=dtype)  # nothing is written between the rows
    expected[:, :-3] = codec.decode(value, dtype)[row0:row1, col0:col1]
    shape = {"rows": value.shape[0], "columns": value.shape[1], "block": value.scheme.block}
    shape |= {"nested": int(value.scheme.nested), **dict(zip(HEAD[6:10], tile, strict=True)), "stride": col1 - col0 + 3}
    stored, offset = parts(value)
    name = f"dequantise {value.scheme} {tile} {dtype}"
    return Call(DEQUANTISE, dtype, stored, shape, lambda done, d: (done, d) == (0, raw(expected)), offset, name=name)


def halfway() -> codec.Quantised:
    """Blocks whose largest numbers lie halfway between two of bfloat16's or float16's, and a bit beside."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x3F801000, 0x3F803000, 0x3F801001, 0x3F800FFF]
    w = torch.zeros(len(bits), 64)
    w[:, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    w[:, 9] = -w[:, 5]
    return codec.encode(w, Scheme(nested=False))


def test_dequantise(wrong) -> None:
    tiles = [
        ((8, 128), 64, (0, 8, 0, 128)),
        ((9, 320), 64, (2, 7, 64, 256)),
        ((9, 100), 64, (1, 9, 3, 77)),
        ((6, 256), 32, (0, 6, 0, 256)),
        ((1, 1), 64, (0, 1, 0, 1)),
    ]
    calls = [dequantise(halfway(), (0, 8, 0, 64), dtype) for dtype in DTYPES]
    for (shape, block, tile), (kind, nested) in product(tiles, [("nf4", True), ("fp4", False), ("int4", True)]):
        value = codec.encode(numbers(*shape, torch.float32), Scheme(kind, nested, block))
        calls += [dequantise(value, tile, dtype) for dtype in DTYPES]
    assert wrong(calls) == []


def rows(value: codec.Quantised, m: int, biased: bool, dtype: torch.dtype) -> Call:
    count, columns = value.shape
    generator = torch.Generator().manual_seed(m)
    x, bias = torch.randn(m, columns, generator=generator).to(dtype), torch.randn(count, generator=generator).to(dtype)
    exact = x.double() @ codec.decode(value, torch.float32).double().t() + (bias.double() if biased else 0)
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype] * exact.abs().max()

    def holds(done: int, data: bytes) -> bool:
        return done == 0 and bool((read(data, dtype).view(m, count).double() - exact).abs().max() <= bound)

    stored, offset = parts(value)
    shape = {"rows": count, "columns": columns, "nested": int(value.scheme.nested), "m": m, "bias": int(biased)}
    arrays = [*stored, x, *([bias] if biased else [])]
    return Call(ROWS, dtype, arrays, shape, holds, offset, name=f"rows {value.shape} {m} {biased} {dtype}")


def test_rows(wrong) -> None:
    shapes = [((16, 128), True), ((5, 320), False), ((9, 192), True), ((7, 130), True)]
    values = [codec.encode(torch.randn(shape), Scheme(nested=nested)) for shape, nested in shapes]
    cases = product(values, [(1, False), (3, True), (7, True), (18, False)], DTYPES)
    assert wrong([rows(value, m, biased, dtype) for value, (m, biased), dtype in cases]) == []


def test_another_processors_instructions_are_not_there(wrong) -> None:
    calls = [quantise(torch.ones(1, 64), "nf4", 64, isa) for isa in ("avx2", "avx512", "avx512_bf16")]
    assert len(wrong(calls)) == len(calls)
