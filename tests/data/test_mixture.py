"""The mix: the ratio asked for is the ratio drawn, every row in its turn, and resumed exactly."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.core.errors import ConfigError
from tarsia.data import Message, Mixture, Sample
from tarsia.data.mixture import Drawn, allot


def source(length: int, name: str = "s") -> tuple[Sample, ...]:
    return tuple(Sample((Message("user", (str(i),)),), (), name, i) for i in range(length))


def mixture(lengths: tuple[int, ...] = (50, 7, 300), weights: tuple[float, ...] = (9, 1, 5), seed: int = 3) -> Mixture:
    return Mixture([source(n, f"s{i}") for i, n in enumerate(lengths)], weights, seed)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=4),
    st.integers(-(2**70), 2**70),
    st.integers(0, 9000),
)
def test_any_row_is_a_pure_function_of_its_number(mix: list[tuple[int, float]], seed: int, start: int) -> None:
    lengths, weights = (tuple(column) for column in zip(*mix, strict=True))
    stream = mixture(lengths, weights, seed)
    later = [stream.row(n) for n in range(start, start + 20)]
    again = mixture(lengths, weights, seed)
    assert [again.row(n) for n in reversed(range(start, start + 20))] == later[::-1]
    assert all(row < lengths[s] for s, row in later)


def test_a_resumed_stream_goes_on_as_if_it_had_not_stopped() -> None:
    one, first, second = mixture(), mixture(), mixture()
    whole = [one.row(n) for n in range(9000)]
    assert [first.row(n) for n in range(4100)] + [second.row(n) for n in range(4100, 9000)] == whole


def test_the_stream_is_the_same_for_ever() -> None:
    """Written down once: a change here would change every run that is resumed."""
    stream = mixture()
    golden = [(0, 45), (0, 9), (2, 261), (0, 37), (0, 18), (2, 67), (0, 37)]
    assert [stream.row(n) for n in (0, 1, 2, 3, 4095, 4096, 100_000)] == golden


def test_every_epoch_of_a_source_has_every_row_once_in_another_order() -> None:
    stream = mixture((11, 5), (1, 2))
    drawn: list[list[int]] = [[], []]
    for n in range(2000):
        s, row = stream.row(n)
        drawn[s].append(row)
    for rows, length in zip(drawn, (11, 5), strict=True):
        epochs = [tuple(rows[i : i + length]) for i in range(0, len(rows) - length + 1, length)]
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert len(set(epochs)) > len(epochs) / 10
    positions = [drawn[0][i : i + 11].index(0) for i in range(0, len(drawn[0]) - 10, 11)]
    assert set(positions) == set(range(11))


def test_counts_are_exact() -> None:
    stream = mixture()
    rows = [stream.row(n)[0] for n in range(5000)]
    for n in (0, 1, 17, 4095, 4096, 4097, 5000):
        assert stream.counts(n) == tuple(rows[:n].count(s) for s in range(3))


@pytest.mark.parametrize("weights", [(0.9, 0.1), (1, 1), (0.99, 0.01), (3, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_ratio_asked_for_is_the_ratio_got(weights: tuple[float, float], seed: int) -> None:
    n = 40_000
    asked, rest = mixture((20, 20), weights, seed).shares(n)
    assert asked.asked == pytest.approx(weights[0] / sum(weights))
    assert asked.got == asked.rows / n and asked.got + rest.got == 1
    assert abs(asked.got - asked.asked) < 4.5 * math.sqrt(asked.asked * (1 - asked.asked) / n)
    assert asked.epochs == asked.rows / 20
    assert mixture((20, 20), weights, seed).shares(0)[0].got == 0


def test_seeds_and_sources_have_orders_of_their_own() -> None:
    def order(stream: Mixture, s: int) -> list[int]:
        return [row for t, row in (stream.row(n) for n in range(500)) if t == s][:40]

    a, b = mixture((40, 40), (1, 1), 0), mixture((40, 40), (1, 1), 1)
    assert order(a, 0) != order(a, 1)
    assert order(a, 0) != order(b, 0)


def test_a_weight_of_zero_is_never_drawn() -> None:
    for weights in ((0, 1, 0), (1 / 3, 1 / 3, 0), (0.1 + 0.2, 0.7, 0.0)):
        counts = mixture((5, 5, 5), weights).counts(20_000)
        assert [c == 0 for c in counts] == [w == 0 for w in weights]
    # Ten tenths add up to less than 1 in floating point: what is left must not fall to the zero.
    assert sum([0.1] * 10) < 1
    assert Drawn([0.1] * 10 + [0.0], 3).edges[-1] == 1.0


def test_samples_come_from_their_sources() -> None:
    stream = mixture()
    for n in range(50):
        s, row = stream.row(n)
        assert (stream[n].source, stream[n].row) == (f"s{s}", row)


@pytest.mark.parametrize(
    "lengths, weights",
    [
        ((), ()),
        ((3,), (1, 1)),
        ((3, 0), (1, 1)),
        ((3, 3), (1, -1)),
        ((3,), (math.nan,)),
        ((3,), (math.inf,)),
        ((3,), (0,)),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(lengths: tuple[int, ...], weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="mixture"):
        mixture(lengths, weights)


steps = st.lists(st.floats(0.001, 10), min_size=1, max_size=6).flatmap(
    lambda weights: st.tuples(st.just(tuple(weights)), st.integers(len(weights), 40))
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_a_steps_rows_are_shared_out_by_weight(case: tuple[tuple[float, ...], int]) -> None:
    weights, rows = case
    counts = allot(weights, rows)
    assert sum(counts) == rows
    assert min(counts) >= 1
    quotas = [w / sum(weights) * rows for w in weights]
    assert all(count == 1 for count, quota in zip(counts, quotas, strict=True) if quota <= 1)
    if min(quotas) >= 1:
        assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))
    ordered = sorted(zip(weights, counts, strict=True))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(ordered) if a[0] < b[0])


def test_how_rows_are_shared_out_is_written_down() -> None:
    assert allot((0.9, 0.1), 8) == (7, 1)
    assert allot((0.8, 0.2), 8) == (6, 2)
    assert allot((0.99, 0.01), 4) == (3, 1)
    assert allot((5, 3, 0, 1), 7) == (4, 2, 0, 1)
    assert allot((1, 1, 1), 7) == (3, 2, 2)
    with pytest.raises(ConfigError, match="row of every source") as caught:
        allot((1, 0, 1, 1), 2)
    assert "2 rows a step, 3 sources" in caught.value.given


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 400))
def test_every_step_of_the_weighted_stream_has_its_rows(mix: list[tuple[int, int]], step: int) -> None:
    lengths, rows = (tuple(column) for column in zip(*mix, strict=True))
    size = sum(rows)

    def stream() -> Mixture:
        return Mixture([source(n, f"s{i}") for i, n in enumerate(lengths)], [1.0] * len(rows), 3, rows)

    one, again = stream(), stream()
    drawn = [one.row(n) for n in range(step * size, (step + 1) * size)]
    assert tuple(sum(s == i for s, _ in drawn) for i in range(len(rows))) == rows
    assert [again.row(n) for n in reversed(range(step * size, (step + 1) * size))] == drawn[::-1]
    assert one.counts(step * size) == tuple(step * count for count in rows)
    assert one.counts(step * size + 1)[drawn[0][0]] == step * rows[drawn[0][0]] + 1
    for share, count in zip(one.shares((step + 1) * size), rows, strict=True):
        assert share.got == pytest.approx(count / size)
        assert share.asked == count / size


def test_a_step_has_its_sources_spread_over_its_micro_batches() -> None:
    stream = Mixture([source(9, "a"), source(9, "b")], (0.75, 0.25), 0, (6, 2))
    assert [stream.row(n)[0] for n in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_each_source_is_walked_in_the_same_epochs_in_both_modes() -> None:
    lengths = (11, 5)
    sources = [source(n, f"s{i}") for i, n in enumerate(lengths)]
    sampled, weighted = Mixture(sources, (2, 1), 7), Mixture(sources, (2, 1), 7, (2, 1))
    for s, length in enumerate(lengths):
        walks = [[row for t, row in map(m.row, range(300)) if t == s][: 3 * length] for m in (sampled, weighted)]
        assert walks[0] == walks[1]
        assert sorted(walks[0][:length]) == list(range(length))


@pytest.mark.parametrize("rows", [(1,), (1, 0), (1, 1, 1), (2, 1, 1)])
def test_a_step_of_other_sources_than_those_with_a_weight_is_refused(rows: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="exactly the sources that have a weight"):
        Mixture([source(3), source(3), source(3)], (1, 1, 0), 0, rows)


def test_what_each_mode_estimates() -> None:
    """Sampled: the mean over drawn rows is sum_s lambda_s * (mean of s), in expectation. Weighted: in any step."""
    means, lengths, weights = (4.0, 1.0), (20, 20), (0.9, 0.1)
    expected = sum(w * m for w, m in zip(weights, means, strict=True))
    sources = [source(n, f"s{i}") for i, n in enumerate(lengths)]

    def lost(stream: Mixture, n: int) -> float:
        s, row = stream.row(n)
        return means[s] + (row - 9.5) / 10  # a source's rows lose its mean on average

    steps, rows = 200, 10
    runs = [Mixture(sources, weights, seed) for seed in range(20)]
    found = [sum(lost(stream, n) for n in range(steps * rows)) / (steps * rows) for stream in runs]
    deviation = math.sqrt(0.9 * 0.1 * (means[0] - means[1]) ** 2 / (steps * rows))
    assert abs(sum(found) / len(found) - expected) < 4 * deviation / math.sqrt(len(found))
    assert max(abs(value - expected) for value in found) > deviation / 2, "drawn, not allotted"

    weighted = Mixture(sources, weights, 0, (5, 5))
    for step in range(0, 40, 4):  # four steps are an epoch of each source
        drawn: dict[int, list[float]] = {0: [], 1: []}
        for n in range(step * 10, (step + 4) * 10):
            drawn[weighted.row(n)[0]].append(lost(weighted, n))
        assert sum(w * sum(drawn[s]) / len(drawn[s]) for s, w in enumerate(weights)) == pytest.approx(expected)
