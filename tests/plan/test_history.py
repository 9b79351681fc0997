"""What was planned beside what was measured: compared by what it is for, kept, read, and damage said."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tarsia.core.errors import PlanError
from tarsia.plan.history import Entry, Pair, keep, place, read

ENTRY = Entry(
    date="2026-11-22T12:00:00+00:00",
    model="mini-1",
    methods=("lora", "full"),
    device="cpu",
    recipe="0" * 64,
    pairs=(Pair("peak of a step", 1_020_000, 1_000_000), Pair("whole process", 800, 1000)),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TARSIA_CACHE", str(tmp_path))
    return tmp_path


def test_nothing_is_kept_at_first() -> None:
    assert list(read()) == []


def test_entries_come_back_in_their_order() -> None:
    keep(ENTRY)
    keep(replace(ENTRY, model="other"))
    assert list(read()) == [ENTRY, replace(ENTRY, model="other")]


def test_how_far_off() -> None:
    high, low = ENTRY.pairs
    assert high.off == pytest.approx(0.02) and low.off == pytest.approx(-0.2)
    assert "1.0 MB planned, 1.0 MB measured (+2.0%)" in high.said


@pytest.mark.parametrize("measured, wrong", [(1_000_000, False), (960_000, True), (1_080_000, True)])
def test_more_than_five_percent_is_wrong_either_way(measured: int, wrong: bool) -> None:
    entry = replace(ENTRY, pairs=(Pair("peak of a step", 1_020_000, measured), Pair("inputs", 1, 1000)))
    assert [pair.name for pair in entry.wrong] == (["peak of a step"] if wrong else [])


WORDS = json.dumps(asdict(ENTRY) | {"pairs": [{"name": "peak of a step", "planned": "many", "measured": 1}]})


@pytest.mark.parametrize("line", ["{", "[]", '{"date": "x"}', json.dumps({"pairs": [{"name": "x"}]}), "\udcff", WORDS])
def test_a_damaged_line_is_named(line: str) -> None:
    keep(ENTRY)
    with place().open("a", encoding="utf8", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(PlanError, match=r"line 2"):
        list(read())


def test_a_folder_that_can_not_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TARSIA_CACHE", str(tmp_path / "file"))
    with pytest.raises(PlanError, match="TARSIA_CACHE"):
        keep(ENTRY)


def test_of_a_line_that_the_disk_took_in_part_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(ENTRY)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, line: write(handle, line[:20]))
        with pytest.raises(PlanError, match=r"20 of \d+ bytes"):
            keep(ENTRY)
    keep(replace(ENTRY, model="other"))
    assert list(read()) == [ENTRY, replace(ENTRY, model="other")]


def test_what_is_no_file_is_said() -> None:
    place().mkdir(parents=True)
    with pytest.raises(PlanError, match="history can not be read"):
        list(read())


def test_the_whole_is_no_other_pair() -> None:
    assert ENTRY.whole is ENTRY.pairs[1]
    assert replace(ENTRY, pairs=(ENTRY.pairs[0], Pair("inputs", 1, 2))).whole is None
