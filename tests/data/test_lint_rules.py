"""Every rule is silent on rows without a fault, and speaks of exactly the rows in which its fault is planted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from data.lint_worlds import FAULTS, Plant, World, clean, planted

from tarsia.data.lint import RULES, Findings, Hit, Severity, Survey, Where, rule

ALONG = {
    "all-fail": {"unreadable-row"},
    "picture-tokens": {"no-label"},
    "contradiction": {"near-leak", "unseen-answer"},
    "one-answer": {"unseen-answer"},
    "empty-answer": set(),
}
"""Code: other codes that its planted faults bring with them."""


@pytest.fixture(scope="module")
def nothing() -> Findings:
    return clean().lint()


def test_clean_rows_have_no_finding(nothing: Findings) -> None:
    assert [(f.code, f.what) for f in nothing.findings] == []
    assert nothing.survey.needs == {"context", "max_length", "aim", "evaluation", "plan"}  # so every rule has run


def test_every_rule_has_a_planted_fault() -> None:
    assert set(FAULTS) == set(RULES)


CASES = [
    pytest.param(code, plant, id=f"{code}-{plant.__name__}") for code, plants in FAULTS.items() for plant in plants
]


@pytest.mark.parametrize("code, plant", CASES)
def test_a_planted_fault_is_named_by_row(code: str, plant: Plant) -> None:
    found, expected = planted(plant)
    findings = [f for f in found.findings if f.code == code]
    named: dict[str, list[int]] = {}
    for finding in findings:
        assert finding.what and finding.do, "a finding says what is wrong and what to do"
        assert finding.count >= len(finding.rows)
        named.setdefault(finding.source or "", []).extend(w.row for w in finding.rows)
        if finding.count > len(finding.rows):  # more than are named: the first of them all
            assert finding.count == len(expected[finding.source or ""])
    assert set(named) >= set(expected)
    for source, rows in expected.items():
        assert named[source] == list(rows)[: len(named[source])] and bool(named[source]) == bool(rows)
    assert {source for source, rows in named.items() if rows} == {source for source, rows in expected.items() if rows}
    assert {f.severity for f in findings} >= {RULES[code].severity}


@pytest.mark.parametrize("code, plant", CASES)
def test_a_planted_fault_raises_no_other_error(code: str, plant: Plant) -> None:
    world = clean()
    plant(world)
    others = {f.code for f in world.lint().findings if f.severity is not Severity.NOTE} - {code}
    assert (
        others <= ALONG.get(code, set()) | {"no-end"}
        if world.template == "vicuna"
        else others <= ALONG.get(code, set())
    )


def said(code: str, plant: Plant) -> str:
    (found,) = (f for f in planted(plant)[0].findings if f.code == code)
    return f"{found.what} {found.do}"


def test_a_row_without_an_answer_is_not_told_of_max_length() -> None:
    without, cut = said("no-label", FAULTS["no-label"][0]), said("no-label", FAULTS["no-label"][1])
    assert without.startswith("1 of 40 rows (2.5%): the assistant says nothing that can be learnt.")
    assert "max_length" not in without
    assert "max_length 64" in cut and "raise max_length above" in cut


def test_a_missing_picture_is_named_in_a_sentence() -> None:
    what = said("missing-picture", FAULTS["missing-picture"][0])
    assert re.match(r"1 of 40 rows .*: a picture is not there \(the first: \S*gone\.png is missing\)\. put", what)


def test_a_source_of_no_weight_has_no_errors() -> None:
    world = clean()
    world.weights = {"train": 0.0}
    world.train[3]["image"] = "gone.png"
    found = next(f for f in world.lint().findings if f.code == "missing-picture")
    assert found.severity is Severity.WARNING


def test_many_cut_answers_are_an_error() -> None:
    world = clean()
    for each in world.train[:10]:
        each["answer"] = "a cat and a dog " * 20
    found = next(f for f in world.lint().findings if f.code == "over-long")
    assert (found.severity, found.count) == (Severity.ERROR, 10)


def test_a_choice_that_every_prompt_offers_gives_nothing_away() -> None:
    world = clean()
    for each in world.train:
        each["question"] = "is this a cat, a dog, red or green?"
    assert [f for f in world.lint().findings if f.code == "answer-in-prompt"] == []


def test_a_hundred_alike_empty_pictures_are_no_copies() -> None:
    world = clean()
    from data.lint_worlds import png, shown
    from PIL import Image

    for at, each in enumerate(world.train[:30]):
        each["image"] = shown(png(Image.new("RGB", (32 + at, 32), "white")))
    codes = {f.code for f in world.lint().findings}
    assert "flat-picture" in codes and not {"near-duplicate", "near-leak"} & codes


def test_adding_a_rule_is_one_function() -> None:
    @rule("too-polite", Severity.WARNING)
    def polite(survey: Survey) -> Iterator[Hit]:
        for source in survey.sources:
            rows = [row for row in source.rows if any("please" in answer for answer in row.answers)]
            if rows:
                yield Hit("Somebody is polite.", "stop it", source.where(rows), source.name)

    try:
        world: World = clean()
        world.train[2]["answer"] = "please"
        found = [f for f in world.lint().findings if f.code == "too-polite"]
        assert [f.rows for f in found] == [(Where("train", 2),)]
        with pytest.raises(ValueError):
            rule("too-polite", Severity.NOTE)(polite)
    finally:
        del RULES["too-polite"]


def test_the_document_has_every_rule() -> None:
    text = (Path(__file__).parents[2] / "docs" / "lint.md").read_text(encoding="utf8")
    for found in RULES.values():
        assert f"| `{found.code}` | {found.severity.value} | {(found.check.__doc__ or '').strip()} |\n" in text
