"""The compiled kernel beside the page of torch that specifies it: the same bits, of every instruction set."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import race
from tarsia.cli import machine
from tarsia.core.errors import ConfigError, MergeError
from tarsia.merge import combine, draws, fast, kernel, sparsify
from tarsia.merge.delta import Delta
from tarsia.merge.ways import WAYS, combined
from tarsia.quant import build, loader

CC = build.compiler()
needs_cc = pytest.mark.skipif(CC is None, reason="there is no C compiler")
FEW = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as they are now, with warnings as errors."""
    if CC is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("merging") / build.MERGING.file
    return build.compile_library(build.MERGING, path, build.machine(), [*CC, "-Werror"])


@pytest.fixture(scope="session", params=[*kernel.INTERFACE.sets])
def here(request: pytest.FixtureRequest, compiled: Path) -> kernel.Kernel:
    """One instruction set on this thread alone."""
    handle = loader.load(kernel.INTERFACE, compiled)
    assert not isinstance(handle, str), handle
    if not loader.function(kernel.INTERFACE, handle, "supported")(kernel.INTERFACE.sets[request.param]):
        pytest.skip(f"this processor does not execute {request.param}")
    return kernel.Kernel(handle, request.param, 0)


def same_bits(a: Tensor, b: Tensor) -> None:
    """Bits but for the sign of a zero."""
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
    assert torch.equal((a + 0.0).view(torch.int32), (b + 0.0).view(torch.int32))


def in_order(combining: Callable[..., Tensor], stack: Tensor, *rest, **options) -> Tensor:
    """The reference where it adds one entry after the other: torch takes a few numbers in another order."""
    wide = torch.nn.functional.pad(stack, (0, 128 - stack.shape[-1] % 64))
    return combining(wide, *rest, **options)[..., : stack.shape[-1]]


KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "few magnitudes": lambda shape, g: torch.randint(-3, 4, shape, generator=g) / 4,
    "one magnitude": lambda shape, g: torch.randint(0, 2, shape, generator=g) * 0.5 - 0.25,
    "mostly zeros": lambda shape, g: torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.1),
    "denormals": lambda shape, g: torch.randint(-9, 10, shape, generator=g).float() * 2.0**-149,
    "wide": lambda shape, g: torch.randn(shape, generator=g).sign() * 2.0 ** torch.randint(-60, 60, shape, generator=g),
    "zeros": lambda shape, g: -torch.zeros(shape),
}


def stack_of(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    return KINDS[kind](shape, torch.Generator().manual_seed(seed)).float()


@st.composite
def stacks(draw: st.DrawFn) -> Tensor:
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 11)), draw(st.sampled_from([1, 2, 15, 16, 17, 64, 513, 1030]))
    return stack_of(draw(st.sampled_from([*KINDS])), shape, draw(st.integers(0, 2**20)))


DENSITIES = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([0.2, 0.5, 1.0]))


def trimmed(entry: Tensor, mask: kernel.Mask) -> Tensor:
    """What a mask leaves, said again in torch."""
    places = torch.arange(entry.numel()).view_as(entry)
    size = entry.abs()
    return torch.where((size > mask.magnitude) | ((size == mask.magnitude) & (places < mask.cut)), entry, 0.0)


@FEW
@given(stacks(), DENSITIES)
@example(stack_of("one magnitude", (2, 7, 513), 1), 0.3)
@example(stack_of("few magnitudes", (3, 9, 64), 2), 0.9)
def test_thresholds_leave_what_the_reference_leaves(here: kernel.Kernel, stack: Tensor, density: float) -> None:
    kept = sparsify.kept(stack[0].numel(), density)
    masks = here.thresholds(list(stack), kept)
    expected = sparsify.magnitude(stack, density) if density < 1 else stack
    for entry, mask, wanted, level in zip(stack, masks, expected, sparsify.thresholds(stack, density), strict=True):
        same_bits(trimmed(entry, mask), wanted)
        same_bits(here.total([entry], [mask], [1.0]), wanted)
        assert mask.magnitude == float(level)


WEIGHTS = st.lists(st.floats(-2, 2, width=32), min_size=9, max_size=9)
HARDLY = [2.0**-5, 3 * 2.0**-29 - 2.0**-5, *[1.0] * 7]  # a sum too small to divide by


@FEW
@given(
    stacks(), DENSITIES, WEIGHTS, st.sampled_from(["after", "before"]), st.sampled_from(["count", "weights", "none"])
)
@example(stack_of("few magnitudes", (4, 5, 33), 3), 0.5, [0.5, -0.5, 1.0, 1.0, 1, 1, 1, 1, 1], "before", "weights")
@example(torch.tensor([1.0, -1.0]).view(2, 1, 1).expand(2, 3, 17) * 0.5, 1.0, HARDLY, "before", "weights")
def test_ties_are_those_of_the_reference(
    here: kernel.Kernel, stack: Tensor, density: float, weights: list[float], weigh: str, normalise: str
) -> None:
    held = torch.tensor(weights[: len(stack)], dtype=torch.float64)
    trim = sparsify.magnitude(stack, density) if density < 1 else stack
    expected = in_order(combine.ties, trim, held, weigh=weigh, normalise=normalise)
    way = WAYS["ties"].taking({"density": density, "weigh": weigh, "normalise": normalise})
    found = merged_by(here, way, [Delta(whole=entry) for entry in stack], held)
    same_bits(found, expected)


def merged_by(here: kernel.Kernel, way, deltas: list[Delta], weights: Tensor, seeds=None) -> Tensor:
    """`fast.merged` with this kernel."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernel, "library", lambda: here)
        made = fast.merged(way, deltas, weights, seeds or [0] * len(deltas))
    assert made is not None and made.whole is not None
    return made.whole.float()


@FEW
@given(stacks(), DENSITIES, WEIGHTS)
def test_sums_are_those_of_the_reference(
    here: kernel.Kernel, stack: Tensor, density: float, weights: list[float]
) -> None:
    held = torch.tensor(weights[: len(stack)], dtype=torch.float64)
    trim = sparsify.magnitude(stack, density) if density < 1 else stack
    way = WAYS["magnitude"].taking({"density": density})
    same_bits(merged_by(here, way, [Delta(whole=entry) for entry in stack], held), in_order(combine.total, trim, held))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.97])
def test_large_ones_are_searched_by_a_sample_and_found_all_the_same(
    here: kernel.Kernel, kind: str, density: float
) -> None:
    """More numbers than are collected whole: the sample bounds the search, and where it can not the digits do."""
    stack = stack_of(kind, (2, 301, 517), 5)
    kept = sparsify.kept(stack[0].numel(), density)
    for entry, mask in zip(stack, here.thresholds(list(stack), kept), strict=True):
        same_bits(trimmed(entry, mask), sparsify.magnitude(entry[None], density)[0])


def test_what_the_sample_does_not_see_is_found(here: kernel.Kernel) -> None:
    """Two values of equal weight in the order: a sample can not tell on which side the rank falls."""
    entry = torch.ones(400, 400)
    entry.view(-1)[::2] = 2.0
    for kept in (79_000, 79_999, 80_000, 80_001, 81_000):
        (mask,) = here.thresholds([entry], kept)
        assert int((trimmed(entry, mask) != 0).sum()) == kept
        same_bits(trimmed(entry, mask), sparsify.magnitude(entry[None], kept / entry.numel() + 1e-9)[0])


def sampled(numbers: int) -> Tensor:
    """The places that the kernel looks at first, drawn as it draws them."""
    places, state = [], 0x9E3779B97F4A7C15
    for _ in range(2**14):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        places.append((state >> 11) % numbers)
    return torch.tensor(places).unique()


@pytest.mark.parametrize("misled", [1e-3, 1e3], ids=["too low", "too high"])
def test_a_sample_that_misleads_costs_time_alone(here: kernel.Kernel, misled: float) -> None:
    entry = 1 + torch.rand(400, 400, generator=torch.Generator().manual_seed(1))
    entry.view(-1)[sampled(entry.numel())] *= misled
    for density in (0.05, 0.2, 0.5, 0.95):
        (mask,) = here.thresholds([entry], sparsify.kept(entry.numel(), density))
        same_bits(trimmed(entry, mask), sparsify.magnitude(entry[None], density)[0])


@settings(FEW, max_examples=20)
@given(st.integers(1, 4), st.integers(0, 20), st.integers(1, 9), st.sampled_from([1, 16, 511, 700]), DENSITIES)
def test_factors_are_the_product_summed_rank_by_rank(
    here: kernel.Kernel, count: int, rank: int, rows: int, columns: int, density: float
) -> None:
    g = torch.Generator().manual_seed(count * rank + rows)
    ups, downs = torch.randn(count, rows, rank, generator=g), torch.randn(count, rank, columns, generator=g)
    changes = list(zip(ups, downs, strict=True))
    dense = [here.total([pair], [kernel.EVERYTHING], [1.0]) for pair in changes]
    for made, up, down in zip(dense, ups, downs, strict=True):
        same_bits(made, fused(up, down))
        torch.testing.assert_close(made, up @ down)
    kept = sparsify.kept(rows * columns, density)
    masks = here.thresholds(dense, kept)
    assert here.thresholds(changes, kept) == masks
    ones = [1.0] * count
    mixed = [pair if i % 2 else whole for i, (pair, whole) in enumerate(zip(changes, dense, strict=True))]
    same_bits(here.elect(mixed, masks, ones, ones, ones), here.elect(dense, masks, ones, ones, ones))


def fused(up: Tensor, down: Tensor) -> Tensor:
    """The product in float32 with one rounding a step: products of floats are exact in float64."""
    made = torch.zeros(up.shape[0], down.shape[1])
    for k in range(up.shape[1]):
        wide = up[:, k, None].double() * down[k].double()
        made = _rounded(wide, made)
    return made


def _rounded(exact: Tensor, added: Tensor) -> Tensor:
    """float32(exact + added) with one rounding: the error of the sum in float64 makes it round to odd."""
    total = exact + added.double()
    part = total - exact
    error = (exact - (total - part)) + (added.double() - part)
    bits = total.view(torch.int64)
    inexact, even = error != 0, bits & 1 == 0
    up = (error > 0) == (total > 0)
    return torch.where(inexact & even, torch.where(up, bits + 1, bits - 1), bits).view(torch.float64).float()


def test_random_numbers_are_philoxs() -> None:
    """A known answer of Random123, and the algorithm said in whole numbers of Python."""
    assert draws.philox(0, 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for key, first in ((0, 0), (-5, 4 * 12345), (2**63 - 1, 4 * (2**32 - 1))):
        expected = [plain_philox(key, i // 4)[i % 4] for i in range(first, first + 9)]
        assert draws.philox(key, 9, first).tolist() == expected
    with pytest.raises(ValueError):
        draws.philox(0, 4, 2)


def plain_philox(key: int, counter: int) -> list[int]:
    low = 2**32 - 1
    a, b, c, d = counter & low, counter >> 32, 0, 0
    for turn in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        k0, k1 = (key & low) + turn * 0x9E3779B9 & low, (key >> 32 & low) + turn * 0xBB67AE85 & low
        a, b, c, d = (q >> 32) ^ b ^ k0, q & low, (p >> 32) ^ d ^ k1, p & low
    return [a, b, c, d]


@FEW
@given(stacks(), DENSITIES, WEIGHTS, st.integers(-(2**63), 2**63 - 1), st.sampled_from(["dare", "dare_ties"]))
def test_what_is_thrown_away_at_random_is_the_references(
    here: kernel.Kernel, stack: Tensor, density: float, weights: list[float], seed: int, name: str
) -> None:
    held, seeds = torch.tensor(weights[: len(stack)], dtype=torch.float64), [seed ^ i for i in range(len(stack))]
    thin = sparsify.dare(stack, density, seeds)
    expected = in_order(combine.total if name == "dare" else combine.ties, thin, held)
    deltas = [Delta(whole=entry) for entry in stack]
    same_bits(merged_by(here, WAYS[name].taking({"density": density}), deltas, held, seeds), expected)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells what was resident at most")
def test_dense_changes_are_never_there() -> None:
    """Of 16 adapters in factors the result is made, and hardly anything beside it."""
    here = kernel.library()
    if here is None:
        pytest.skip("no kernel runs here")
    rows, columns, ones = 2048, 512, [1.0] * 16
    changes = [(torch.randn(rows, 2), torch.randn(2, columns)) for _ in ones]

    def merged() -> float:
        masks = here.thresholds(changes, rows * columns // 5)
        return float(here.elect(changes, masks, ones, ones, ones)[0, 0])

    merged()
    result = 4 * rows * columns
    assert race.peak(merged, 1) - race.resident() < 1.5 * result
    stack = [up @ down for up, down in changes]
    assert race.peak(lambda: float(torch.stack(stack)[0, 0, 0]), 1) - race.resident() > 8 * result, "it sees nothing"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_refused(here: kernel.Kernel, bad: float) -> None:
    ones = [1.0, 1.0]
    for place in (0, 5000, 2 * 3001 - 1):
        stack = torch.randn(2, 2, 3001)
        stack[1].view(-1)[place] = bad
        for call in (
            lambda s: here.thresholds(list(s), 100),
            lambda s: here.elect(list(s), [kernel.EVERYTHING] * 2, ones, ones, ones),
            lambda s: here.total(list(s), [kernel.EVERYTHING] * 2, ones),
        ):
            with pytest.raises(MergeError, match="none"):
                call(stack)
        with pytest.raises(MergeError, match="none"):
            sparsify.magnitude(stack, 0.2)


def test_nothing_and_no_columns(here: kernel.Kernel) -> None:
    (mask,) = here.thresholds([torch.ones(2, 3)], 0)
    assert mask.magnitude == math.inf
    assert not here.total([torch.ones(2, 3)], [mask], [1.0]).any()
    for shape in ((0, 5), (5, 0)):
        assert here.total([torch.ones(shape)], [kernel.EVERYTHING], [1.0]).shape == shape


def test_threads_and_bands_do_not_change_a_bit(compiled: Path) -> None:
    address, _ = loader.threads(loader.maps())
    if not address:
        pytest.skip("torch has loaded no OpenMP runtime here")
    handle = loader.load(kernel.INTERFACE, compiled)
    assert not isinstance(handle, str)
    stack = stack_of("normal", (3, 300, 515), 4)
    ones, before = [1.0] * 3, torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            here = kernel.Kernel(handle, "portable", address)
            masks = here.thresholds(list(stack), 31_000)
            found.append((masks, here.elect(list(stack), masks, ones, ones, ones)))
        finally:
            torch.set_num_threads(before)
    assert found[0][0] == found[1][0]
    same_bits(found[0][1], found[1][1])


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-gcc") is None, reason="no gcc-aarch64-linux-gnu")
def test_it_compiles_for_arm(tmp_path: Path) -> None:
    cross = ["aarch64-linux-gnu-gcc", "-O1", "-Werror"]
    assert build.compile_library(build.MERGING, tmp_path / build.MERGING.file, "aarch64", cross).stat().st_size


def test_what_does_not_fit_together_is_refused() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    for changes in ([a, b], [(a, a)], []):
        with pytest.raises(ValueError):
            kernel._packed(changes)
    with pytest.raises(TypeError):
        kernel._packed([a.double()])
    assert len(kernel._masks([kernel.Mask()], 1)) == struct.calcsize("3qIf")
    with pytest.raises(ValueError):
        kernel._masks([kernel.Mask()], 2)
    with pytest.raises(ValueError):
        kernel._floats([1.0], 2)


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(kernel.INTERFACE.variable, raising=False)
    kernel.library.cache_clear()
    yield monkeypatch
    kernel.library.cache_clear()


def deltas_of(count: int = 4) -> list[Delta]:
    g = torch.Generator().manual_seed(3)
    return [
        Delta(torch.randn(33, 4, generator=g).double(), torch.randn(4, 70, generator=g).double()) for _ in range(count)
    ]


@needs_cc
@pytest.mark.parametrize("name", ["ties", "magnitude", "dare_ties"])
def test_a_merge_runs_on_the_kernel_and_is_what_the_reference_makes(afresh: pytest.MonkeyPatch, name: str) -> None:
    deltas, weights = [*deltas_of(), Delta()], [1.0, 0.5, 0.25, 2.0, 1.0]
    made = combined(WAYS[name], deltas, weights, "a.site")
    here = kernel.library()
    assert here is not None
    calls = []
    for call in ("elect", "total"):
        afresh.setattr(here, call, lambda *a, call=call: calls.append(call) or getattr(kernel.Kernel, call)(here, *a))
    combined(WAYS[name], deltas, weights, "a.site")
    assert calls, "the kernel was not called"
    afresh.setenv(kernel.INTERFACE.variable, "reference")
    kernel.library.cache_clear()
    expected = combined(WAYS[name], deltas, weights, "a.site")
    assert made.whole is not None and expected.whole is not None
    torch.testing.assert_close(made.whole, expected.whole, rtol=1e-6, atol=1e-7)


@needs_cc
def test_without_a_library_the_reference_runs_and_it_is_said(
    afresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = combined(WAYS["ties"], deltas_of(), [1.0] * 4, "a.site")
    elsewhere = replace(kernel.INTERFACE, library=build.MERGING.at(tmp_path))
    afresh.setattr(kernel, "INTERFACE", elsewhere)
    kernel.library.cache_clear()
    for _ in range(2):
        found = combined(WAYS["ties"], deltas_of(), [1.0] * 4, "a.site")
    torch.testing.assert_close(found.whole, expected.whole, rtol=1e-6, atol=1e-7)
    (record,) = caplog.records
    assert "merging: the slow reference, for no kernel is compiled" in record.getMessage()
    finding = machine.merge_kernel()
    assert finding.state is machine.State.WARN and "tarsia.quant.build" in str(finding.do)


def test_a_kernel_that_is_not_there_can_not_be_forced(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv(kernel.INTERFACE.variable, "neon")
    with pytest.raises(ConfigError, match=kernel.INTERFACE.variable):
        kernel.library()
    assert machine.merge_kernel().state is machine.State.FAIL


@needs_cc
def test_doctor_is_content_with_it(afresh: pytest.MonkeyPatch) -> None:
    finding = machine.merge_kernel()
    assert finding.state is machine.State.OK and finding.name == "merge kernel"
