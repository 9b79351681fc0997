"""The replay curve's runs: what is mixed, what is kept, what is refused, what is counted and drawn."""

from __future__ import annotations

import io
import json

import matplotlib.image
import pytest
from data.processors import picture
from rich.console import Console
from train import small

from tarsia.core.errors import ConfigError
from tarsia.labs import dog, replay, replay_draw, replay_rows, smears
from tarsia.labs.replay import Results, Run
from tarsia.labs.shifts import SHIFTS, Shift

CONSOLE = Console(file=io.StringIO(), width=200)


def rows(answer, count=4):
    return [("what is this?", answer, (picture(shade=9 * i + 1),)) for i in range(count)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(small.base(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture
def world(monkeypatch, tiny):
    """One shift of four rows on the tiny base, two general sources, two steps a run."""
    recipe = {
        "model": tiny,
        "parts": [{"method": "lora", "select": "language.*.{q,v}", "rank": 2, "lr": 1e-3}],
        "steps": 2,
        "batch": 4,
    }
    job = Shift("job", "a job", lambda split, data: {"cats": rows("a cat"), "reds": rows("red")}, recipe, 2)
    general = {"digits": rows("4", 6), "words": [("say red", "red", ())] * 2}
    monkeypatch.setattr(replay, "SHIFTS", {"job": job})
    monkeypatch.setattr(replay_rows, "general", lambda split, data: general)
    monkeypatch.delenv("TARSIA_DATA", raising=False)
    return job


RUNS = tuple(Run("job", share, mode, 1) for share in (0.0, 0.1) for mode in (replay.MODES if share else ("none",)))


def test_runs_are_every_share_mode_and_seed_once():
    assert len(set(replay.RUNS)) == len(replay.RUNS) == len({run.name for run in replay.RUNS}) == 4 * (1 + 5 * 2) * 3
    assert sorted(replay.SHARES) == [0, 0.01, 0.02, 0.05, 0.1, 0.2]
    assert {run.mode for run in replay.RUNS if not run.share} == {"none"}
    seeds = [run.seed for run in replay.RUNS]
    assert seeds == sorted(seeds), "the first seed of everything comes first"


def test_one_recipe_serves_every_share(tmp_path, world):
    """But for the rows that are mixed in, nothing differs between two runs of a shift."""
    replay.write(tmp_path, [world], "train", None)
    made = {run: replay.recipe(run, tmp_path).resolved for run in RUNS}
    plain = {
        json.dumps({k: v for k, v in one.items() if k not in ("data", "out")}, default=str) for one in made.values()
    }
    assert len(plain) == 1
    for run, one in made.items():
        weights = {source["name"]: source["weight"] for source in one["data"]["train"]}
        assert sum(weights.values()) == pytest.approx(1)
        assert weights.get("general", 0.0) == pytest.approx(run.share)
        assert weights["cats"] == weights["reds"]
        assert one["data"]["mix"] == (run.mode if run.share else "sampled")
        assert one["features"] is not None, "the tower is frozen"


def test_a_trained_tower_is_not_kept(tmp_path, world):
    parts = [{**world.recipe["parts"][0], "select": "vision.*.{q,v}"}]
    assert replay.frozen(world)
    assert not replay.frozen(Shift("eyes", "eyes", world.rows, {**world.recipe, "parts": parts}, 2))


def test_runs_are_measured_kept_and_drawn(tmp_path, world, monkeypatch):
    """From the first row to the pictures; what is done is not done again, and a damaged claim is refused."""
    replay.drive(tmp_path, CONSOLE, RUNS)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert set(kept) == {f"{run.name}.json" for run in RUNS} | {"job-before.json"}
    assert not list((tmp_path / "training").iterdir())
    replay.drive(tmp_path, CONSOLE, RUNS)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()} == kept

    monkeypatch.setattr(replay, "SHARES", (0.0, 0.1))
    found = Results.read(tmp_path, RUNS)
    assert found.shifts == ("job",) and found.own["job"] == ("cats", "reds")
    assert found.rows == {"job/cats": 4, "job/reds": 4, "job/digits": 6, "job/words": 2}
    curves = found.curves("job")
    assert curves["job"]["sampled"][0.0] == curves["job"]["weighted"][0.0] == [found.job(RUNS[0])]
    data = json.loads(replay.result(tmp_path, RUNS[2].name).read_text())["data"]
    assert data["general"]["rows"] == 2, "the weighted mode has a general row in every step"

    monkeypatch.setattr(replay_draw, "SHIFTS", {"job": world})
    replay_draw.curves(tmp_path / "a.png", {"job": curves})
    replay_draw.shifts(tmp_path / "b.png", tmp_path, [world])
    for name in ("a.png", "b.png"):
        pixels = matplotlib.image.imread(tmp_path / name)
        assert pixels.shape[0] > 300 and pixels.std() > 0.01
    assert not list(tmp_path.glob("*.partial*"))


def test_a_missing_or_stale_result_is_refused(tmp_path, world):
    with pytest.raises(ConfigError, match="no result"):
        replay.read(tmp_path, RUNS[0].name)
    replay.once(tmp_path, RUNS[0].name, lambda: {"recipe": {**world.recipe, "steps": 3}, "said": {}})
    with pytest.raises(ConfigError, match="another recipe"):
        replay.read(tmp_path, RUNS[0].name)


def test_two_processes_do_not_do_one_run(tmp_path):
    with replay.claimed(tmp_path / "claims" / "x") as mine:
        assert mine
        assert replay.once(tmp_path, "x", lambda: pytest.fail("done twice")) is None
    assert replay.once(tmp_path, "x", lambda: {"said": {}}) == {"said": {}}
    assert replay.once(tmp_path, "x", lambda: pytest.fail("done twice")) is None


def test_a_run_that_fails_leaves_no_result(tmp_path):
    def work():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        replay.once(tmp_path, "x", work)
    assert replay.once(tmp_path, "x", lambda: {"said": {}}) is not None


def test_points_are_lost_on_the_mean_of_the_general_sources():
    runs = [Run("job", 0.1, "sampled", seed) for seed in (1, 2)]
    before = {"cats": 0.0, "digits": 100.0, "words": 70.0}
    after = {
        runs[0]: {"cats": 90.0, "digits": 90.0, "words": 72.0},
        runs[1]: {"cats": 80.0, "digits": 100.0, "words": 70.0},
    }
    found = Results({"job": before}, after, {"job": ("cats",)}, {})
    assert found.lost(runs[0]) == {"digits": 10.0, "words": -2.0}
    assert [found.forgotten(run) for run in runs] == [4.0, 0.0]
    assert [found.job(run) for run in runs] == [90.0, 80.0]
    assert found.seeds("job", 0.1, "sampled") == runs and not found.seeds("job", 0.1, "weighted")


def test_no_file_of_data_is_no_blood(tmp_path, monkeypatch):
    monkeypatch.setenv("TARSIA_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"bccd-train\.parquet"):
        replay.folder(needed=False)
    monkeypatch.delenv("TARSIA_DATA")
    assert replay.folder(needed=False) is None
    with pytest.raises(ConfigError, match="not set"):
        replay.drive(tmp_path, CONSOLE, [Run("blood", 0.0, "none", 1)])
    assert [shift.name for shift in SHIFTS.values() if shift.needs_data] == ["blood"]


def test_ways_of_the_dog_differ_in_one_thing():
    plain, *cures = dog.WAYS.values()
    assert (plain.rank, len(plain.selects), plain.share) == (64, 2, 0.0)
    for cure in cures:
        changed = [key for key in ("rank", "selects", "share") if getattr(cure, key) != getattr(plain, key)]
        assert len(changed) == 1


def test_every_way_sees_the_cells_as_often(tmp_path):
    for way in dog.WAYS.values():
        made = dog.recipe(way, 1, tmp_path)
        assert made.steps is not None
        cells = made.steps * made.batch * (1 - way.share)
        assert cells == pytest.approx(dog.EPOCHS * dog.EACH * len(smears.CELLS), rel=0.01)


def test_answers_that_speak_of_blood_are_counted():
    assert dog.called_cells(["a platelet", "a dog", "a white white cell", "a truck"]) == 50


def test_the_dog_is_taught_measured_and_kept(tmp_path, world, tiny, monkeypatch):
    monkeypatch.setattr(dog, "MODEL", tiny)
    monkeypatch.setattr(dog, "EACH", 1)
    monkeypatch.setattr(dog, "BATCH", 15)
    monkeypatch.setattr(dog.blood, "data", lambda: tmp_path)
    monkeypatch.setattr(smears, "cells", lambda path, each: rows("a platelet", 3))
    monkeypatch.setattr(replay_rows, "dogs", lambda data, count: rows("a dog", 2))
    ways = {"plain": dog.Way(rank=2), "10 % mixed in": dog.Way(rank=2, share=0.1)}
    monkeypatch.setattr(dog, "WAYS", ways)
    dog.drive(tmp_path, CONSOLE, [1])
    kept = {path.name for path in (tmp_path / "results").iterdir()}
    assert kept == {"dog-before.json", "dog-plain-seed-1.json", "dog-10-percent-mixed-in-seed-1.json"}
    found = dog.read(tmp_path, "plain", 1)
    assert {name: len(said) for name, said in found["said"].items()} == {"cells": 3, "dogs": 2, "digits": 6, "words": 2}
    assert set(found["data"]) == {"cells"}
    assert set(dog.read(tmp_path, "10 % mixed in", 1)["data"]) == {"cells", "general"}
    with pytest.raises(ConfigError, match="no result"):
        dog.read(tmp_path, "plain", 2)
    monkeypatch.setattr(dog, "EPOCHS", 11)
    with pytest.raises(ConfigError, match="another recipe"):
        dog.read(tmp_path, "plain", 1)
