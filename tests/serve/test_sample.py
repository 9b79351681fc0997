"""What a row draws is its own: its logits, its seed, its step."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tarsia.core.errors import ServeError
from tarsia.serve.request import Sampling
from tarsia.serve.sample import Drawer, Drawn, check, derived, draw, least, uniform

WIDTH = 40

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from((0.0, 0.3, 1.0, 2.0)),
    top_p=st.sampled_from((0.1, 0.7, 1.0)),
    top_k=st.sampled_from((0, 1, 5, WIDTH + 9)),
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.sampled_from((None, 0, 3)),
    presence_penalty=st.sampled_from((0.0, 1.5, -0.5)),
    frequency_penalty=st.sampled_from((0.0, 0.7)),
    bias=st.sampled_from(({}, {3: 100.0, 7: -100.0})),
)


def logits(seed: int, rows: int, width: int = WIDTH) -> Tensor:
    return 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def drawn(rows: Tensor, drawers: list[Drawer]) -> list[Drawn]:
    found = draw(rows, drawers)
    assert all(isinstance(one, Drawn) for one in found)
    return [one for one in found if isinstance(one, Drawn)]


@settings(deadline=None, max_examples=60)
@given(st.lists(SAMPLINGS, min_size=1, max_size=6), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_a_row_draws_the_same_whoever_is_beside_it(asked: list[Sampling], seed: int, random: Any) -> None:
    steps = [logits(seed + step, len(asked)) for step in range(4)]
    alone = [[drawn(step[i : i + 1], [drawer])[0] for step in steps] for i, drawer in enumerate(map(make, asked))]
    drawers, mixed = [make(one) for one in asked], [[] for _ in asked]
    for step in steps:
        order = list(range(len(asked)))
        random.shuffle(order)
        for i, one in zip(order, drawn(step[order], [drawers[i] for i in order]), strict=True):
            mixed[i].append(one)
    assert mixed == alone


def make(sampling: Sampling, choice: int = 0) -> Drawer:
    return Drawer(sampling, WIDTH, choice=choice)


def test_a_row_that_comes_later_draws_what_it_would_have_drawn_at_once() -> None:
    """The step that counts is the answer's own, not the engine's."""
    asked = Sampling(seed=5)
    rows = logits(0, 3)
    early, late, other = make(asked), make(asked), make(replace(asked, seed=6))
    first = [drawn(rows[i : i + 1], [early])[0].token for i in range(3)]
    for i in range(3):
        drawn(rows[i : i + 1], [other])
    assert [drawn(rows[i : i + 1], [late])[0].token for i in range(3)] == first


def test_seeds_tell_answers_apart_and_bring_them_back() -> None:
    flat = torch.zeros(1, WIDTH)

    def said(drawer: Drawer) -> tuple[int, ...]:
        return tuple(drawn(flat, [drawer])[0].token for _ in range(12))

    texts = {said(make(Sampling(seed=seed))) for seed in range(50)}
    assert len(texts) == 50
    choices = [make(Sampling(seed=3, choices=4), choice) for choice in range(4)]
    told = [drawer.seed for drawer in choices]
    spoken = [said(drawer) for drawer in choices]
    assert len(set(spoken)) == 4
    assert told[0] == 3
    assert [said(make(Sampling(seed=seed))) for seed in told] == spoken  # a choice can be had again by itself
    nameless = make(Sampling())
    assert said(make(Sampling(seed=nameless.seed))) == said(nameless)
    assert make(Sampling()).seed != nameless.seed


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 127))
def test_derived_seeds_are_seeds(seed: int, choice: int) -> None:
    check(Sampling(seed=derived(seed, choice)), WIDTH)


def test_numbers_are_uniform_over_steps_and_over_seeds() -> None:
    """Kolmogorov-Smirnov's distance, against 1.95 / sqrt(n), which chance passes once in 2,000."""
    for numbers in ([uniform(7, step) for step in range(4000)], [uniform(seed, 3) for seed in range(4000)]):
        assert all(0 <= number < 1 for number in numbers)
        distance = max(abs(number - i / 4000) for i, number in enumerate(sorted(numbers)))
        assert distance < 1.95 / math.sqrt(4000)


def test_draws_follow_the_probabilities() -> None:
    row = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    for temperature in (1.0, 0.5):
        expected = (row[0].double() / temperature).softmax(-1)
        found = Counter(
            drawn(row, [Drawer(Sampling(seed=seed, temperature=temperature), 4)])[0].token for seed in range(4000)
        )
        for token, share in enumerate(expected.tolist()):
            assert abs(found[token] - 4000 * share) < 5 * math.sqrt(4000 * share * (1 - share))


def nucleus(shares: list[float], top_p: float) -> set[int]:
    """Slow: the likeliest until their sum is enough, and those as likely as the last."""
    total, last = 0.0, 0.0
    for share in sorted(shares, reverse=True):
        total, last = total + share, share
        if total >= top_p:
            break
    return {i for i, share in enumerate(shares) if share >= last}


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(0.01, 1), st.sampled_from((1.0, 4.0)))
def test_the_nucleus_is_the_smallest(weights: list[int], top_p: float, steep: float) -> None:
    shares = (steep * torch.tensor(weights, dtype=torch.float64)).softmax(-1)
    bound = least(shares, top_p)
    inside = {i for i, share in enumerate(shares.tolist()) if share >= bound}
    assert inside in (nucleus(shares.tolist(), top_p), nucleus(shares.tolist(), top_p - 1e-12))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.sampled_from((1, 2, 7)), st.sampled_from((0.2, 0.6, 1.0)), st.integers(0, 9))
def test_nothing_outside_top_k_and_top_p_is_drawn(seed: int, top_k: int, top_p: float, draws: int) -> None:
    row = logits(seed, 1)
    drawer = make(Sampling(seed=draws, top_k=top_k, top_p=top_p))
    bound = row[0].topk(top_k).values[-1]
    best = {i for i, x in enumerate(row[0].tolist()) if x >= bound}
    shares = torch.where(row[0] >= bound, row[0].double(), -math.inf).softmax(-1)
    allowed = best & nucleus(shares.tolist(), top_p)
    assert {drawn(row, [drawer])[0].token for _ in range(20)} <= allowed


def test_the_likeliest_at_temperature_0_and_the_first_of_those_alike() -> None:
    rows = logits(1, 9)
    rows[4] = 0.0
    rows[5, [3, 17, 30]] = 99.0
    found = [one.token for one in drawn(rows, [make(Sampling(temperature=0)) for _ in range(9)])]
    told = [one.token for one in drawn(rows, [make(Sampling(temperature=0, logprobs=1)) for _ in range(9)])]
    assert found == told == rows.argmax(-1).tolist()
    assert (found[4], found[5]) == (0, 3)


@given(st.floats(5e-324, 1e-6))
@settings(deadline=None, max_examples=30)
def test_a_temperature_near_0_is_near_0(temperature: float) -> None:
    rows = logits(3, 1) * 1e20
    assert drawn(rows, [make(Sampling(temperature=temperature, seed=1))])[0].token == int(rows.argmax())


def test_log_probabilities_are_the_models_own() -> None:
    row = logits(2, 1)
    expected = row[0].double().log_softmax(-1)
    asked = Sampling(
        temperature=0.1, top_k=2, seed=1, logprobs=4, bias={5: 50.0}, presence_penalty=1.0, frequency_penalty=1.0
    )
    drawer = make(asked)
    for _ in range(3):
        one = drawn(row, [drawer])[0]
        assert one.logprob == pytest.approx(float(expected[one.token]), abs=1e-12)
        order = sorted(range(WIDTH), key=lambda i: -float(expected[i]))[:4]
        assert [token for token, _ in one.top] == order
        assert [value for _, value in one.top] == pytest.approx([float(expected[i]) for i in order])
    none = drawn(row, [make(replace(asked, logprobs=0))])[0]
    assert none.logprob is not None and none.top == ()
    assert drawn(row, [make(replace(asked, logprobs=None))])[0].logprob is None


def test_penalties_count_what_was_said() -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    row = torch.tensor([[1.0, 0.85, 0.0, -9.0]])
    drawer = Drawer(Sampling(temperature=0, frequency_penalty=0.25, presence_penalty=0.5), 4)
    said: list[int] = []
    for _ in range(8):
        counts = Counter(said)
        expected = [float(x) - 0.25 * counts[i] - 0.5 * (counts[i] > 0) for i, x in enumerate(row[0])]
        one = drawn(row, [drawer])[0]
        assert one.token == max(range(4), key=lambda i: expected[i])
        said.append(one.token)
    assert set(said) == {0, 1, 2}


def test_a_bias_forces_and_forbids() -> None:
    row = logits(5, 1)
    assert drawn(row, [make(Sampling(bias={9: 100.0}, seed=1))])[0].token == 9
    best = int(row.argmax())
    assert drawn(row, [make(Sampling(bias={best: -100.0}, temperature=0))])[0].token == row[0].topk(2).indices[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("asked", [Sampling(temperature=0), Sampling(seed=2, logprobs=1)])
def test_a_broken_row_fails_alone_and_stays_as_it_was(bad: float, asked: Sampling) -> None:
    rows = logits(0, 3)
    rows[1, 7] = bad
    drawers = [make(asked) for _ in range(3)]
    found = draw(rows, drawers)
    assert isinstance(found[1], ServeError) and found[1].kind == "internal"
    assert drawers[1].step == 0
    fresh = [make(asked) for _ in range(2)]
    assert [found[0], found[2]] == draw(rows[[0, 2]], fresh)


def test_no_rows_and_rows_of_nobody() -> None:
    assert draw(torch.zeros(0, WIDTH), []) == []
    with pytest.raises(ValueError, match="2 rows for 1"):
        draw(torch.zeros(2, WIDTH), [make(Sampling())])


def test_what_is_given_is_left_as_it_was() -> None:
    rows = logits(0, 2)
    kept = rows.clone()
    draw(rows, [make(Sampling(bias={1: 5.0}, top_k=3)), make(Sampling(temperature=0))])
    assert torch.equal(rows, kept)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_p": math.nan}, {"top_k": -1}, {"seed": 2**63}, {"choices": 0}, {"choices": 129}, {"logprobs": 21},
        {"logprobs": -1}, {"presence_penalty": 2.1}, {"frequency_penalty": math.nan}, {"stop": ("",)},
        {"stop": ("a",) * 17}, {"stop": ("a" * 257,)}, {"bias": {WIDTH: 1.0}}, {"bias": {-1: 1.0}},
        {"bias": {0: math.nan}}, {"bias": {0: 101.0}}, {"max_tokens": 0}, {"ignore_end": True, "schema": "{}"},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ServeError, match=f"^{'ignore_end' if 'schema' in wrong else next(iter(wrong))}") as caught:
        Drawer(Sampling(**wrong), WIDTH)
    assert caught.value.kind == "invalid"
