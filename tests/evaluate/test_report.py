"""Reports are values: to JSON and back, compared pair by pair, refused where they do not belong together."""

from __future__ import annotations

import io

import pytest
from pydantic import ValidationError
from rich.console import Console

from tarsia.core.errors import ConfigError
from tarsia.evaluate import Report, Result, Row, compare, interval


def result(scores: list[float], source: str = "belt", answers: tuple[str, ...] = ("glass", "paper")) -> Result:
    rows = tuple(
        Row(row=i, reference="glass", said="x", free_score=s, chosen="glass" if answers else None,
            chosen_score=s if answers else None, loss=1.5, tokens=3)
        for i, s in enumerate(scores)
    )  # fmt: skip
    found = interval(scores)
    return Result(
        source=source, free=found, constrained=found if answers else None, loss=1.5, answers=answers,
        answers_from="given" if answers else "none: 90 different references, more than 64", rows=rows,
    )  # fmt: skip


def report(*results: Result, **changes: object) -> Report:
    values = {
        "base": "mini-1", "digest": "files:0123456789abcdef", "precision": "float32", "adapters": (),
        "metric": "exact", "max_new_tokens": 32, "scoring": "packed", "seed": 0, "resamples": 1000, "results": results,
    }  # fmt: skip
    return Report.model_validate(values | changes)


def drawn(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_json_and_back() -> None:
    found = report(result([1.0, 0.0, 1.0]), result([1.0], "talk", ()), adapters=("a", "b"))
    assert Report.from_json(found.json_text()) == found
    assert found.json_text().count("\n") == 0
    with pytest.raises(ConfigError, match="no evaluation report"):
        Report.from_json('{"base": "mini-1"}')
    with pytest.raises(ConfigError, match="no evaluation report"):
        Report.from_json(found.json_text().replace('"seed"', '"sead"'))


def test_the_form_of_the_base_is_in_the_title() -> None:
    plain, four, old = (report(result([1.0]), form=form) for form in ("not quantised", "nf4 in its files", None))
    assert "nf4" not in drawn(plain.table()) and "quantised" not in drawn(plain.table())
    assert "mini-1 (0123456789ab), nf4 in its files, no adapter" in drawn(four.table())
    assert "mini-1 (0123456789ab), nf4 in its files, no adapter -> no adapter" in drawn(compare(four, four).table())
    assert ", not quantised -> nf4 in its files, no" in drawn(compare(plain, four).table())
    assert ", a form that is not known -> nf4 in its files, no" in drawn(compare(old, four).table())
    assert "quantised" not in drawn(compare(plain, plain).table())
    assert "mini-1 (0123456789ab), no adapter -> no adapter" in drawn(compare(old, old).table())
    assert Report.from_json(old.json_text().replace('"form":null,', "")) == old  # one that was written before


def test_a_report_is_frozen() -> None:
    with pytest.raises(ValidationError):
        report().metric = "contains"


def test_forgetting_in_points() -> None:
    before = report(result([1.0] * 8 + [0.0] * 2))
    after = report(result([1.0] * 5 + [0.0] * 5), adapters=("belt",))
    (change,) = compare(before, after).changes
    assert change.forgetting == pytest.approx(30.0)
    assert change.free == (0.8, 0.5)
    assert change.free_change.mean == pytest.approx(-0.3)
    assert change.free_change.low < -0.3 < change.free_change.high <= 0.0
    assert change.constrained_change == change.free_change
    text = drawn(compare(before, after).table())
    assert "80.0% -> 50.0%" in text
    assert "-30.0 [" in text
    assert "no adapter -> belt" in text


def test_the_table_says_why_there_is_no_choice() -> None:
    text = drawn(report(result([1.0], answers=())).table())
    assert "90 different references" in text
    assert "0123456789ab" in text


@pytest.mark.parametrize(
    "other",
    [
        report(result([1.0, 0.0]), digest="files:ffff"),
        report(result([1.0, 0.0]), precision="bfloat16"),
        report(result([1.0, 0.0]), metric="contains"),
        report(result([1.0, 0.0]), max_new_tokens=8),
        report(result([1.0, 0.0]), resolution=224),
        report(result([1.0, 0.0], "scenes")),
        report(result([1.0, 0.0, 1.0])),
        report(result([1.0, 0.0], answers=("glass",))),
        report(),
    ],
)
def test_what_does_not_belong_together_is_refused(other: Report) -> None:
    with pytest.raises(ConfigError, match="can not be compared"):
        compare(report(result([1.0, 0.0])), other)
