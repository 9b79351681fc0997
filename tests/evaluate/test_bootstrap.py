"""Intervals cover what they promise to, and pairs are pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.evaluate import bootstrap
from tarsia.evaluate.bootstrap import LEVEL, interval, paired

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@settings(max_examples=30)
@given(SCORES, st.integers(0, 5))
def test_the_mean_lies_inside_and_the_seed_decides(scores: list[float], seed: int) -> None:
    found = interval(scores, seed, 1000)
    least, most = (min(scores), max(scores)) if min(scores) < max(scores) else (0.0, 1.0)
    assert least - 1e-12 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= most + 1e-12
    assert found == interval(scores, seed, 1000)


def test_coverage() -> None:
    """Of 400 samples of 80 rows, the interval holds the true share in about LEVEL of them."""
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(400):
        found = interval((generator.random(80) < 0.7).astype(float).tolist(), trial, 1000)
        held += found.low <= 0.7 <= found.high
    assert LEVEL - 0.05 <= held / 400 <= LEVEL + 0.04


def test_width_is_that_of_the_normal_law() -> None:
    scores = [1.0] * 150 + [0.0] * 150
    found = interval(scores)
    half = 1.96 * 0.5 / 300**0.5
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)


def test_pairs_cancel_what_both_share() -> None:
    """Rows that nobody gets right do not widen the difference; an unpaired interval would be ten times as wide."""
    before = [float(i % 2) for i in range(400)]
    after = [1.0 if i < 4 else b for i, b in enumerate(before)]
    found = paired(before, after)
    assert found.mean == pytest.approx(2 / 400)
    assert found.high - found.low < 0.02
    unseen = 1 - 0.05 ** (1 / 400)
    assert paired(before, before) == bootstrap.Interval(0.0, pytest.approx(-unseen), pytest.approx(unseen))
    with pytest.raises(ValueError, match="no pairs"):
        paired(before, after[1:])


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random(50).tolist()
    whole = interval(scores, resamples=1000)
    monkeypatch.setattr(bootstrap, "_CHUNK", 700)
    assert interval(scores, resamples=1000) == whole


@pytest.mark.parametrize("scores", [[], [[1.0]]])
def test_no_scores_no_interval(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="one score or more"):
        interval(scores)
