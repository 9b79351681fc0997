"""Seconds of a step: laws that hold whatever the machine, and counts that torch's own counter confirms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from train.small import world

from bench.cases.plan_time import RECIPES, seeds, summary
from tarsia.core.errors import PlanError
from tarsia.plan import cards
from tarsia.plan.ghost import Op
from tarsia.plan.grid import Grid
from tarsia.plan.ledger import Ledger
from tarsia.plan.operations import Operations, by_phase, operations
from tarsia.plan.overhead import Overhead, opened, overhead
from tarsia.plan.rehearse import Outline, rehearsing
from tarsia.plan.speeds import Kernels
from tarsia.plan.time import OfCard, predict
from tarsia.plan.work import Kind, Work, work_of
from tarsia.train.memory import Phase
from tarsia.train.recipe import Recipe

FLOAT = torch.float32
OVERHEAD = Overhead(forward=1e-5, backward=1e-6, update=1e-7, step=1e-4)


class Noted(TorchDispatchMode):
    """Notes operations that are really run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[Op] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves
        inputs, outputs = (
            tuple((tuple(t.shape), t.stride(), t.dtype) for t in flat(given) if isinstance(t, torch.Tensor))
            for given in ((args, kwargs or {}), out)
        )
        if not func.is_view:
            self.ops[Op(func.name(), "step/forward", inputs, () if func._schema.is_mutable else outputs)] += 1
        return out


@dataclass(frozen=True)
class Even:
    """A machine that moves a byte in a nanosecond and does an operation in a tenth of that."""

    error: float = 0.1
    basis: str = "nothing"
    waits: bool = True
    overhead: Overhead = OVERHEAD
    page: float = 1e-9

    def seconds(self, work: Work) -> float:
        return 1e-9 * work.bytes + 1e-10 * work.flops


def op(name: str, *shapes: tuple[int, ...], out: tuple[int, ...] = (4, 4), phase: str = "step/forward") -> Op:
    return Op(name, phase, tuple(_spec(shape) for shape in shapes), (_spec(out),))


def _spec(shape: tuple[int, ...]) -> Any:
    return shape, torch.empty(shape, device="meta").stride(), FLOAT


def noted(run: Callable[[], object]) -> Counter[Op]:
    with Noted() as seen:
        run()
    return seen.ops


def _convolution() -> None:
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    F.conv2d(x, torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5), stride=4).sum().backward()


def _linear() -> None:
    x, w, b = (torch.randn(size, requires_grad=True) for size in ((6, 10), (4, 10), (4,)))
    (F.linear(x, w, b).sum() + torch.bmm(x.view(2, 3, 10), torch.randn(2, 10, 5)).sum()).backward()


@pytest.mark.parametrize("run", [_convolution, _linear])
def test_operations_of_products_are_counted_as_torch_counts_them(run: Callable[[], None]) -> None:
    with FlopCounterMode(display=False) as counter:
        run()
    ours = sum(n * work.flops for each, n in noted(run).items() for work in work_of(each))
    assert counter.get_total_flops() > 0
    assert ours == counter.get_total_flops()


def test_operations_of_attention_are_counted_as_torch_counts_them() -> None:
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    ops = noted(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    flops = {work.kind: work.flops for each in ops for work in work_of(each)}
    assert flops[Kind.ATTENTION] == sdpa_flop_count(q.shape, k.shape, v.shape)
    assert flops[Kind.ATTENTION_BACK] == sdpa_backward_flop_count(q.shape, q.shape, k.shape, v.shape)


X = torch.ones(8, 4, 64)
KINDS: Mapping[str, tuple[Callable[[], object], Kind]] = {
    "in order": (lambda: X + X, Kind.STREAM),
    "by a number": (lambda: X * 2.0, Kind.STREAM),
    "in place": (lambda: X.clone().mul_(X), Kind.IN_PLACE),
    "shared by heads": (lambda: X * X[:, :1], Kind.STRIDED),
    "heads turned": (lambda: X.transpose(0, 1) + X.view(4, 8, 64), Kind.STRIDED),
    "columns": (lambda: X.transpose(0, 2).contiguous(), Kind.CROSSED),
    "dtypes": (lambda: X.bfloat16(), Kind.CONVERT),
    "two dtypes": (lambda: X + X.bfloat16(), Kind.CONVERT),
    "along": (lambda: X.sum(-1), Kind.REDUCE),
    "across": (lambda: X.sum(1), Kind.ACROSS),
    "where": (lambda: torch.where(X > 0, X, 0.0), Kind.CHOOSE),
    "cat": (lambda: torch.cat((X, X), -1), Kind.JOIN),
    "rows": (lambda: X[torch.tensor([1, 2])], Kind.GATHER),
    "softmax": (lambda: X.softmax(-1), Kind.NORMALISE),
    "film": (lambda: F.conv3d(torch.ones(2, 3, 2, 4, 4), torch.ones(5, 3, 2, 4, 4)), Kind.FILM),
    "nothing": (lambda: torch.empty(4), Kind.NOTHING),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_operation_is_of_its_kind(name: str) -> None:
    run, kind = KINDS[name]
    found = {work.kind for each in noted(run) for work in work_of(each)}
    assert kind in found


def test_what_is_picked_from_a_large_table_counts_and_not_the_table() -> None:
    (work,) = work_of(op("aten::embedding", (50_000, 64), (7,), out=(7, 64)))
    assert work.size == (7 * 64,)


def test_an_unknown_operation_is_counted_by_its_bytes_and_is_said() -> None:
    strange = op("aten::never_heard_of", (10, 10), out=(10, 10))
    step = predict({strange: 3}, Even(), tensors=0)
    assert step.kernels == {Kind.STREAM: pytest.approx(3 * 800e-9)}
    assert step.unknown == {"aten::never_heard_of": 3}
    assert "3 aten::never_heard_of" in step.doubts[0]
    assert not predict({op("aten::mm", (2, 2), (2, 2)): 1}, Even(), tensors=0).doubts


def test_time_adds_up_over_operations() -> None:
    a = {op("aten::mm", (2, 3), (3, 4), out=(2, 4)): 2, op("aten::add.Tensor", (5, 5), (5, 5), out=(5, 5)): 1}
    b = {op("aten::mm", (9, 3), (3, 4), out=(9, 4), phase="step/backward"): 1}
    both, alone = (predict(ops, Even(), tensors=4) for ops in (a | b, {}))
    parts = [predict(ops, Even(), tensors=4).seconds - alone.seconds for ops in (a, b)]
    assert both.seconds == pytest.approx(sum(parts) + alone.seconds)
    assert alone.seconds == pytest.approx(4e-7 + 1e-4)
    assert predict(a, Even(), tensors=4, rows=3, per_row=2.0).seconds == pytest.approx(parts[0] + alone.seconds + 6)


def test_what_is_issued_costs_by_the_part_of_the_step() -> None:
    costs = {phase: predict({op("aten::add", phase=phase): 10}, Even(), tensors=0).issuing for phase in PARTS}
    assert costs == {part: pytest.approx(10 * cost) for part, cost in PARTS.items()}


PARTS = {"step/forward": 1e-5, "step/backward": 1e-6, "step/update": 0.0}


def test_a_gpu_computes_while_python_issues() -> None:
    ops = {op("aten::mm", (1000, 1000), (1000, 1000), out=(1000, 1000)): 10}
    slow, both = predict(ops, Even(waits=False), tensors=0), predict(ops, Even(), tensors=0)
    assert both.seconds - slow.seconds == pytest.approx(slow.issuing)
    assert slow.run(7) == 7 * slow.seconds
    assert slow.run(7, fresh=2**30) == pytest.approx(7 * slow.seconds + 2**30 * 1e-9)


sizes = st.integers(1, 3000)
GRID = Grid.of([((m, n, k), 1e-6 + 1e-10 * m * n * k) for m in (1, 16, 256) for n in (4, 64) for k in (4, 64, 1024)])


@given(sizes, sizes, sizes)
def test_twice_the_rows_are_not_cheaper(m: int, n: int, k: int) -> None:
    assert GRID.seconds((2 * m, n, k)) >= GRID.seconds((m, n, k)) * (1 - 1e-9)
    assert GRID.seconds((2 * m, n, k)) <= GRID.seconds((m, n, k)) * 2.001 or m < 256


@given(st.lists(st.floats(1e-7, 1.0), min_size=9, max_size=9), sizes, sizes, st.integers(0, 1))
def test_nor_where_a_repeat_was_disturbed(seconds: list[float], m: int, n: int, which: int) -> None:
    places = [(a, b) for a in (1, 16, 256) for b in (2, 32, 512)]
    grid = Grid.of(zip(places, seconds, strict=True))
    more = (m + 1, n) if which else (m, n + 1)
    assert grid.seconds(more) >= grid.seconds((m, n)) * (1 - 1e-9)


def test_a_grid_gives_what_was_measured_and_fills_what_was_not() -> None:
    points = {(1, 4): 1e-6, (16, 4): 2e-6, (1, 64): 3e-6}
    grid = Grid.of(points.items())
    assert all(grid.seconds(size) == pytest.approx(value) for size, value in points.items())
    assert grid.seconds((4, 4)) == pytest.approx(math.sqrt(2) * 1e-6)
    assert grid.seconds((16, 64)) == pytest.approx(32e-6)  # sixteen times (16, 4); (1, 64) would be 48
    assert grid.seconds((160, 4)) == pytest.approx(20e-6)
    assert grid.seconds((1, 1)) == pytest.approx(1e-6)


def test_a_card_takes_no_less_than_its_peaks_allow() -> None:
    card = cards.find("rtx4090")
    (work,) = work_of(op("aten::mm", (4096, 4096), (4096, 4096), out=(4096, 4096)))
    assert OfCard(card).seconds(work) == pytest.approx(2 * 4096**3 / (card.fp32 * cards.PRODUCTS))
    (moved,) = work_of(op("aten::add.Tensor", (2**26,), (2**26,), out=(2**26,)))
    assert OfCard(card).seconds(moved) == pytest.approx(3 * 4 * 2**26 / (card.bandwidth * cards.MEMORY))
    (least,) = work_of(op("aten::add.Tensor", (2,), (2,), out=(2,)))
    assert OfCard(card).seconds(least) == cards.KERNEL


def test_a_time_from_the_table_of_cards_says_so_and_pretends_no_precision() -> None:
    step = predict({op("aten::mm", (64, 64), (64, 64)): 1}, OfCard(cards.find("H100")), tensors=1)
    assert "table of cards" in step.basis and "H100" in step.basis and "55%" in step.basis
    assert step.low <= step.seconds / 1.4 and step.high >= step.seconds * 1.4


@pytest.mark.parametrize("name", cards.CARDS)
def test_a_card_of_the_table_is_whole(name: str) -> None:
    card = cards.find(f"NVIDIA {name}")
    assert card.name == name and card.source
    assert 2**33 < card.memory < 2**38 and 1e11 < card.bandwidth < 1e13
    assert card.fp32 <= card.bf16 < 3e15


@pytest.mark.parametrize("written", ["rtx 4090", "RTX4090", "NVIDIA GeForce RTX 4090", "4090"])
def test_a_card_is_found_as_people_write_it(written: str) -> None:
    if written == "4090":
        with pytest.raises(PlanError, match="RTX 4090"):
            cards.find(written)
    else:
        assert cards.find(written).name == "RTX 4090"


def _steps(recipe: Recipe) -> tuple[Operations, int]:
    with rehearsing(recipe, Outline.of(recipe.model), Ledger()) as (run, ghost):
        tensors = sum(len(group["params"]) for group in run.optimiser.param_groups)
        return operations(run, ghost, [0]), tensors


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return world(tmp_path_factory.mktemp("time"))


def seconds(values: Mapping[str, Any], *overrides: str) -> float:
    ops, tensors = _steps(Recipe.of(values, overrides))
    return sum(predict(ops, Even(), tensors=tensors).kernels.values())


def test_recomputation_accumulation_and_batch_follow_from_what_is_run(values: dict[str, Any]) -> None:
    plain = seconds(values, "accumulate=1", "batch=4")
    assert seconds(values, "accumulate=1", "batch=4", "checkpointing=true") > 1.1 * plain
    # other rows in the second half, and one update for both
    assert 1.4 * plain < seconds(values, "accumulate=2", "batch=4") < 2.2 * plain
    assert seconds(values, "accumulate=1", "batch=8") > 1.5 * plain


def test_what_is_left_of_a_step_is_shared_out_so_that_it_adds_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is timed and foretold with what its own timing gave takes the time that it took."""
    kernels = Kernels({})
    monkeypatch.setattr(Kernels, "seconds", lambda self, work: 1e-7)
    with opened("cpu") as tiny:
        for each in tiny:
            each.sample()
        found = overhead(*tiny, kernels)
        for each in tiny:
            ops, tensors = _steps(each.recipe)
            assert tensors == each.tensors
            step = predict(ops, Even(overhead=found), tensors=tensors)
            parts = by_phase(ops)
            busy = {phase: 1e-7 * sum(held.values()) for phase, held in parts.items()}
            assert step.update == pytest.approx(each.seconds(Phase.UPDATE))
            if each is tiny[1]:  # what issues are shared out over
                whole = sum(each.seconds(phase) - busy[phase] for phase in (Phase.FORWARD, Phase.BACKWARD))
                assert step.issuing == pytest.approx(whole)
    assert found.forward > 0 and found.step > 0


def test_a_step_in_4_bits_runs_products_in_4_bits(values: dict[str, Any]) -> None:
    ops, _ = _steps(Recipe.of(values, ["four_bits={kind: nf4}"]))
    kinds = {work.kind for each in ops for work in work_of(each)}
    assert {Kind.FOUR_BITS, Kind.FOUR_BITS_BACK} <= kinds
    sixteen = {work.kind for each in _steps(Recipe.of(values))[0] for work in work_of(each)}
    assert not sixteen & {Kind.FOUR_BITS, Kind.FOUR_BITS_BACK}


def test_a_rehearsed_step_has_its_three_parts_and_no_unknown_operation(values: dict[str, Any]) -> None:
    ops, tensors = _steps(Recipe.of(values))
    parts = by_phase(ops)
    assert all(parts.values()) and sum(map(len, parts.values())) == len(ops)
    updates = [work for each in parts[Phase.UPDATE] for work in work_of(each) if work.kind is Kind.UPDATE]
    assert updates and all(work.size[0] > 0 for work in updates)
    assert not predict(ops, Even(), tensors=tensors).unknown


def test_what_is_held_to_are_twenty_recipes_that_nobody_looked_at() -> None:
    chosen = seeds()
    assert len(set(chosen)) == RECIPES == 20
    assert min(chosen) >= 10_000  # development is below


def test_how_far_a_plan_is_off_is_counted_to_both_sides() -> None:
    lines = [
        {"planned": planned, "seconds": 1.0, "low": planned / 1.2, "high": planned * 1.2, "basis": "here"}
        for planned in (0.5, 0.9, 1.0, 1.1, 1.3)
    ]
    found = summary(lines)
    assert found["error, median"] == "10.0%" and found["error, most"] == "50.0%"
    assert found["within what was said"] == "3 of 5" and found["recipes"] == 5
    assert found["planned / measured, median"] == 1.0
