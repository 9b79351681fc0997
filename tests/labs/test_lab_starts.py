"""The chapter on starts: its measures on matrices that are known, and a claim that fails where the start is wrong."""

from __future__ import annotations

import pytest
import torch

from tarsia.labs.chapters import starts
from tarsia.labs.frame.chapter import Desk
from tarsia.methods import loftq


def measured(tmp_path, monkeypatch):
    """mini-1 alone, two ranks, fewer questions."""
    monkeypatch.setattr(starts, "RANKS", (8, 64))
    monkeypatch.setattr(starts, "QUESTIONS", 60)
    return starts.measure(Desk(tmp_path, {}, lambda share, what: None))


def verdicts(found):
    return {bound.what: bound.judge(found, ["smol"]) for bound in starts.CHAPTER.bounds}


def test_what_a_rank_does_not_hold() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    for matrix in (torch.diag(values), torch.nn.functional.pad(torch.diag(values), (0, 7))):
        for turned in (matrix, matrix.t()):
            left = starts._left(turned)
            wanted = [values[rank:].square().sum() / values.square().sum() for rank in starts.GRID]
            assert left.tolist() == pytest.approx([float(w) for w in wanted], abs=1e-12)


@pytest.mark.slow
def test_it_runs_on_mini_1_alone(tmp_path, monkeypatch):
    found = measured(tmp_path, monkeypatch)
    assert set(verdicts(found).values()) == {"PASS", "not measured"}
    errors = [
        found.rows[f"mini-1 weights: {name}"]["of NF4's, %"] for name in ("NF4", "LoftQ, rank 8", "LoftQ, rank 64")
    ]
    assert errors[0] == 100 > errors[1] > errors[2]
    assert found.bases.keys() == {"mini-1"}
    # the error that is left is the tail that the singular values say
    tail = [1 - found.rows["mini-1 held: rank 8"]["of its error, %"] / 100, (errors[1] / 100) ** 2]
    assert tail[0] == pytest.approx(tail[1], rel=0.02)


def test_a_start_that_corrects_nothing_fails(tmp_path, monkeypatch):
    """Planted: LoftQ starts from a thousandth of the error."""
    real = loftq.start
    monkeypatch.setattr(loftq, "start", lambda lost, *rest: real(1e-3 * lost, *rest))
    failed = verdicts(measured(tmp_path, monkeypatch))
    assert failed["mini-1's error, rank 8, % of NF4's"] == "FAIL"
    assert failed["mini-1's KL, rank 8, % of NF4's"] == "FAIL"
    assert failed["a new PiSSA's change"] == "PASS"
