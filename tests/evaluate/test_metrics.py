"""Metrics: bounds, what normalising may and may not do, and the cases that people argue about."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tarsia.core.errors import ConfigError, DataError
from tarsia.evaluate.metrics import METRICS, contains, exact, fields, find, metric, normal, number, numeric, parse

TEXT = st.text(max_size=40) | st.text('a theTAN.,: \n{}"0123456789-e', max_size=40)


@given(TEXT)
def test_normal_is_idempotent_and_keeps_something(text: str) -> None:
    assert normal(normal(text)) == normal(text)
    assert bool(normal(text)) == bool(text.split())


@given(TEXT, st.sampled_from(["", " ", "\n\t"]), st.sampled_from(["", ".", " .", "..."]))
def test_what_normal_removes_makes_no_difference(text: str, blank: str, stop: str) -> None:
    assert exact(f"{blank}The {text.upper()}x{stop}{blank}", f"{text.upper()}x") == 1.0


@given(TEXT, TEXT)
def test_bounds_and_symmetry(a: str, b: str) -> None:
    assert exact(a, b) == exact(b, a)
    assert exact(a, a) == contains(a, a) == 1.0
    for judge in METRICS.values():
        try:
            assert 0.0 <= judge(a, b) <= 1.0
        except DataError:
            assert number(b) is None or not parse(b)


@given(TEXT, TEXT)
def test_exact_implies_contains(a: str, b: str) -> None:
    assert contains(a, b) >= exact(a, b)


@pytest.mark.parametrize(
    "answer,reference,score",
    [
        ("A dog.", "dog", 1), ("an automobile", "Automobile", 1), ("the  red\ncircle", "red circle", 1),
        ("a", "a", 1), ("a", "", 0), ("", "", 1), (".", ".", 1), ("dogs", "dog", 0), ("dog!", "dog", 0),
        ("dog", "hot dog", 0), ("U.S.", "u.s", 1), ("Straße", "STRASSE", 1), ("another", "other", 0),
    ],
)  # fmt: skip
def test_exact(answer: str, reference: str, score: float) -> None:
    assert exact(answer, reference) == score


@pytest.mark.parametrize(
    "answer,reference,score",
    [
        ("It is a dog, I think.", "a dog", 1), ("category", "cat", 0), ("I see the dog", "the dog", 1),
        ("dog and cat", "cat dog", 0), ("", "dog", 0), ("dog", "", 0), ("it costs $5.00!", "$5.00", 1),
    ],
)  # fmt: skip
def test_contains(answer: str, reference: str, score: float) -> None:
    assert contains(answer, reference) == score


@pytest.mark.parametrize(
    "text,value",
    [
        ("three", 3), ("There are Twelve.", 12), ("1,234.5 kg", 1234.5), ("-7", -7), ("3e-4", 3e-4), ("no", None),
        ("someone", None), ("v2", None), ("twenty-one", None), ("about 5.", 5), ("12,34", 12), ("2x", None),
        ("3 of 5", 3), ("zero", 0), ("+4", 4), ("3.5.", 3.5),
    ],
)  # fmt: skip
def test_number(text: str, value: float | None) -> None:
    assert number(text) == value


@given(st.integers(-(10**6), 10**6), st.floats(0, 100), st.floats(-200, 200))
def test_numeric_is_a_distance(n: int, tolerance: float, off: float) -> None:
    close = find(f"numeric:{tolerance}")(f"I count {n + off:.6f} cells", str(n)) == 1.0
    if abs(abs(off) - tolerance) > 1e-5 + 1e-8 * abs(n):
        assert close == (abs(off) <= tolerance)


def test_numeric_reads_words_and_needs_a_reference() -> None:
    assert numeric("Three.", "3") == numeric("3", "three") == 1.0
    assert numeric("many", "3") == numeric("4", "3") == 0.0
    with pytest.raises(DataError, match="needs a number"):
        numeric("3", "many")


FIELDS = st.dictionaries(
    st.from_regex(r"[b-z]{1,8}", fullmatch=True), st.integers(0, 99) | st.sampled_from(["glass", "red"]), min_size=1
)


def lines(found: dict[str, object]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in found.items())


@given(FIELDS, st.data())
def test_fields_is_the_share_that_is_right(wanted: dict[str, object], data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.sampled_from(sorted(wanted))))
    given_ = {k: v if k in kept else "something else" for k, v in wanted.items()} | {"more": 1}
    share = pytest.approx(len(kept) / len(wanted))
    for spell in (
        json.dumps,
        lambda d: "\n".join(f"{k}: {v}" for k, v in d.items()),
        lambda d: "; ".join(f"{k}:{v}" for k, v in d.items()),
    ):
        assert fields(spell(given_), json.dumps(wanted)) == share
        assert fields(f"Sure: ```json\n{json.dumps(given_)}\n```", spell(wanted)) == share


def test_fields_by_hand() -> None:
    assert fields("material: Glass, bin: the green", "material: glass, bin: green") == 1.0
    assert fields("Material: glass\nbin: blue", '{"material": "glass", "bin": "green"}') == 0.5
    assert fields('{"box": {"x": 3.0}}', '{"box": {"x": 3, "y": 4}}') == 0.5
    assert fields("price: 1,200, where: shop, left", "price: 1200; where: shop, left") == 1.0
    assert fields("{not json} a: b", "a: b") == 0.0  # the key is "{not json} a"
    assert fields("glass", "material: glass") == 0.0
    with pytest.raises(DataError, match="needs fields"):
        fields("material: glass", "glass")


def test_find_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean exact"):
        find("exat")
    with pytest.raises(ConfigError, match="takes no number"):
        find("exact:3")
    for spec in ("numeric:", "numeric:-1", "numeric:nan", "numeric:inf", "numeric:x"):
        with pytest.raises(ConfigError, match="no tolerance"):
            find(spec)
    with pytest.raises(ValueError, match="two metrics"):
        metric("exact")(exact)
