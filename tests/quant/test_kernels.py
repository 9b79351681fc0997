"""The C kernels, called as they are: every instruction set that this processor runs, held to the slow reference."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tarsia.quant import build, codec, loader, native
from tarsia.quant.levels import KINDS, bounds, levels, scale_levels

DTYPES = tuple(native.DTYPES)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The sources as they are now, compiled with warnings as errors."""
    cc = build.compiler()
    if cc is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("kernel") / build.FOUR_BITS.file
    build.compile_library(build.FOUR_BITS, path, build.machine(), [*cc, "-Werror"])
    loaded = loader.load(native.INTERFACE, path)
    assert not isinstance(loaded, str), loaded
    return loaded


@pytest.fixture(
    scope="session", params=["portable", *(Path(name).stem for name in build.FOUR_BITS.sets.get(build.machine(), ()))]
)
def kernel(request: pytest.FixtureRequest, library: ctypes.CDLL) -> native.Kernel:
    """One instruction set on this thread alone; also where the processor has it and does not say so."""
    name = request.param
    if not library.tarsia4_supported(native.SETS[name]) and not loader.executes(
        native.INTERFACE, Path(library._name), name
    ):
        pytest.skip(f"this processor does not execute {name}")
    return native.Kernel(library, name, 0)


NAMED = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
}


@pytest.mark.skipif(build.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="flags of Linux on x86")
def test_what_the_processor_names_is_supported_and_nothing_else(library: ctypes.CDLL) -> None:
    """Without this a dispatcher that finds no instruction set would make every other test here be skipped."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    for name, needed in NAMED.items():
        assert bool(library.tarsia4_supported(native.SETS[name])) == (needed <= flags)
    assert library.tarsia4_supported(native.SETS["portable"]) == 1
    assert library.tarsia4_supported(native.SETS["neon"]) == 0


def encoded(kernel: native.Kernel, w: Tensor, kind: str = "nf4", block: int = 64) -> tuple[Tensor, Tensor, int]:
    n = w.numel()
    codes = torch.full((-(-n // 2) + 1, 1), 0xA5, dtype=torch.uint8)
    absmax = torch.full((-(-n // block) + 1,), 7.0)
    table = levels(kind)
    done = kernel.quantise(w.data_ptr(), w.dtype, n, block, table.data_ptr(), codes.data_ptr(), absmax.data_ptr())
    assert int(codes[-1]) == 0xA5 and float(absmax[-1]) == 7.0, "written behind the end"
    return codes[:-1], absmax[:-1], done


def addresses(value: codec.Quantised) -> bytes:
    """The weight as the library takes it; ``value`` is to outlive it."""
    rows, columns = value.shape
    shape = (rows, columns, value.scheme.block)
    if value.nested_scales is None or value.offset is None:
        scales = (value.scales.data_ptr(), 0, 0, 0, 0.0)
    else:
        nested = value.nested_scales.data_ptr()
        scales = (0, value.scales.data_ptr(), scale_levels().data_ptr(), nested, value.offset.item())
    return native.pack(value.codes.data_ptr(), levels(value.scheme.kind).data_ptr(), scales, shape)


def decoded(
    kernel: native.Kernel, value: codec.Quantised, dtype: torch.dtype, rows: slice, columns: slice, gap: int = 0
) -> Tensor:
    (r0, r1), (c0, c1) = (rows.start, rows.stop), (columns.start, columns.stop)
    stride = c1 - c0 + gap
    out = torch.full((r1 - r0 + 1, stride), 3.0, dtype=dtype)
    assert kernel.dequantise(addresses(value), (r0, r1), (c0, c1), out.data_ptr(), dtype, stride) == 0
    assert (out[:-1, c1 - c0 :] == 3).all() and (out[-1] == 3).all(), "written outside of the rectangle"
    return out[:-1, : c1 - c0]


def product(kernel: native.Kernel, value: codec.Quantised, x: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.full((len(x) + 1, value.shape[0]), 3.0, dtype=x.dtype)
    address = None if bias is None else bias.data_ptr()
    assert kernel.rows(addresses(value), x.data_ptr(), x.dtype, len(x), address, out.data_ptr()) == 0
    assert (out[-1] == 3).all(), "written behind the end"
    return out[:-1]


def same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    a, b = (a.view(bits), b.view(bits)) if a.is_floating_point() else (a, b)
    differ = (a != b).reshape(-1)
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()}, the first at {int(differ.nonzero()[0])}"


def awkward(n: int, dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """Blocks of every nasty sort: on the bounds and one step beside them, subnormal, huge, zeros of both signs."""
    torch.manual_seed(seed)
    w = torch.randn(n, dtype=torch.float32) * 0.02
    edges = bounds(kind)[0]
    on = edges[torch.randint(0, 15, (n,))]
    beside = torch.nextafter(on, torch.where(torch.rand(n) < 0.5, 9.0, -9.0))
    sort = torch.randint(0, 9, (-(-n // 64),)).repeat_interleave(64)[:n]
    w = torch.where(sort == 1, on, w)
    w = torch.where(sort == 2, beside, w)
    w = torch.where(sort == 3, torch.zeros(()), w)
    w = torch.where(sort == 4, -torch.zeros(()), w)
    w = torch.where(sort == 5, w * 1e-38, w)
    w = torch.where(sort == 6, w * torch.finfo(dtype).max, w)
    w = torch.where(sort == 7, on * 1.7e-38, w)
    w[::64] = torch.where((sort == 1) | (sort == 2), torch.ones(()), w)[::64]
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_quantise_gives_the_reference_s_bits(kernel: native.Kernel, kind: str, dtype: torch.dtype) -> None:
    for n in (1, 2, 63, 64, 65, 127, 128, 1000, 64 * 257 + 31):
        for seed in range(4):
            w = awkward(n, dtype, kind, seed)
            codes, absmax, done = encoded(kernel, w, kind)
            expected, scales = codec.quantise(w, codec.Scheme(kind, nested=False))
            assert done == 0
            same_bits(codes, expected)
            same_bits(absmax, scales)


def test_quantise_gives_bitsandbytes_bits(kernel: native.Kernel) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the oracle is bitsandbytes")
    for kind in ("nf4", "fp4"):
        for dtype in DTYPES:
            for n in (128, 130, 4097, 64 * 300):
                w = awkward(n, dtype, kind, n)
                packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind)
                codes, absmax, done = encoded(kernel, w, kind)
                assert done == 0
                same_bits(codes, packed)
                same_bits(absmax, state.absmax)


@pytest.mark.parametrize("block", [2, 32, 128, 4096])
def test_quantise_in_other_blocks(kernel: native.Kernel, block: int) -> None:
    w = awkward(10_001, torch.float32, "nf4", block)
    codes, absmax, done = encoded(kernel, w, block=block)
    assert done == 0
    if block == 2:
        same_bits(absmax[:5000], w[:10_000].view(-1, 2).abs().amax(1))
        return
    expected, scales = codec.quantise(w, codec.Scheme(nested=False, block=block))
    same_bits(codes, expected)
    same_bits(absmax, scales)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), -float("nan")])
def test_quantise_refuses_what_is_not_finite(kernel: native.Kernel, bad: float) -> None:
    for dtype in DTYPES:
        for at in (0, 63, 64, 200, 255, 258):
            w = torch.randn(259).to(dtype)
            assert encoded(kernel, w)[2] == 0
            w[at] = bad
            assert encoded(kernel, w)[2] == native.NOT_FINITE


SHAPES = ((1, 64), (3, 128), (7, 192), (5, 4304), (9, 65), (4, 100), (33, 8), (2, 8256), (1, 20_000), (300, 320))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantise_gives_the_reference_s_bits(kernel: native.Kernel, dtype: torch.dtype) -> None:
    for at, shape in enumerate(SHAPES):
        for nested in (False, True):
            kind = KINDS[at % len(KINDS)]
            value = codec.encode(torch.randn(shape) * 0.03, codec.Scheme(kind, nested))
            whole = (slice(0, shape[0]), slice(0, shape[1]))
            same_bits(decoded(kernel, value, dtype, *whole).contiguous(), codec.decode(value, dtype))


def test_dequantise_whole_rows_that_begin_within_a_block(kernel: native.Kernel) -> None:
    for columns in (4304, 1001, 100):
        value = codec.encode(torch.randn(40, columns), codec.Scheme())
        every = codec.decode(value, torch.bfloat16)
        for rows in (slice(1, 2), slice(1, 40), slice(3, 9), slice(39, 40)):
            same_bits(decoded(kernel, value, torch.bfloat16, rows, slice(0, columns)), every[rows])


@pytest.mark.parametrize("skew", [0, 1])
def test_dequantise_more_than_caches_hold(kernel: native.Kernel, skew: int) -> None:
    """Where output is so long that it is written past the caches, and where its address does not allow that."""
    rows, columns = 4100, 1088
    torch.manual_seed(skew)
    codes = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8)
    scheme = codec.Scheme(nested=False)
    value = codec.Quantised(codes, torch.rand(rows * 17), None, None, scheme, (rows, columns), torch.float32)
    for dtype, width in ((torch.float32, 1088), (torch.float32, 1024), (torch.bfloat16, 1088)):
        out = torch.full((rows * width + 32,), 3.0, dtype=dtype)
        where = out[skew : skew + rows * width]
        assert kernel.dequantise(addresses(value), (0, rows), (0, width), where.data_ptr(), dtype, width) == 0
        same_bits(where.view(rows, width), codec.decode(value, dtype)[:, :width].contiguous())
        assert (out[:skew] == 3).all() and (out[skew + rows * width :] == 3).all(), "written outside"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantise_of_extreme_scales(kernel: native.Kernel, dtype: torch.dtype) -> None:
    """Every code, scales from subnormal to those that overflow a half, ties included."""
    torch.manual_seed(0)
    exponents = torch.linspace(-149, 127, 4000).round()
    scales = torch.cat([2.0**exponents, torch.rand(1192) * 2.0 ** torch.randint(-30, 20, (1192,)), -torch.rand(808)])
    codes = torch.arange(16, dtype=torch.uint8).repeat(4)[torch.randperm(64)].repeat(len(scales))
    packed = (codes[::2] << 4 | codes[1::2]).unsqueeze(1)
    scheme = codec.Scheme("nf4", nested=False)
    value = codec.Quantised(packed, scales, None, None, scheme, (len(scales), 64), dtype)
    got = decoded(kernel, value, dtype, slice(0, len(scales)), slice(0, 64)).contiguous()
    same_bits(got, codec.decode(value, dtype))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_dequantise_a_rectangle(kernel: native.Kernel, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 400) | st.sampled_from((64, 128, 256, 320)))
    r0, c0 = data.draw(st.integers(0, rows)), data.draw(st.integers(0, columns))
    r1, c1 = data.draw(st.integers(r0, rows)), data.draw(st.integers(c0, columns))
    block = data.draw(st.sampled_from((32, 64, 64, 64, 128, 256)))
    scheme = codec.Scheme(data.draw(st.sampled_from(KINDS)), data.draw(st.booleans()), block)
    dtype, gap = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 3))
    value = codec.encode(torch.randn(rows, columns), scheme)
    got = decoded(kernel, value, dtype, slice(r0, r1), slice(c0, c1), gap)
    same_bits(got.contiguous(), codec.decode(value, dtype)[r0:r1, c0:c1].contiguous())


def test_dequantise_gives_bitsandbytes_bits(kernel: native.Kernel) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the oracle is bitsandbytes")
    for kind in ("nf4", "fp4"):
        for dtype in DTYPES:
            for nested in (False, True):
                w = (torch.randn(48, 320) * 0.02).to(dtype)
                packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=nested)
                extra = (state.state2.absmax, state.offset) if nested else (None, None)
                scheme = codec.Scheme(kind, nested)
                value = codec.Quantised(packed, state.absmax, *extra, scheme, tuple(w.shape), dtype)
                if nested and not torch.equal(state.state2.code, scale_levels()):
                    pytest.skip("this bitsandbytes has another table of scales on this machine")
                got = decoded(kernel, value, dtype, slice(0, 48), slice(0, 320)).contiguous()
                same_bits(got, functional.dequantize_4bit(packed, state))


@pytest.mark.skipif(sys.platform == "win32", reason="pages are forbidden by mprotect")
def test_nothing_outside_of_the_arrays_is_touched(kernel: native.Kernel, library: ctypes.CDLL) -> None:
    def code(short: int) -> int:
        script = str(Path(__file__).with_name("guard_pages.py"))
        command = [sys.executable, script, library._name, str(native.SETS[kernel.name]), str(short)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert code(0) == 0
    assert code(1) in (-signal.SIGSEGV, -signal.SIGBUS), "an array that is a byte short goes unnoticed"


def close(got: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, levels_rounded: bool) -> None:
    """Within the rounding of float32 sums of n products in any order, n u |x| |w|, and of the result's own dtype.

    Two roundings a weight (level * scale, or the block's sum * scale) join the n of the sum. bfloat16 levels add 2^-9.
    """
    exact = x.double() @ w.double().t() + (0 if bias is None else bias.double())
    size = x.double().abs() @ w.double().abs().t() + (0 if bias is None else bias.double().abs())
    slack = (x.shape[1] + 4) * 2.0**-24 + (2.0**-9 if levels_rounded else 0)
    result = 2.0**-24 if x.dtype is torch.float32 else torch.finfo(x.dtype).eps / 2
    least = torch.finfo(x.dtype).smallest_normal
    assert got.isfinite().all()
    assert ((got.double() - exact).abs() <= size * slack * (1 + result) + exact.abs() * result + least).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_the_product_with_the_decoded_weight(kernel: native.Kernel, dtype: torch.dtype) -> None:
    rounded = kernel.name == "avx512_bf16" and dtype is torch.bfloat16
    for at, shape in enumerate(SHAPES):
        for m in (1, 2, 3, 5, 8, 16, 19):
            scheme = codec.Scheme(KINDS[at % len(KINDS)], nested=m % 2 == 1, block=64 if at % 2 else 128)
            value = codec.encode(torch.randn(shape) * 0.03, scheme)
            x, bias = torch.randn(m, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if m != 2 else None
            close(product(kernel, value, x, bias), x, codec.decode(value, torch.float32), bias, rounded)


def test_rows_longer_than_a_strip_of_scales(kernel: native.Kernel) -> None:
    value = codec.encode(torch.randn(3, 70_016) * 0.03, codec.Scheme())
    w = codec.decode(value, torch.float32)
    for dtype in DTYPES:
        for m in (1, 3):
            x = torch.randn(m, 70_016).to(dtype)
            rounded = kernel.name == "avx512_bf16" and dtype is torch.bfloat16
            close(product(kernel, value, x), x, w, None, rounded)


def test_a_row_of_x_alone_is_that_row_among_others(kernel: native.Kernel) -> None:
    """The order of a row's sum is not its neighbours' business: bits do not depend on the batch."""
    for dtype in DTYPES:
        value = codec.encode(torch.randn(48, 576), codec.Scheme())
        x = torch.randn(16, 576).to(dtype)
        together = product(kernel, value, x)
        for i in range(16):
            same_bits(product(kernel, value, x[i : i + 1])[0], together[i])


def test_threads_share_the_work_whatever_the_runtime_grants(library: ctypes.CDLL) -> None:
    """More threads than bands, fewer than asked for, one: the same bits, and the bands are really shared."""
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    work_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    asked: list[int] = []

    def granting(granted: int) -> Callable[..., None]:
        def parallel(work: int, data: int, threads: int, flags: int) -> None:
            asked.append(threads)
            team = [threading.Thread(target=work_type(work), args=(data,)) for _ in range(granted)]
            for member in team:
                member.start()
            for member in team:
                member.join()

        return parallel

    w, x = torch.randn(401, 640), torch.randn(3, 640)
    alone = native.Kernel(library, "portable", 0)
    value = codec.encode(w, codec.Scheme())
    expected = encoded(alone, w), decoded(alone, value, torch.float32, slice(1, 400), slice(3, 639))
    y = product(alone, value, x)
    for granted in (1, 2, 5):
        parallel = signature(granting(granted))
        team = loader._TEAM.pack(ctypes.cast(parallel, ctypes.c_void_p).value, 3)
        several = native.Kernel(library, "portable", 0)
        several._team._packed = {torch.get_num_threads(): team}
        asked.clear()
        codes, absmax, done = encoded(several, w)
        assert done == 0
        same_bits(codes, expected[0][0])
        same_bits(absmax, expected[0][1])
        got = decoded(several, value, torch.float32, slice(1, 400), slice(3, 639))
        same_bits(got.contiguous(), expected[1].contiguous())
        same_bits(product(several, value, x), y)
        assert asked == [3, 3, 3]
    w[200, 5] = float("nan")
    assert encoded(several, w)[2] == native.NOT_FINITE


def test_empty_is_nothing_and_nonsense_is_refused(kernel: native.Kernel, library: ctypes.CDLL) -> None:
    which, table = native.SETS[kernel.name], levels("nf4")
    w = torch.zeros(4, 64)
    value = codec.encode(w, codec.Scheme())
    weight, out = addresses(value), torch.zeros(4, 64)
    at, to, of = w.data_ptr(), out.data_ptr(), table.data_ptr()
    assert library.tarsia4_quantise(which, 0, 0, 0, 64, of, 0, 0, None) == 0
    assert library.tarsia4_dequantise(which, weight, 2, 2, 0, 64, to, 0, 64, None) == 0
    assert library.tarsia4_rows(which, weight, 0, 0, 0, 0, to, None) == 0
    bad = -1
    assert library.tarsia4_quantise(which, at, 3, 256, 64, of, to, to, None) == bad
    assert library.tarsia4_quantise(which, at, 0, -1, 64, of, to, to, None) == bad
    for block in (0, -2, 63):
        assert library.tarsia4_quantise(which, at, 0, 256, block, of, to, to, None) == bad
    assert library.tarsia4_quantise(which, 0, 0, 256, 64, of, to, to, None) == bad
    for r0, r1, c0, c1, stride in (
        (-1, 1, 0, 64, 64), (2, 1, 0, 64, 64), (0, 5, 0, 64, 64),
        (0, 4, -1, 64, 65), (0, 4, 9, 8, 64), (0, 4, 0, 65, 65), (0, 4, 0, 64, 63),
    ):  # fmt: skip
        assert library.tarsia4_dequantise(which, weight, r0, r1, c0, c1, to, 0, stride, None) == bad
    assert library.tarsia4_dequantise(which, weight, 0, 4, 0, 64, to, 7, 64, None) == bad
    assert library.tarsia4_rows(which, weight, at, 0, -1, 0, to, None) == bad
    without = native.pack(value.codes.data_ptr(), of, (0, 0, 0, 0, 0.0), (4, 64, 64))
    assert library.tarsia4_dequantise(which, without, 0, 4, 0, 64, to, 0, 64, None) == bad
    for unknown in (-1, 5, 99):
        assert library.tarsia4_supported(unknown) == 0
        assert library.tarsia4_rows(unknown, weight, at, 0, 1, 0, to, None) == -2
