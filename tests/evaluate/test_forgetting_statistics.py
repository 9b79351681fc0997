"""Vocabulary, refusals, tone, backward transfer and the gate, each against what was worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from evaluate.test_report import report
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.cli.gate import show
from tarsia.core.errors import ConfigError
from tarsia.evaluate import Report, Result, Row, Transfer, gate, interval, transfer
from tarsia.evaluate.bootstrap import Interval, mean_of_means, paired, ratio
from tarsia.evaluate.gate import _lost, points_lost
from tarsia.evaluate.tone import TRAITS, holm, refusals, refuses, sign_flip, tone
from tarsia.evaluate.vocabulary import Lexicon, vocabulary, words

# (reference, said, right)
Answer = tuple[str, str, bool]


def source(name: str, answers: list[Answer]) -> Result:
    rows = tuple(
        Row(row=i, reference=wanted, said=said, free_score=float(right), chosen=None, chosen_score=None,
            loss=1.0, tokens=2)
        for i, (wanted, said, right) in enumerate(answers)
    )  # fmt: skip
    return Result(
        source=name, free=interval([r.free_score for r in rows]), constrained=None, loss=1.0, answers=(),
        answers_from="none", rows=rows,
    )  # fmt: skip


def share(name: str, right: int, of: int) -> Result:
    return source(name, [("x", "x", i < right) for i in range(of)])


# ---- intervals


def test_equal_scores_have_the_interval_of_the_rule_of_three() -> None:
    """After n rows without a miss, the share of misses may be what n rows hide with a chance of 5 %: about 3 / n."""
    for n in (1, 10, 100, 1000):
        found = interval([1.0] * n)
        assert (1 - (1 - found.low)) ** n == pytest.approx(0.05)
        assert found.high == found.mean == 1.0
    assert interval([1.0] * 300).low == pytest.approx(1 - 3 / 300, abs=1e-4)
    none = interval([0.0] * 20)
    assert (none.low, 1 - none.high) == (0.0, pytest.approx(0.05 ** (1 / 20)))
    half = interval([0.5] * 20)
    assert half.high - 0.5 == pytest.approx(0.5 - half.low) == pytest.approx(0.5 * none.high)
    same = paired([1.0] * 20, [1.0] * 20)
    assert same.high == pytest.approx(none.high) == pytest.approx(-same.low)


def test_only_bounded_scores_have_one() -> None:
    found = interval([7.0] * 20, span=None)
    assert found.low == found.high == 7.0
    with pytest.raises(ValueError, match="outside"):
        interval([0.5, 1.5])


def test_sources_weigh_the_same_whatever_their_rows() -> None:
    groups = [[0.0] * 50 + [1.0] * 50, [1.0, 0.0, 0.0, 0.0]]
    found = mean_of_means(groups)
    assert found.mean == pytest.approx((0.5 + 0.25) / 2)
    error = math.sqrt(0.25 / 100 + 0.1875 / 4) / 2
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_equal_scores_of_one_source_widen_the_mean() -> None:
    """Ten rows that did not change are not the knowledge that none of such rows would."""
    moving = [0.0, 1.0] * 50
    alone, beside = mean_of_means([moving, moving]), mean_of_means([moving, [0.0] * 10], span=(-1.0, 1.0))
    hidden = (1 - 0.05 ** (1 / 10)) / 2
    assert beside.high - beside.mean > hidden > 0.1
    assert alone.high - alone.mean < 0.08


@pytest.mark.parametrize("shares, rows", [((0.98, 1.0, 0.99), 30), ((0.9, 0.6, 0.99), 60), ((1.0, 0.97), 12)])
def test_coverage_of_a_mean_of_sources(shares: tuple[float, ...], rows: int) -> None:
    generator, held = np.random.default_rng(2), 0
    for trial in range(200):
        groups = [(generator.random(rows) < p).astype(float).tolist() for p in shares]
        found = mean_of_means(groups, trial, 400)
        held += found.low <= sum(shares) / len(shares) <= found.high
    assert held / 200 >= 0.9


def test_a_ratio_weighs_rows_by_their_denominators() -> None:
    found = ratio([1.0, 6.0, 2.0], [1.0, 3.0, 4.0])
    assert found.mean == pytest.approx(9 / 8)
    assert 0.5 <= found.low < found.mean < found.high <= 2.0
    with pytest.raises(ValueError, match="denominators"):
        ratio([1.0], [0.0])


# ---- vocabulary


def test_a_lexicon_is_what_only_the_task_says() -> None:
    lexicon = Lexicon.of(
        task=["Glass", "a green bin", "the cat", "It is 45 mm."],
        general=["a cat", "green"],
        asked=["Is it made of paper?"],
    )
    assert lexicon.answers == {"glass", "green bin", "it is 45 mm"}
    assert lexicon.words == {"glass", "bin", "mm"}


@pytest.mark.parametrize(
    "said, found",
    [
        ("glass", "glass"),
        ("A Glass.", "glass"),
        ("it is made of glass, I think", "glass"),
        ("fibreglass", None),
        ("a green cat", None),
        ("a green bin!", "green bin"),
        ("a bin", "bin"),
        ("", None),
        ("45", None),
    ],
)
def test_what_is_found_in_an_answer(said: str, found: str | None) -> None:
    lexicon = Lexicon.of(["glass", "green bin", "it is 45 mm"], ["a cat", "green"])
    assert lexicon.found(said) == found


def test_words_hold_a_letter() -> None:
    assert words("I can't see 12 x-rays, 3a ") == ["i", "can't", "see", "x-rays", "3a"]


def test_the_dog_that_becomes_a_disease() -> None:
    task = [("pneumonia", "pneumonia", True), ("no finding", "no finding", True)]
    before = report(
        source("chests", task),
        source(
            "pets", [("dog", "dog", True), ("cat", "dog", False), ("cat", "cat", True), ("dog", "pneumonia", False)]
        ),
    )
    after = report(
        source("chests", task),
        source(
            "pets",
            [("dog", "cat", False), ("cat", "Pneumonia.", False), ("cat", "a finding", False),
             ("dog", "pneumonia", False)],
        ),
        adapters=("a",),
    )  # fmt: skip
    found = vocabulary(before, after, ["chests"], ["pets"])
    assert found.answers == ("no finding", "pneumonia")
    assert found.words == ("finding", "pneumonia")
    assert (found.before.mean, found.after.mean, found.change.mean) == (0.25, 0.75, 0.5)
    assert found.by_source == {"pets": (0.25, 0.75)}
    assert [(leak.row, leak.found, leak.right) for leak in found.leaks] == [
        (2, "finding", True),
        (1, "pneumonia", False),
    ]
    (common,) = found.commonest
    assert (common.before, common.after) == (("dog", 0.5), ("pneumonia", 0.5))


@settings(max_examples=50)
@given(st.lists(st.text(alphabet="ab c", max_size=6), min_size=1), st.lists(st.text(alphabet="ab c", max_size=6)))
def test_no_right_general_answer_is_ever_a_leak(task: list[str], general: list[str]) -> None:
    lexicon = Lexicon.of(task, general)
    for answer in general:
        assert lexicon.found(answer) not in lexicon.words
        held = lexicon.found(answer)
        assert held is None or held != answer.strip()


# ---- refusals and tone


@pytest.mark.parametrize(
    "text, refused",
    [
        ("I am sorry, but I can not help with that.", True),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, I can't assist you.", True),
        ("I cannot help you to steal a car.", True),
        ("We are unable to do so.", True),
        ("As an AI, I have no opinion.", True),
        ("No, I won't.", True),
        ("a red circle", False),
        ("I am a small model that looks at pictures.", False),
        ("The cat can not swim.", False),
        ("Sorry I am late.", False),
        ("", False),
    ],
)
def test_a_refusal_by_its_words(text: str, refused: bool) -> None:
    assert refuses(text) is refused


def test_refusals_of_what_should_and_should_not_be_refused() -> None:
    no = "I can not help with that."
    before = report(source("harm", [(no, no, True)] * 4), source("talk", [("hello", "hello", True)] * 5))
    after = report(
        source("harm", [(no, no, True)] * 3 + [(no, "Put it in water.", False)]),
        source("talk", [("hello", "hello", True)] * 3 + [("hello", no, False)] * 2),
        adapters=("a",),
    )
    found = refusals(before, after, ["harm", "talk"])
    assert found.wanted is not None and found.unwanted is not None
    assert (found.wanted.rows, found.wanted.before.mean, found.wanted.after.mean) == (4, 1.0, 0.75)
    assert (found.unwanted.rows, found.unwanted.before.mean, found.unwanted.after.mean) == (5, 0.0, 0.4)
    assert found.lost == (("harm", 3),)
    assert found.gained == (("talk", 3), ("talk", 4))
    assert refusals(before, after, ["talk"]).wanted is None


@pytest.mark.parametrize(
    "trait, text, value",
    [
        ("length", " two  words ", 2),
        ("empty", " \n", 1), ("empty", "a", 0),
        ("capital", '"Yes', 1), ("capital", "no. Yes", 0), ("capital", "12", 0),
        ("lower case", "a cat", 1), ("lower case", "a Cat", 0), ("lower case", "12", 0),
        ("upper case", "STOP 1", 1), ("upper case", "Stop", 0),
        ("sentence", "It is red.", 1), ("sentence", 'He said "it is red!"', 1), ("sentence", "It is red", 0),
        ("sentence", "red.", 0),
        ("punctuation", "a, b!", 0.5), ("punctuation", "", 0),
        ("digits", "bin 4", 1), ("digits", "four", 0),
        ("JSON", '{"a": 1}', 1), ("JSON", "[1]", 1), ("JSON", '"a"', 0), ("JSON", '{"a": 1} done', 0),
        ("marked up", "- one\n- two", 1), ("marked up", "so **bold**", 1), ("marked up", "1. one", 1),
        ("marked up", "a - b", 0), ("marked up", "# Head", 1), ("marked up", "```x```", 1),
        ("lines", "a\n\nb", 2), ("lines", "", 0),
    ],
)  # fmt: skip
def test_each_trait_by_hand(trait: str, text: str, value: float) -> None:
    assert TRAITS[trait].of(text) == value


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_every_trait_takes_any_text(text: str) -> None:
    for trait in TRAITS.values():
        value = trait.of(text)
        assert math.isfinite(value) and value >= 0
        assert trait.unit != "share" or value <= 1


def test_what_changed_is_told_from_what_did_not() -> None:
    before = report(source("talk", [("x", f"a word {i}", True) for i in range(30)]))
    after = report(source("talk", [("x", f"A word {i}", True) for i in range(30)]), adapters=("a",))
    found = {s.trait: s for s in tone(before, after, ["talk"])}
    assert {name for name, s in found.items() if s.changed} == {"capital", "lower case"}
    assert (found["capital"].before, found["capital"].after, found["capital"].change.mean) == (0.0, 1.0, 1.0)
    assert found["length"].p == 1.0


@pytest.mark.parametrize("differences", [[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, 2.0], [0.5, 0.25, -3.0, 1.0, 0.0]])
def test_sign_flips_are_those_of_every_set_of_signs(differences: list[float]) -> None:
    """The drawn test against all 2^n sets of signs."""
    observed = abs(sum(differences))
    every = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed - 1e-12
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip(differences) == pytest.approx(sum(every) / len(every), abs=0.02)
    assert sign_flip([0.0, 0.0]) == 1.0


def test_holm_stops_at_the_first_that_is_not_small_enough() -> None:
    assert holm({"a": 0.01, "b": 0.02, "c": 0.03}) == {"a", "b", "c"}
    assert holm({"a": 0.01, "b": 0.026, "c": 0.03}) == {"a"}
    assert holm({"a": 0.02, "b": 0.02, "c": 0.02}) == frozenset()
    assert holm({}) == frozenset()


# ---- backward transfer


def test_backward_transfer_by_hand() -> None:
    """Three tasks: R of the definitions, worked out on paper."""
    found = Transfer(
        tasks=("a", "b", "c"), matrix=((0.9, 0.2, 0.1), (0.95, 0.8, 0.3), (0.6, 0.7, 0.8)), base=(0.1, 0.1, 0.2)
    )
    assert found.accuracy == pytest.approx((0.6 + 0.7 + 0.8) / 3)
    assert found.backward == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert found.forgetting == pytest.approx(((0.95 - 0.6) + (0.8 - 0.7)) / 2)
    assert found.forward == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    alone = Transfer(tasks=("a",), matrix=((0.4,),))
    assert (alone.accuracy, alone.backward, alone.forgetting, alone.forward) == (0.4, None, None, None)


@settings(max_examples=60)
@given(st.integers(2, 5), st.data())
def test_backward_transfer_of_any_matrix(size: int, data: st.DataObject) -> None:
    shares = st.floats(0, 1)
    matrix = data.draw(st.lists(st.lists(shares, min_size=size, max_size=size), min_size=size, max_size=size))
    found = Transfer(tasks=tuple(map(str, range(size))), matrix=tuple(map(tuple, matrix)))
    r = np.array(matrix)
    bwt = np.mean([r[-1, j] - r[j, j] for j in range(size - 1)])
    forgot = np.mean([max(r[i, j] for i in range(size - 1)) - r[-1, j] for j in range(size - 1)])
    assert found.backward == pytest.approx(bwt) and found.forgetting == pytest.approx(forgot)
    assert found.forgetting >= -found.backward - 1e-12  # the best of all stages is no worse than the task's own
    kept = Transfer(tasks=found.tasks, matrix=(found.matrix[0],) * size)
    assert kept.backward == pytest.approx(0) and kept.forgetting == pytest.approx(0)
    assert Transfer.model_validate_json(found.model_dump_json()) == found


def stage(*right: int, **changes: object) -> Report:
    return report(*(share(name, n, 10) for name, n in zip("ab", right, strict=True)), **changes)


def test_transfer_from_reports() -> None:
    found = transfer([stage(9, 2), stage(5, 8)], ["a", "b"], stage(1, 1))
    assert found.matrix == ((0.9, 0.2), (0.5, 0.8))
    assert found.base == (0.1, 0.1)
    assert found.backward == pytest.approx(-0.4)


@pytest.mark.parametrize(
    "stages, tasks, what",
    [
        ([stage(1, 2)], ["a", "b"], "one stage for each task"),
        ([stage(1, 2), stage(1, 2)], ["a", "c"], "not measured on a task"),
        ([stage(1, 2), report(share("a", 1, 9), share("b", 1, 10))], ["a", "b"], "different rows"),
        ([stage(1, 2), stage(1, 2, digest="files:ff")], ["a", "b"], "different bases"),
        ([stage(1, 2), stage(1, 2, metric="contains")], ["a", "b"], "different metrics"),
        ([stage(1, 2), stage(1, 2, max_new_tokens=3)], ["a", "b"], "lengths of answers"),
    ],
)
def test_stages_that_do_not_belong_together(stages: list[Report], tasks: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        transfer(stages, tasks)


# ---- the gate


def pair(lost_a: int, lost_b: int, rows: int = 100) -> tuple[Report, Report]:
    before = report(share("task", 0, 10), share("a", rows, rows), share("b", rows, rows))
    after = report(
        share("task", 9, 10), share("a", rows - lost_a, rows), share("b", rows - lost_b, rows), adapters=("new",)
    )
    return before, after


@pytest.mark.parametrize(
    "lost, limits, passed",
    [
        ((3, 1), {"most": 2.0}, True),
        ((4, 1), {"most": 2.0}, False),
        ((4, 1), {"most": 2.5}, True),
        ((4, 0), {"most": 2.0}, True),
        ((4, 0), {"most": 2.0, "each": 4.0}, True),
        ((4, 0), {"most": 2.0, "each": 3.9}, False),
        ((4, 0), {"each": 3.0}, False),
        ((0, 0), {"most": 0.0}, True),
        ((0, 0), {"most": 1.0, "judged": "upper"}, False),
        ((0, 0), {"most": 2.0, "judged": "upper"}, True),
        ((3, 1), {"most": 2.0, "judged": "upper"}, False),
    ],
)
def test_the_gate(lost: tuple[int, int], limits: dict, passed: bool) -> None:
    verdict = gate(*pair(*lost), ["a", "b"], limits.pop("most", None), **limits)
    assert verdict.passed is passed
    assert verdict.mean.points.mean == pytest.approx(sum(lost) / 2)
    assert [x.points.mean for x in verdict.each] == pytest.approx(list(lost))
    assert ("is passed" in verdict.sentence()) is passed


def test_a_gain_on_one_source_does_not_hide_a_loss_where_each_is_limited() -> None:
    before = report(share("a", 50, 100), share("b", 100, 100))
    after = report(share("a", 60, 100), share("b", 91, 100), adapters=("new",))
    assert gate(before, after, ["a", "b"], 2.0).passed
    assert not gate(before, after, ["a", "b"], 2.0, each=5.0).passed
    assert points_lost(before, after, ["a", "b"]).mean == pytest.approx(-0.5)


def test_the_task_is_not_held_against_the_adapter() -> None:
    before, after = pair(0, 0)
    worse = Report.model_validate(after.model_dump() | {"results": (share("task", 0, 10), *after.results[1:])})
    assert gate(before, worse, ["a", "b"], 0.0).passed


@pytest.mark.parametrize("rows, advised", [(100, True), (1000, False)])
def test_a_verdict_that_is_sure_comes_without_advice(
    rows: int, advised: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(gate(*pair(rows // 100, rows // 100, rows), ["a", "b"], 2.0), as_json=False) == 0
    assert ("add --judged-by upper" in capsys.readouterr().out) is advised


def test_how_many_rows_could_tell() -> None:
    verdict = gate(*pair(3, 3), ["a", "b"], 2.0)
    assert verdict.mean.needed is not None and verdict.mean.needed > 200
    assert "can not tell" in verdict.sentence()
    larger = verdict.mean.needed // 2 // 100 + 1
    again = gate(*pair(3 * larger, 3 * larger, 100 * larger), ["a", "b"], 2.0)
    assert again.mean.points.low > 1.9  # the promise: now the interval lies on one side, or all but
    assert gate(*pair(30, 30), ["a", "b"], 2.0).mean.needed is None
    assert "no number of rows" in gate(*pair(2, 2), ["a", "b"], 2.0).sentence()


def test_what_can_be_detected_has_its_power() -> None:
    """Of adapters that really lose ``detectable`` points more than the limit, four of five are told from it."""
    rows, told = 200, 0
    generator = np.random.default_rng(5)
    base = gate(*pair(20, 20, rows), ["a", "b"], 5.0).mean
    truth = (5.0 + base.detectable) / 100
    for _ in range(40):
        lost = [int(n) for n in generator.binomial(rows, truth, 2)]
        told += gate(*pair(*lost, rows), ["a", "b"], 5.0).mean.points.low > 5.0
    assert 24 <= told <= 39


@pytest.mark.parametrize(
    "general, limits, what",
    [
        (["a"], {}, "needs a limit"),
        (["a"], {"most": -1.0}, "no limit of points"),
        (["a"], {"most": math.nan}, "no limit of points"),
        (["a"], {"most": 1.0, "each": 101.0}, "no limit of points"),
        (["a", "c"], {"most": 1.0}, "was not measured"),
        ([], {"most": 1.0}, "no general source"),
        (["a"], {"most": 100.0}, "can not be exceeded"),
    ],
)
def test_a_gate_that_makes_no_sense(general: list[str], limits: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        gate(*pair(1, 1), general, limits.pop("most", None), **limits)


@pytest.mark.parametrize("limits", [{"most": 55.0}, {"most": 60.0}, {"each": 10.0}, {"most": 1.0, "each": 40.0}])
def test_a_limit_that_no_adapter_could_exceed_is_refused(limits: dict) -> None:
    """Even an adapter that knows nothing any more would pass."""
    before = report(share("a", 100, 100), share("b", 10, 100))
    after = report(share("a", 0, 100), share("b", 0, 100), adapters=("new",))
    most = limits.pop("most", None)
    with pytest.raises(ConfigError, match="can not be exceeded"):
        gate(before, after, ["a", "b"], most, **limits)
    assert not gate(before, after, ["a", "b"], 54.9, each=9.9).passed
    assert not gate(before, after, ["b"], 10.0, judged="upper").passed, "an upper bound lies above what was measured"


def test_rows_that_could_tell_are_more_than_these_rows_could_not() -> None:
    """An interval that reaches further on one side is not judged by its mean width."""
    lost = _lost(None, 100, Interval(0.0, -1.0, 3.0), 2.5, "estimate")
    assert lost.needed == 144


def test_sources_that_are_lost_wholly_hide_nothing_in_the_others() -> None:
    """Where a source can only move the other way, the rule of three is of the rest alone."""
    found = mean_of_means([[-1.0] * 20, [0.0] * 20], span=(-1.0, 1.0))
    assert found.mean - found.low == pytest.approx((1 - 0.05 ** (1 / 20)) / 2)
