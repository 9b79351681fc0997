"""States in pages: the bits of AdamW within any budget, the numbers of 8-bit AdamW, and refusals in words."""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import signal
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tarsia.core.errors import TrainingError
from tarsia.quant.eight_bits import BLOCK, SMALLEST, blocks, decode, encode
from tarsia.train.layout import LINE, lay, room_for
from tarsia.train.optimiser import adamw, restore, set_rates, state
from tarsia.train.paged import SMALLEST_PAGE, Form, PagedAdamW
from tarsia.train.pages import SUFFIX, FilePages, remove_left

BETAS = (0.9, 0.99)
ORACLE = "bitsandbytes is the oracle"


def made(shapes, form=None, turned=()):
    """Two parts over parameters of these shapes and an optimiser; those in ``turned`` are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    parts: list[dict[str, nn.Parameter]] = [{}, {}]
    for i, shape in enumerate(shapes):
        value = torch.randn(shape, generator=generator)
        parts[i % 2][f"t{i}/w"] = nn.Parameter(value.t() if i in turned and value.ndim == 2 else value)
    paces = {"t0/w": 4.0}
    return parts, adamw(parts, [1e-2, 3e-3], BETAS, 0.1, paces, form)


def steps(parts, optimiser, count, seed=1, without=()):
    """Steps with random gradients; ``without`` are (step, tensor) that have none."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [p for part in parts for p in part.values()]
    for step in range(count):
        set_rates(optimiser, 1 / (1 + step))
        for i, p in enumerate(tensors):
            grad = torch.randn(p.shape, generator=generator) * 10.0 ** (-(i % 5))
            # in the parameter's order of memory, as autograd has it
            p.grad = None if (step, i) in without else torch.empty_like(p).copy_(grad)
        optimiser.step()


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


def named(parts):
    return {name: p.detach() for part in parts for name, p in part.items()}


SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 5000)),
        st.tuples(st.integers(1, 70), st.integers(1, 90)),
        st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 40)),
    ),
    min_size=1,
    max_size=6,
)
MANY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MANY
@given(
    shapes=SHAPES,
    budget=st.one_of(st.none(), st.integers(2 * SMALLEST_PAGE, 200_000)),
    turned=st.sets(st.integers(0, 5)),
    without=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5))),
    leaving=st.sets(st.integers(0, 3)),
)
def test_in_32_bits_every_bit_is_that_of_the_unpaged_adamw(shapes, budget, turned, without, leaving, tmp_path):
    parts, plain = made(shapes, turned=turned)
    others, paged = made(shapes, Form(paged=True, budget=budget, folder=tmp_path / "pages"), turned)
    before = named(copy.deepcopy(parts))
    with paged.opened():
        for step in range(4):
            skipped = {(0, i) for s, i in without if s == step}
            steps(parts, plain, 1, step, skipped)
            steps(others, paged, 1, step, skipped)
            if step in leaving:
                held = paged.resident
                assert paged.leave() == held and paged.resident == 0
        same(named(parts), named(others))
        same(state(plain), state(paged))
        assert any(not torch.equal(before[name], now) for name, now in named(others).items()) or without
    assert not list(tmp_path.rglob(f"*{SUFFIX}"))


@MANY
@given(
    shapes=SHAPES,
    bits=st.sampled_from([8, 32]),
    first=st.one_of(st.none(), st.integers(2 * SMALLEST_PAGE, 100_000)),
    second=st.one_of(st.none(), st.integers(2 * SMALLEST_PAGE, 100_000)),
    turned=st.sets(st.integers(0, 5)),
)
def test_what_was_stored_under_one_budget_goes_on_under_another(shapes, bits, first, second, turned, tmp_path):
    whole, optimiser = made(shapes, Form(bits), turned)
    steps(whole, optimiser, 2, 1)
    steps(whole, optimiser, 2, 2)
    parts, begun = made(shapes, Form(bits, True, first, tmp_path / "a"), turned)
    with begun.opened():
        steps(parts, begun, 2, 1)
        held = {key: value.clone() for key, value in state(begun).items()}
    later, resumed = made(shapes, Form(bits, True, second, tmp_path / "b"), turned)
    with torch.no_grad():
        for name, p in named(parts).items():
            named(later)[name].copy_(p)
    with resumed.opened():
        restore(resumed, held)
        same(state(resumed), held)
        steps(later, resumed, 2, 2)
        same(named(later), named(whole))
        same(state(resumed), state(optimiser))


class Counted(FilePages):
    """Counts the bytes of pages that live, whoever holds them."""

    def __init__(self, folder):
        super().__init__(folder)
        self.live = self.most = 0

    def room(self, numbers):
        made = super().room(numbers)
        self.live += 4 * numbers
        self.most = max(self.most, self.live)
        weakref.finalize(made.untyped_storage(), self._gone, 4 * numbers)
        return made

    def _gone(self, size):
        self.live -= size


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("budget", [2 * SMALLEST_PAGE, 50_000, 300_000, 1 << 22])
def test_no_more_bytes_than_the_budget_are_ever_there(bits, budget, tmp_path):
    parts, optimiser = made([(300, 177), (7,), (4096,), (90, 91)], Form(bits, True, budget, tmp_path))
    store = optimiser.store = Counted(tmp_path)
    with optimiser.opened():
        for _ in range(3):
            steps(parts, optimiser, 1)
            assert store.live == optimiser.resident <= budget
            assert store.most <= budget
        state(optimiser)
        assert store.most <= budget
        assert store.most == optimiser.bytes or store.most > budget / 2, "what there is room for is used"
        page = max(page.size for page in optimiser.pages)
        if optimiser.bytes > budget:
            assert optimiser.resident <= budget - 2 * 4 * page
        optimiser.leave()
        assert store.live == 0
    assert not list(tmp_path.glob(f"*{SUFFIX}"))


@MANY
@given(
    tensors=st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([8, 32])), max_size=8),
    limit=st.integers(2 * BLOCK, 5000),
)
def test_pages_hold_every_number_once_and_nothing_overlaps(tensors, limit):
    pages = lay(tensors, limit)
    seen: dict[int, int] = {}
    for page in pages:
        assert page.index == pages.index(page) and 0 < page.size <= limit
        place = 0
        for piece in page.pieces:
            assert piece.offset == place and piece.offset % LINE == 0
            assert piece.begin == seen.get(piece.tensor, 0) and piece.begin % BLOCK == 0
            assert piece.last == (piece.end == tensors[piece.tensor][0])
            seen[piece.tensor] = piece.end
            place += room_for(piece.count, piece.bits)
            held = torch.zeros(page.size)
            parts = piece.moments(held) if piece.bits == 32 else piece.codes(held)
            spans = sorted((p.storage_offset() * p.element_size(), p.numel() * p.element_size()) for p in parts)
            ends = [start + size for start, size in spans]
            assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))
            assert spans[0][0] >= 4 * piece.offset and ends[-1] <= 4 * place
        assert place == page.size
    assert seen == {i: count for i, (count, _) in enumerate(tensors) if count}


def by_hand(p, g, m, v, step, lr, decay):
    """One step of AdamW (arXiv:1711.05101, algorithm 2) in float64."""
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    first, second = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
    return p * (1 - lr * decay) - lr * first / (second.sqrt() + 1e-8), m, v


def test_in_8_bits_each_step_is_adamw_between_decoding_and_encoding():
    parts, optimiser = made([(80, 70)], Form(8))
    ((_, parameter),) = parts[0].items()
    count = parameter.numel()
    assert optimiser.pages[0].pieces[0].bits == 8
    codes = [torch.zeros(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8)]
    scales = [torch.zeros(blocks(count)), torch.zeros(blocks(count))]
    for step in range(1, 6):
        m, v = (decode(codes[i], scales[i], i == 0).double() for i in (0, 1))
        p = parameter.detach().double().view(-1)
        steps(parts, optimiser, 1, step)
        expected, m, v = by_hand(p, parameter.grad.double().view(-1), m, v, step, 4e-2, 0.1)
        torch.testing.assert_close(parameter.detach().view(-1).double(), expected, rtol=1e-4, atol=1e-6)
        held = state(optimiser)
        for i, (key, moment) in enumerate((("exp_avg", m), ("exp_avg_sq", v))):
            wanted, wide = encode(moment.float(), i == 0)
            codes[i], scales[i] = held[f"t0/w/{key}"].view(-1), held[f"t0/w/{key}_scales"]
            away = (codes[i].int() - wanted.int()).abs()
            assert away.max() <= 1 and away.float().mean() < 1e-3, "but for ties, its codes"
            torch.testing.assert_close(scales[i], wide, rtol=1e-5, atol=0)


def test_8_bit_steps_are_those_of_bitsandbytes(monkeypatch):
    """With its rounding to the nearest level, as on a GPU (on a processor a table of places stands in for it)."""
    optim = pytest.importorskip("bitsandbytes.optim", reason=ORACLE)
    theirs_cpu = pytest.importorskip("bitsandbytes.backends.cpu.ops", reason=ORACLE)
    portable = torch.ops.bitsandbytes.quantize_blockwise.default

    def nearest(x, code, absmax, out, block):
        codes, scales = portable._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, x, code, block)
        out.copy_(codes)
        absmax.copy_(scales)

    monkeypatch.setattr(theirs_cpu, "_quant_blockwise_fp32_direct", nearest)
    torch.manual_seed(0)
    start = torch.randn(64, 128)
    mine, small = nn.Parameter(start.clone()), nn.Parameter(torch.randn(100))
    ours = adamw([{"a/w": mine, "a/b": small}], [1e-2], BETAS, 0.1, {}, Form(8))
    other, other_small = nn.Parameter(start.clone()), nn.Parameter(small.detach().clone())
    theirs = optim.AdamW8bit([other], lr=1e-2, betas=BETAS, weight_decay=0.1)
    vectors = optim.AdamW8bit([other_small], lr=1e-2, betas=BETAS, weight_decay=0.0)
    for step in range(1, 21):
        # as wide in size as gradients are, so that small levels matter
        grad = torch.randn(64, 128) * 10 ** (-3 * torch.rand(64, 128))
        mine.grad, other.grad = grad, grad.clone()
        small.grad = torch.randn(100)
        other_small.grad = small.grad.clone()
        ours.step()
        theirs.step()
        vectors.step()
        held, reference = state(ours), theirs.state[other]
        for key, codes in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
            away = (held[f"a/w/{key}"].int() - reference[codes].int()).abs()
            assert (away > 0).float().mean() < 0.005, (step, key)
        assert ((mine - other).abs() > 1e-5).float().mean() < 0.01, step
    assert (mine - start).abs().mean() > 0.03
    torch.testing.assert_close(small, other_small, rtol=1e-5, atol=1e-6)
    assert held["a/b/exp_avg"].dtype == torch.float32
    assert vectors.state[other_small]["state1"].dtype == torch.float32


def test_small_tensors_stay_in_32_bits_and_the_bytes_say_so():
    count = SMALLEST
    _, optimiser = made([(count - 1,), (count,)], Form(8))
    assert optimiser.bytes == 4 * (2 * 4096 + 2 * (count // 4 + LINE))
    assert optimiser.line == "states in 8 bits (1 small tensors in 32)"
    _, optimiser = made([(1000, 1000)], Form(8))
    assert optimiser.bytes / 1e6 == pytest.approx(2 + 2 / 64, rel=1e-3)
    _, optimiser = made([(1000, 1000)], Form(32, True, 2_000_000))
    assert "paged" in optimiser.line and "of 8,000,000 bytes stay" in optimiser.line


def test_a_page_that_was_changed_on_the_disk_is_an_error(tmp_path):
    parts, optimiser = made([(200, 100)], Form(32, True, 50_000, tmp_path))
    with optimiser.opened():
        steps(parts, optimiser, 1)
        with optimiser.store.path.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            byte = file.read(1)
            file.seek(-100, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(TrainingError, match=r"states is lost[\s\S]*not those that were written[\s\S]*checkpoint"):
            steps(parts, optimiser, 1)


def test_a_page_file_that_was_cut_is_an_error(tmp_path):
    parts, optimiser = made([(200, 100)], Form(32, True, 50_000, tmp_path))
    with optimiser.opened():
        steps(parts, optimiser, 1)
        os.truncate(optimiser.store.path, os.path.getsize(optimiser.store.path) - 5000)
        with pytest.raises(TrainingError, match=r"states is lost[\s\S]*bytes are there"):
            steps(parts, optimiser, 1)


def test_a_page_file_that_was_removed_is_still_there_for_its_run(tmp_path):
    parts, optimiser = made([(200, 100)], Form(32, True, 50_000, tmp_path / "pages"))
    others, plain = made([(200, 100)])
    with optimiser.opened():
        steps(parts, optimiser, 1)
        optimiser.store.path.unlink()
        steps(parts, optimiser, 2)
    steps(others, plain, 1)
    steps(others, plain, 2)
    same(named(parts), named(others))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_said_at_the_start_or_when_it_happens(call, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parts, optimiser = made([(200, 100)], Form(32, True, 50_000, tmp_path / "pages"))
    monkeypatch.setattr(os, call, full)
    reached = []
    with pytest.raises(TrainingError, match=r"disk is full[\s\S]*optimiser\.path"), optimiser.opened():
        reached.append(steps(parts, optimiser, 1))
    assert reached == []
    assert not (tmp_path / "pages").exists()


def test_a_file_system_that_can_reserve_nothing_is_no_error(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    parts, optimiser = made([(200, 100)], Form(32, True, 50_000, tmp_path))
    with optimiser.opened():
        steps(parts, optimiser, 2)


def test_a_folder_that_can_not_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    _, optimiser = made([(200, 100)], Form(32, True, 50_000, tmp_path / "file"))
    with pytest.raises(TrainingError, match="can not be written"), optimiser.opened():
        pass


class Narrow(FilePages):
    """A device with room for so many bytes of pages; says what CUDA's allocator or the processor's does."""

    def __init__(self, folder, limit, error):
        super().__init__(folder)
        self.limit, self.error, self.live = limit, error, 0

    def room(self, numbers):
        if self.live + 4 * numbers > self.limit:
            raise type(self.error)(*self.error.args)
        self.live += 4 * numbers
        made = super().room(numbers)
        weakref.finalize(made.untyped_storage(), self._gone, 4 * numbers)
        return made

    def _gone(self, size):
        self.live -= size


REFUSALS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_where_there_is_no_room_to_come_back_fewer_pages_stay(error, tmp_path, monkeypatch):
    monkeypatch.setattr("tarsia.train.paged.LARGEST_PAGE", 1 << 14)
    shapes = [(200, 100), (30,), (50, 60)]
    parts, optimiser = made(shapes, Form(32, True, None, tmp_path))
    others, plain = made(shapes)
    optimiser.store = Narrow(tmp_path, 70_000, error)
    with optimiser.opened():
        for seed in range(3):
            steps(parts, optimiser, 1, seed)
            steps(others, plain, 1, seed)
            told = optimiser.news()
            assert len(told) == (seed == 0)
            assert not told or "from now on 2 of 12 pages stay" in told[0]
        same(named(parts), named(others))
        same(state(optimiser), state(plain))
        optimiser.store.limit = 20_000
        optimiser.leave()
        with pytest.raises(TrainingError, match=r"no memory for the optimiser's states[\s\S]*bits: 8"):
            steps(parts, optimiser, 1)


def test_another_error_of_an_allocator_is_not_taken_for_too_little_memory(tmp_path):
    parts, optimiser = made([(200, 100)], Form(32, True, None, tmp_path))
    optimiser.store = Narrow(tmp_path, 0, RuntimeError("an illegal memory access was encountered"))
    with optimiser.opened(), pytest.raises(RuntimeError, match="illegal"):
        steps(parts, optimiser, 1)


def test_unpaged_states_have_nowhere_to_go(monkeypatch):
    parts, optimiser = made([(100, 100)], Form(8))
    steps(parts, optimiser, 1)
    assert optimiser.resident == optimiser.bytes
    assert optimiser.leave() == 0 and optimiser.resident == optimiser.bytes

    def nothing(numbers):
        raise REFUSALS[1]

    parts, optimiser = made([(100, 100)], Form(8))
    monkeypatch.setattr(optimiser.store, "room", nothing)
    with pytest.raises(TrainingError, match=r"no memory[\s\S]*paged: true"):
        steps(parts, optimiser, 1)


def test_states_of_another_form_are_refused():
    parts, eight = made([(100, 100), (9,)], Form(8))
    steps(parts, eight, 1)
    _, whole = made([(100, 100), (9,)], Form(32, True))
    with whole.opened(), pytest.raises(TrainingError, match=r"not of this form[\s\S]*t0/w/exp_avg[\s\S]*uint8"):
        restore(whole, state(eight))
    plain_parts, plain = made([(100, 100), (9,)])
    steps(plain_parts, plain, 1)
    with pytest.raises(TrainingError, match=r"not of this form[\s\S]*float32"):
        restore(eight, state(plain))
    lacking = {key: value for key, value in state(eight).items() if not key.endswith("_scales")}
    with pytest.raises(TrainingError, match="nothing"):
        restore(eight, lacking)
    with pytest.raises(KeyError):
        restore(eight, {"stranger/step": torch.zeros(())})
    with pytest.raises(TrainingError, match="stored"):
        eight.state_dict()
    with pytest.raises(TrainingError, match="stored"):
        eight.load_state_dict({})


@pytest.mark.parametrize("value", [torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(8, 8)[:, ::2]])
def test_what_has_no_states_in_pages_is_refused(value):
    with pytest.raises(TrainingError, match="side by side"):
        adamw([{"a": nn.Parameter(value)}], [1e-3], BETAS, 0.0, {}, Form(8))


def _dies_with_a_file(folder):
    store = FilePages(folder)
    store.open([1000], 0)
    store.wait(store.write(0, torch.ones(1000)))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_is_removed_and_a_living_ones_is_not(tmp_path):
    living = FilePages(tmp_path)
    living.open([1000], 0)
    process = multiprocessing.get_context("fork").Process(target=_dies_with_a_file, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = set(tmp_path.glob(f"*{SUFFIX}")) - {living.path}
    (tmp_path / "mine.txt").write_text("of the user")
    assert len(left) == 1
    assert set(remove_left(tmp_path)) == left
    other = FilePages(tmp_path)
    other.open([1000], 0)
    assert living.path.exists() and other.path != living.path
    for store in (living, other):
        store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_only_files_of_pages_are_removed(tmp_path):
    kept = ["thesis.pages", "states-1-0.pages.bak", "states-x-0.pages", "my-states-1-0.pages"]
    for name in (*kept, "states-1-0.pages", "states-1-3.pages"):
        (tmp_path / name).write_text("words")
    (tmp_path / "states-1-1.pages").mkdir()
    (tmp_path / "states-1-2.pages").symlink_to(tmp_path / "thesis.pages")
    removed = {"states-1-0.pages", "states-1-3.pages"}
    assert {path.name for path in remove_left(tmp_path)} == removed
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {*kept, "states-1-1.pages", "states-1-2.pages"}


def test_a_file_of_another_user_stays(tmp_path, monkeypatch):
    (tmp_path / "states-1-0.pages").touch()

    def refuses(*_, **__):
        raise PermissionError(errno.EACCES, "not yours")

    for name in ("unlink", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os if name == "open" else type(tmp_path), name, refuses)
            assert remove_left(tmp_path) == ()
    assert (tmp_path / "states-1-0.pages").exists()


def test_a_folder_that_was_made_goes_and_one_that_was_there_stays(tmp_path):
    for folder, stays in ((tmp_path / "made" / "here", False), (tmp_path, True)):
        _, optimiser = made([(200, 100)], Form(32, True, 50_000, folder))
        with optimiser.opened():
            assert folder.is_dir()
        assert folder.exists() == stays


def noted(own, name, orders):
    def order(page, tensor):
        orders.append((name, page))
        return own(page, tensor)

    return order


def test_the_pages_that_stay_are_the_first_and_each_other_is_read_once(tmp_path):
    """A circle through pages is what a cache of the latest ones never helps."""
    parts, optimiser = made([(200, 100)], Form(32, True, 50_000, tmp_path))
    assert isinstance(optimiser, PagedAdamW)
    with optimiser.opened():
        steps(parts, optimiser, 1)
        orders = []
        for name in ("read", "write"):
            own = getattr(optimiser.store, name)
            setattr(optimiser.store, name, noted(own, name, orders))
        steps(parts, optimiser, 1)
        stay = optimiser.resident // (4 * optimiser.pages[0].size)
        assert stay > 2
        others = list(range(stay, len(optimiser.pages)))
        assert [page for name, page in orders if name == "read"] == others
        assert [page for name, page in orders if name == "write"] == others
        # while one is computed on, the next one is on its way
        assert orders.index(("read", others[1])) < orders.index(("write", others[0]))
