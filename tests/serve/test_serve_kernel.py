"""The compiled kernels of serving beside the page of torch that specifies them: all instruction sets, any rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served_rows import ACTIVATIONS, FLOATS, Cache, Drawn, Line, cache, entries, near, neck, thin
from torch import Tensor
from torch.nn import functional as F

from tarsia.cli import machine
from tarsia.core.errors import ConfigError
from tarsia.quant import build, loader
from tarsia.serve import kernel, reference
from tarsia.serve.forms import Neck
from tarsia.serve.reference import Row

CC = build.compiler()
FEW = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as they are now, with warnings as errors."""
    if CC is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("serving") / build.SERVING.file
    return build.compile_library(build.SERVING, path, build.machine(), [*CC, "-Werror"])


@pytest.fixture(scope="session", params=[*kernel.INTERFACE.sets])
def here(request: pytest.FixtureRequest, compiled: Path) -> kernel.Kernel:
    """One instruction set on this thread alone."""
    handle = loader.load(kernel.INTERFACE, compiled)
    assert not isinstance(handle, str), handle
    if not loader.function(kernel.INTERFACE, handle, "supported")(kernel.INTERFACE.sets[request.param]):
        pytest.skip(f"this processor does not execute {request.param}")
    return kernel.Kernel(handle, request.param, 0)


WIDTHS = st.sampled_from([1, 7, 16, 31, 32, 33, 48, 64, 100, 192])
RANKS = st.one_of(st.sampled_from([0, 1, 8, 16, 32, 64]), st.integers(1, 70))


@st.composite
def lines(draw: st.DrawFn) -> Line:
    drawn = Drawn(draw(st.integers(0, 2**20)))
    counts = draw(st.lists(st.sampled_from([0, 1, 1, 1, 2, 5, 17, 40]), min_size=1, max_size=6))
    within, out, dtype = draw(WIDTHS), draw(WIDTHS), draw(st.sampled_from(FLOATS))
    is_neck = draw(st.booleans())
    forms: list[Row] = []
    for _ in counts:
        rank, held = draw(RANKS), draw(st.sampled_from(FLOATS))
        if draw(st.integers(0, 4)) == 0:
            forms.append(None)
        elif is_neck:
            forms.append(neck(drawn, max(rank, 1), out, held, draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())))
        else:
            forms.append(thin(drawn, rank, within, out, held))
    total = sum(counts)
    reads = any(isinstance(form, Neck) and form.of_input for form in forms)
    x, y = drawn(total, out if reads else within, dtype=dtype), drawn(total, out, dtype=dtype)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return Line(x, y, starts, forms)


@FEW
@given(lines())
def test_every_row_is_what_the_reference_makes_of_it(here: kernel.Kernel, line: Line) -> None:
    near(line.run(here), reference.grouped(line.x, line.y.clone(), line.starts, line.forms))


@FEW
@given(lines())
def test_a_row_has_the_bits_it_has_alone(here: kernel.Kernel, line: Line) -> None:
    together = line.run(here)
    for i in range(len(line.forms)):
        first, last = line.starts[i : i + 2].tolist()
        assert torch.equal(together[first:last], line.row(i).run(here))


@FEW
@given(lines())
def test_a_token_has_the_bits_it_has_alone(here: kernel.Kernel, line: Line) -> None:
    together = line.run(here)
    counts = line.starts.diff().tolist()
    forms = [form for form, count in zip(line.forms, counts, strict=True) for _ in range(count)]
    apart = Line(line.x, line.y, torch.arange(len(forms) + 1, dtype=torch.int32), forms)
    assert torch.equal(together, apart.run(here))


@FEW
@given(lines())
def test_inner_scales_the_rows_that_have_one(here: kernel.Kernel, line: Line) -> None:
    if any(isinstance(form, Neck) for form in line.forms):
        return
    before = line.x.clone()
    found = here.inner(line.x, line.starts, line.forms, entries(line.forms))
    assert torch.equal(found, reference.inner(line.x, line.starts, line.forms)) and torch.equal(before, line.x)


@FEW
@given(st.integers(0, 2**20), st.integers(0, 40), WIDTHS, st.integers(1, 140), st.sampled_from(FLOATS), st.booleans())
def test_a_dense_product_is_that_of_torch(
    here: kernel.Kernel, seed: int, tokens: int, within: int, out: int, dtype: torch.dtype, biased: bool
) -> None:
    draw = Drawn(seed)
    x, weight = draw(tokens, within, dtype=dtype), draw(out, within, dtype=dtype, by=within**-0.5)
    bias = draw(out, dtype=dtype) if biased else None
    exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    found = here.linear(x, weight, bias)
    near(found, exact.to(dtype))
    for t in range(tokens):
        assert torch.equal(found[t : t + 1], here.linear(x[t : t + 1], weight, bias))


@st.composite
def caches(draw: st.DrawFn) -> Cache:
    drawn = Drawn(draw(st.integers(0, 2**20)))
    row = st.tuples(st.sampled_from([0, 1, 15, 63, 64, 100, 150]), st.sampled_from([0, 1, 1, 3, 20, 70]))
    rows = draw(st.lists(row, min_size=1, max_size=4))
    heads, kv = draw(st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3), (5, 5)]))
    dim, block = draw(st.sampled_from([1, 8, 16, 24, 64, 80])), draw(st.sampled_from([1, 8, 16, 32]))
    return cache(drawn, rows, heads, kv, dim, block, draw(st.sampled_from(FLOATS)))


WINDOWS, CAPS = st.sampled_from([None, 1, 5, 64, 90]), st.sampled_from([None, 2.0, 30.0])


@FEW
@given(caches(), WINDOWS, CAPS)
def test_attention_is_what_the_reference_attends(
    here: kernel.Kernel, it: Cache, window: int | None, softcap: float | None
) -> None:
    scale = it.q.shape[2] ** -0.5
    found = here.attend(it.q, *it.rest(), scale, window, softcap)
    near(found, reference.attend(it.q, *it.rest(), scale, window, softcap))


def alone(here: kernel.Kernel, it: Cache, t: int, window: int | None) -> Tensor:
    """What token ``t`` of the line attends in a call of its own."""
    row = torch.repeat_interleave(torch.arange(len(it.before)), it.starts.diff().long())[t]
    before = (it.before[row] + t - it.starts[row]).view(1).int()
    starts, tables = torch.tensor([0, 1], dtype=torch.int32), it.tables[row][None].contiguous()
    return here.attend(it.q[t][None], it.keys, it.values, tables, starts, before, 0.3, window)[0]


@FEW
@given(caches(), WINDOWS, st.integers(0, 2**10))
def test_a_token_attends_as_it_would_alone(here: kernel.Kernel, it: Cache, window: int | None, seed: int) -> None:
    if len(it.q):
        t = seed % len(it.q)
        assert torch.equal(here.attend(it.q, *it.rest(), 0.3, window)[t], alone(here, it, t, window))


@pytest.mark.parametrize("window", [None, 90, 150])
def test_where_a_row_is_cut_does_not_show(here: kernel.Kernel, window: int | None) -> None:
    """Rows of several pieces of positions, and windows that begin within one."""
    it = cache(Drawn(7), [(100, 30), (37, 150)], 4, 2, 24, 16, torch.float32)
    together = here.attend(it.q, *it.rest(), 0.3, window)
    for t in range(0, len(it.q), 7):
        assert torch.equal(together[t], alone(here, it, t, window))


def test_a_long_prefill_takes_the_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 144 to 1,024 new tokens it is the faster one, beside torch's attention over gathered keys."""
    if kernel.library() is None:
        pytest.skip("no kernel is compiled")
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    it = cache(Drawn(7), [(0, 512)], 3, 1, 16, 16, torch.float32)
    found = kernel.attend(it.q, *it.rest(), 0.3)
    monkeypatch.undo()
    near(found, reference.attend(it.q, *it.rest(), 0.3))


@FEW
@given(caches())
def test_store_writes_the_slots_and_nothing_else(here: kernel.Kernel, it: Cache) -> None:
    blocks, block, kv, dim = it.keys.shape
    drawn = Drawn(blocks)
    slots = torch.randperm(blocks * block, generator=drawn.generator)[: blocks * block // 2]
    k, v = (drawn(kv, len(slots), dim, dtype=it.keys.dtype).transpose(0, 1) for _ in range(2))
    found, expected = ([part.nan_to_num() for part in (it.keys, it.values)] for _ in range(2))
    here.store(k, v, *found, slots)
    reference.store(k, v, *expected, slots)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What was found before is forgotten, now and afterwards."""
    monkeypatch.delenv(kernel.INTERFACE.variable, raising=False)
    kernel.library.cache_clear()
    yield monkeypatch
    kernel.library.cache_clear()


def test_without_a_library_the_reference_runs_and_it_is_said(
    afresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    afresh.setattr(kernel, "INTERFACE", replace(kernel.INTERFACE, library=build.SERVING.at(tmp_path)))
    form = thin(Drawn(1), 4, 8, 8, torch.float32)
    x, y, starts = torch.ones(2, 8), torch.zeros(2, 8), torch.tensor([0, 2], dtype=torch.int32)
    for _ in range(2):
        found = kernel.grouped(x, y.clone(), starts, [form], entries([form]))
    assert torch.equal(found, reference.grouped(x, y.clone(), starts, [form]))
    (record,) = caplog.records
    assert "serving: the slow reference, for no kernel is compiled" in record.getMessage()
    finding = machine.serve_kernel()
    assert finding.state is machine.State.WARN and "tarsia.quant.build" in str(finding.do)


def test_a_kernel_that_is_not_there_can_not_be_forced(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv(kernel.INTERFACE.variable, "neon")
    with pytest.raises(ConfigError, match=kernel.INTERFACE.variable):
        kernel.library()
    assert machine.serve_kernel().state is machine.State.FAIL


def test_doctor_says_what_serves() -> None:
    finding = machine.serve_kernel()
    assert finding.state is machine.State.OK and finding.name == "serve kernel"


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="called wrongly"):
        call()


def test_what_reaches_beyond_the_pools_is_refused(here: kernel.Kernel) -> None:
    it = cache(Drawn(3), [(5, 2)], 2, 1, 8, 4, torch.float32)
    for wrong in (-1, len(it.keys)):
        tables = it.tables.clone()
        tables[0, 1] = wrong
        refused(lambda tables=tables: here.attend(it.q, it.keys, it.values, tables, it.starts, it.before, 1.0))
    refused(lambda: here.attend(it.q, it.keys, it.values, it.tables, it.starts, it.before + 90, 1.0))
    new = torch.zeros(1, 1, 8)
    for wrong in (-1, len(it.keys) * 4):
        refused(lambda wrong=wrong: here.store(new, new, it.keys, it.values, torch.tensor([wrong])))


def test_rows_and_entries_that_can_not_be_are_refused(here: kernel.Kernel) -> None:
    form = thin(Drawn(1), 4, 8, 8, torch.float32)
    x, y, starts = torch.ones(2, 8), torch.zeros(2, 8), torch.tensor([0, 2], dtype=torch.int32)
    sound = entries([form])
    for place, value in ((0, 0), (1, 0), (2, -1), (7, 2)):
        wrong = sound.clone()
        wrong[0, place] = value
        refused(lambda wrong=wrong: here.grouped(x, y, starts, [form], wrong))
    refused(lambda: here.grouped(x, y, torch.tensor([-1, 2], dtype=torch.int32), [form], sound))
    refused(lambda: here.grouped(x, y, torch.tensor([0, 3], dtype=torch.int32), [form], sound))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        here.grouped(x.half(), y.half(), starts, [form], sound)
    assert not y.any()


def test_what_is_no_number_stays_none(here: kernel.Kernel) -> None:
    it = cache(Drawn(3), [(70, 2)], 2, 1, 8, 4, torch.float32)
    it.keys[it.tables[0, 1], 2, 0, 3] = float("nan")
    assert here.attend(it.q, *it.rest(), 1.0).isnan().all()
