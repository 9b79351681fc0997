"""The numbers that docs/replay.md shows, from results that are known."""

from __future__ import annotations

import pytest

from bench.cases import replay as case
from tarsia.labs.replay import RUNS, Results

SHIFT = "commands"


@pytest.fixture
def found():
    """The job is 90 + seed right; 12 + seed points are lost without replay, 3 with 10 % sampled, a gain weighted."""

    def lost(run):
        return {"none": 12.0 + run.seed, "sampled": 3.0, "weighted": -1.0}[run.mode]

    runs = [run for run in RUNS if run.shift == SHIFT]
    before = {SHIFT: {"commands": 0.0, "digits": 100.0, "words": 80.0}}
    after = {
        run: {"commands": 90.0 + run.seed, "digits": 100 - 2 * lost(run), "words": 80.0} for run in runs
    }  # half of the two sources' mean
    return Results(before, after, {SHIFT: ("commands",)}, {f"{SHIFT}/commands": 100})


def test_the_bar_compares_means(found):
    assert case._bar(found) == {
        "bar: robot commands": {
            "none": 14.0,
            "10 %, sampled": 3.0,
            "times less, sampled": 4.7,
            "10 %, weighted": -1.0,
            "times less, weighted": "all of it",
        }
    }


def test_curves_tell_mean_and_range_of_every_share(found):
    table = case._curves(found)
    assert table["forgotten: robot commands, sampled"] == {
        "0 %": "14.0 (13.0 to 15.0)",
        **dict.fromkeys(("1 %", "2 %", "5 %", "10 %", "20 %"), "3.0 (3.0 to 3.0)"),
    }
    assert table["job: robot commands, weighted"]["0 %"] == "92.0 (91.0 to 93.0)"
    assert list(table) == [f"{w}: robot commands, {m}" for w in ("forgotten", "job") for m in ("sampled", "weighted")]


def test_what_is_lost_is_told_by_source(found):
    assert case._lost(found)["lost: robot commands, none"] == {"digits": 28.0, "words": 0.0}


def test_every_single_run_is_in_the_line(found):
    seeds = case._seeds(found)
    assert len(seeds) == 33
    assert seeds["seeds: commands-none-00-seed-2"] == {"forgotten": 14.0, "job": 92.0}


def test_rows_say_what_the_base_knew(found):
    assert case._rows(found) == {"rows: robot commands, commands": {"rows": 100, "before": 0.0}}
