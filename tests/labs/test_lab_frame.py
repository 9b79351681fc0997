"""The lab's frame: a claim can fail, a page says nothing but its result, a result that is broken is refused."""

from __future__ import annotations

import io
import json
import math

import matplotlib.image
import pytest
from labs.chapters_world import ROWS, toy

from tarsia.core.errors import ConfigError
from tarsia.labs.frame import page, places, result
from tarsia.labs.frame.chapter import Bound, Desk, Found, Verdict
from tarsia.labs.frame.tables import markdown, part_of


def performed(chapter, folders=(), tmp_path="."):
    return result.perform(chapter, Desk(tmp_path, dict.fromkeys(folders, tmp_path), lambda share, what: None))


@pytest.mark.parametrize(
    "value, verdict",
    [
        (2.0, "PASS"),
        (2, "PASS"),
        (2.0000001, "FAIL"),
        (1.9, "FAIL"),
        ("2", "FAIL"),
        (math.nan, "FAIL"),
        (math.inf, "FAIL"),
    ],
)
def test_a_bound_holds_or_fails(value, verdict):
    assert Bound("", "a", "b", 2, 2).judge(Found({"a": {"b": value}})) == verdict
    chapter = toy({**ROWS, "sum: one and one": {"is": value, "said": "two"}})
    made = performed(chapter, ["data"])
    assert made.verdict(chapter) == verdict
    assert f"**{verdict}**" in page.page(chapter, made)
    assert json.loads(made.as_json(chapter))["verdict"] == verdict


def test_a_number_that_was_not_measured_is_a_defect():
    with pytest.raises(KeyError):
        Bound("", "a", "c").judge(Found({"a": {"b": 1}}))


def test_what_could_not_be_measured_is_neither():
    chapter = toy()
    made = performed(chapter)
    assert made.lacking == ("data",)
    assert [bound.judge(made.found, made.lacking) for bound in chapter.bounds] == [Verdict.PASS, Verdict.UNKNOWN]
    assert made.verdict(chapter) is Verdict.PASS
    text = page.page(chapter, made)
    assert "| two and two |  | ≥ 3 | not measured |" in text and "two without data." in text
    only = toy(bounds=chapter.bounds[1:])
    assert made.verdict(only) is Verdict.UNKNOWN
    assert made.verdict(toy(bounds=(*chapter.bounds, Bound("", "sum: two and two", "is", high=3)))) is Verdict.FAIL


@pytest.mark.parametrize(
    "bound, text",
    [
        (Bound("", "", "", 2, 2), "= 2"),
        (Bound("", "", "", low=0.5), "≥ 0.5"),
        (Bound("", "", "", high=0.5), "≤ 0.5"),
        (Bound("", "", "", 3, 4), "3 to 4"),
    ],
)
def test_limits_are_written_as_signs(bound, text):
    assert bound.limits == text


def test_a_page_is_a_function_of_its_file(tmp_path):
    chapter = toy()
    made = performed(chapter)
    page.publish(chapter, made, tmp_path)
    place = page.files(chapter, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.json", "toy.md", "toy.png"]
    again = result.read(place["result"])
    assert again.found == made.found and again.at == made.at
    assert place["page"].read_text(encoding="utf8") == page.page(chapter, again)
    assert place["result"].read_text(encoding="utf8") == again.as_json(chapter)
    assert place["picture"].read_bytes() == page.picture(chapter, again)
    assert matplotlib.image.imread(io.BytesIO(place["picture"].read_bytes())).std() > 0.01
    assert "mini-1 abcdef012345" in page.page(chapter, again)


def test_every_number_of_a_page_comes_from_the_file(tmp_path):
    chapter = toy()
    made = performed(chapter, ["data"])
    shown = page.page(chapter, made)
    for row, columns in ROWS.items():
        for column in columns:
            changed = {**ROWS, row: {**columns, column: 77}}
            other = performed(toy(changed), ["data"])
            assert page.page(chapter, other) != shown and "77" in page.page(chapter, other)


def test_a_word_that_no_result_has_is_a_defect():
    for text in ('{{ value("no", "row") }}', '{{ table("none") }}', "{{ lost }}"):
        with pytest.raises(Exception, match=r"no|none|lost"):
            page.page(toy(text=text), performed(toy()))


def test_a_row_holds_numbers_and_words_alone():
    for value in (None, True, [1.0]):
        with pytest.raises(TypeError, match="only float, int and str"):
            performed(toy({"sum: one and one": {"is": value}}))


def test_broken_results_are_refused(tmp_path):
    path = tmp_path / "toy.json"
    with pytest.raises(ConfigError, match="no result to draw"):
        result.read(path)
    for text in ("", "{}", "[]", '{"chapter": "toy"}'):
        path.write_text(text, encoding="utf8")
        with pytest.raises(ConfigError, match="no result of a chapter"):
            result.read(path)


def test_a_place_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf8")
    with pytest.raises(ConfigError, match="can not be written"):
        page.publish(toy(), performed(toy()), tmp_path / "file")


def test_the_list_tells_verdicts(tmp_path):
    chapters = {"toy": toy(), "other": toy(name="other")}
    page.publish(chapters["toy"], performed(chapters["toy"]), tmp_path)
    text = page.listing(chapters, tmp_path)
    assert "| [toy](toy.md) | What is one and one? | One and one is 2. | PASS |" in text
    assert "| other | What is one and one? | One and one is 2. | not run |" in text


def test_places_are_found_by_option_then_by_variable(tmp_path, monkeypatch):
    for name, inside in (("here", "config.json"), ("there", "small/config.json")):
        path = tmp_path / name / inside
        path.parent.mkdir(parents=True)
        path.write_text("{}", encoding="utf8")
    monkeypatch.delenv("TARSIA_DATA", raising=False)
    monkeypatch.setenv("TARSIA_SMOL", str(tmp_path / "there"))
    assert places.find({}) == {"smol": tmp_path / "there" / "small"}
    assert places.find({"smol": tmp_path / "here"}) == {"smol": tmp_path / "here"}
    monkeypatch.delenv("TARSIA_SMOL")
    assert places.find({}) == {}
    with pytest.raises(ConfigError, match="does not hold SmolLM2"):
        places.find({"smol": tmp_path})
    with pytest.raises(ConfigError, match="of this name"):
        places.find({"large": tmp_path})


def test_a_chapter_without_what_it_needs_is_refused():
    places.require("toy", ["data"], ["data"])
    with pytest.raises(ConfigError, match="needs photographs") as refusal:
        places.require("toy", ["data"], [])
    assert "--with data=FOLDER nor TARSIA_DATA" in str(refusal.value)


def test_tables():
    rows = {"a: x": {"n": 1.23456, "m": 3}, "a: y": {"n": "word"}, "b: z": {"n": 1}}
    assert markdown(part_of(rows, "a"), "names") == (
        "| names | n | m |\n|---|---:|---:|\n| x | 1.235 | 3 |\n| y | word |  |\n"
    )
    with pytest.raises(KeyError):
        part_of(rows, "c")
