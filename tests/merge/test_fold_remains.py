"""What is left of a change, and when a proof is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.core.errors import MergeError
from tarsia.merge import proof, remains
from tarsia.merge.folding import Folding
from tarsia.merge.proof import Proof, _judge
from tarsia.merge.remains import NOTHING, Remains, check_rounded, of_all, sampled, worst
from tarsia.methods.lora import LoRA


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.floats(-0.5, 1.5), st.integers(1, 64))
def test_the_share_is_the_projection(count, share, at_once):
    """Of a change of which ``share`` is stored, with an error across it, ``share`` is left: in pieces of any size."""
    draw = torch.Generator().manual_seed(count)
    before, change = (torch.randn(count, generator=draw, dtype=torch.float64) for _ in range(2))
    across = torch.randn(count, generator=draw, dtype=torch.float64)
    across -= change * (across @ change) / (change @ change)
    was, remains._AT_ONCE = remains._AT_ONCE, at_once
    try:
        found = Remains.of(before, before + change, before + share * change + across)
    finally:
        remains._AT_ONCE = was
    assert found.share == pytest.approx(share, abs=1e-6)
    assert found.count == count and found.weight == pytest.approx(float(before @ before))


def test_parts_add_up_and_the_worst_come_first():
    ones = torch.ones(4)
    lost = Remains.of(0 * ones, ones, 0 * ones)
    whole = Remains.of(0 * ones, ones, ones)
    assert (lost.share, whole.share, NOTHING.share) == (0, 1, 1)
    assert of_all({"a": lost, "b": whole}).share == 0.5
    assert [name for name, _ in worst({"a": whole, "b": lost, "c": NOTHING})] == ["b", "a"]
    assert whole.off < 1e-6 < lost.off


@pytest.mark.parametrize("rows", [17, 99, 1000])
def test_a_sample_has_the_first_the_last_and_those_that_change_most(rows):
    squares = torch.rand(rows, generator=torch.Generator().manual_seed(rows))
    chosen = sampled((rows, 1 << 16), squares).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) <= 2 * remains.SAMPLED
    assert {0, rows - 1, *squares.topk(remains.SAMPLED).indices.tolist()} <= set(chosen)
    assert sampled((rows, remains.WHOLE // rows), squares) is None and sampled((16, 1 << 20), squares[:16]) is None


class At:
    """A fold of one LoRA into one weight, with nothing but what ``in_place`` asks for."""

    units = (type("Unit", (), {"names": ("weight",)}),)

    def __init__(self):
        self.remains = {}


def at_one_row(shape, row, dtype, size=0.5):
    """A weight, a LoRA that changes one of its rows alone, and what remains of it."""
    draw = torch.Generator().manual_seed(row)
    a, b = torch.randn(1, shape[1], generator=draw), torch.zeros(shape[0], 1)
    b[row] = size
    fold, weight = At(), torch.randn(shape, generator=draw).to(dtype)
    Folding.in_place(fold, fold, LoRA(a, b, 1.0), weight.clone())()
    return fold.remains["weight"], float((b @ a).double().square().sum())


@pytest.mark.parametrize("shape,whole", [((64, 64), True), ((700, 200), False), ((129, 4096), False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_in_one_row_is_seen_whole_or_in_the_sample(shape, whole, dtype):
    for row in (0, 50, shape[0] - 3):
        found, intended = at_one_row(shape, row, dtype)
        assert found.intended == pytest.approx(intended, rel=1e-4), "of all of the weight, whatever was looked at"
        assert found.share == pytest.approx(1, abs=0.02) and found.count == shape[0] * shape[1]
        assert (found.sample is None) == whole
        lost, _ = at_one_row(shape, row, torch.bfloat16, 1e-6)
        assert lost.intended and lost.share < 0.5 and lost.stray > 0.5


def test_what_no_sample_saw_is_not_there():
    nothing = Remains(100, 0.0, 0.0, 0.0, 0.0, 1.0)
    assert nothing.values["share"] is None, "no change, so none is measured"
    lost = nothing.spread(50, 10, 2.0)
    assert (lost.share, lost.stray, lost.weight, lost.count, lost.sample) == (0, 1, 5, 500, 10)


def test_an_error_in_any_row_of_a_small_weight_is_found(monkeypatch):
    def broken(self, weight, out):
        out[200] += 1.0
        return out

    monkeypatch.setattr(LoRA, "fold_into", broken)
    with pytest.raises(MergeError, match="not what its fold is"):
        at_one_row((256, 64), 100, torch.bfloat16)


GOOD = Proof(4, 100, True, "float32", 10.0, 5.0, 2.0, 0.1, 0.02, 0.4, 0.08, 0.1, 0.02, 1.0)


@pytest.mark.parametrize(
    "bad,says",
    [
        ({"difference": 0.41}, "does not say"),
        ({"difference_mean": 0.081}, "does not say"),
        ({"difference": float("nan")}, "does not say"),
        ({"moved_mean": 0.039}, "prove nothing"),
        ({"moved_mean": 1e-5, "difference_mean": 0.0}, "prove nothing"),
    ],
)
def test_a_proof_is_judged(bad, says):
    _judge(GOOD)
    with pytest.raises(MergeError, match=says):
        _judge(replace(GOOD, **bad))


def test_of_many_positions_an_even_part_is_compared(monkeypatch):
    inputs = {"input_ids": torch.ones(2, 50), "attention_mask": torch.ones(2, 50)}
    inputs["attention_mask"][0, 30:] = 0
    assert len(proof.chosen(inputs, 10, 1)) == 80
    monkeypatch.setattr(proof, "_KEPT", 100)
    found = proof.chosen(inputs, 10, 1).tolist()
    assert len(found) == 10 and found[0] == 0 and found[-1] == 99


def test_outputs_that_are_no_numbers_are_refused():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, input_ids, **_):
            logits = torch.full((*input_ids.shape, 3), float("inf"))
            return type("Out", (), {"logits": logits})

    with pytest.raises(MergeError, match="not all numbers"):
        proof.said(Broken(), {"input_ids": torch.ones(1, 2, dtype=torch.int64)}, torch.arange(2))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(-8, 4), st.integers(1, 99))
def test_rounding_is_told_from_error(dtype, power, count):
    """What is rounded once passes, whatever its size; a number that is two steps off does not."""
    exact = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 10.0**power
    stored = exact.to(dtype)
    check_rounded("a", exact, stored)
    largest = int(stored.abs().argmax())
    if float(stored[largest].abs()) > 1e-3:
        wrong = stored.clone()
        wrong[largest] *= 1 + max(3 * torch.finfo(dtype).eps, 1e-4)
        with pytest.raises(MergeError, match="a is not what its fold is"):
            check_rounded("a", exact, wrong)
