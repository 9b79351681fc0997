"""Runs that look features up: the curve of runs that do not, the same bits from any folder, killed or not."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from train import small

from tarsia.core.errors import ConfigError
from tarsia.train import loop
from tarsia.train.events import Finished, Notice, read_log
from tarsia.train.recipe import Recipe
from tarsia.train.store import Store

WIDE = 10**9


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A recipe that trains projector and language, with dropout, in steps of two micro-batches."""
    values = small.world(tmp_path_factory.mktemp("features")) | {"save_every": 2}
    return values | {"parts": [part for part in values["parts"] if "vision" not in part["select"]]}


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """Values that name a folder of features, and the result of a run from an empty one."""
    out = tmp_path_factory.mktemp("reference")
    values = world | {"features": {"path": str(out / "kept")}}
    events = small.run(values | {"out": str(out / "out")})
    return values, result(out / "out"), events


def result(out: Path) -> tuple[list[dict], bytes]:
    curve = [event for event in read_log(Path(out) / "events.jsonl") if event["event"] == "step"]
    for event in curve:
        del event["tokens_per_second"]
    return curve, (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_curve_is_that_without_a_cache(world, reference, tmp_path):
    plain = small.curve(small.run(world | {"out": str(tmp_path / "out")}))
    kept = small.curve(reference[2])
    assert len(plain) == len(kept)
    for a, b in zip(plain, kept, strict=True):
        assert b.loss == pytest.approx(a.loss, abs=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)


def test_the_bits_are_the_same_from_an_empty_a_full_and_a_tiny_folder(reference, tmp_path):
    values, expected, _ = reference
    limits = {"full": values["features"], "empty": {"path": str(tmp_path / "a")}}
    limits["tiny"] = {"path": str(tmp_path / "b"), "limit": 5000}
    for name, kept in limits.items():
        small.run(values | {"features": kept, "out": str(tmp_path / name)})
        assert result(tmp_path / name) == expected
    assert sum(path.stat().st_size for path in (tmp_path / "b").rglob("*.features")) <= 5000


def test_a_run_says_what_it_keeps_and_notes_it(reference, tmp_path):
    values, _, events = reference
    said = [event.what for event in events if isinstance(event, Notice) and event.what.startswith("features")]
    assert len(said) == 2 and "vision tower" in said[0] and "computed" in said[1]
    finished = next(event for event in events if isinstance(event, Finished))
    card = finished.adapter.card["features"]
    assert card["computed"] == card["entries"] == 12 and card["found"] > 0 and card["stage"] == "vision tower"
    again = small.run(values | {"out": str(tmp_path / "out"), "seed": 3})
    card = again[-1].adapter.card["features"]
    assert (card["computed"], card["entries"]) == (0, 12)


def test_a_frozen_projector_is_kept_too(world, tmp_path):
    parts = [part for part in world["parts"] if part["select"].startswith("language")]
    values = world | {"parts": parts}
    plain = small.curve(small.run(values | {"out": str(tmp_path / "plain")}))
    kept = small.run(values | {"out": str(tmp_path / "out"), "features": {"path": str(tmp_path / "kept")}})
    assert kept[-1].adapter.card["features"]["stage"] == "projector"
    for a, b in zip(plain, small.curve(kept), strict=True):
        assert b.loss == pytest.approx(a.loss, abs=1e-5)


def test_a_trained_tower_is_refused_before_the_first_step(tmp_path):
    values = small.world(tmp_path) | {"features": {"path": str(tmp_path / "kept")}}
    with pytest.raises(ConfigError, match="can not be kept"):
        small.run(values)
    assert not (tmp_path / "out" / "events.jsonl").exists()


def test_evaluations_find_features_and_the_probe_is_computed(reference, tmp_path, monkeypatch):
    """What is saved with an adapter is what those see who load it, and they have no folder of features."""
    values, expected, _ = reference
    looked, during = [], {}
    get, saved = Store.get, loop.probe

    def counted(name, function, *args):
        before = len(looked)
        result = function(*args)
        during[name] = len(looked) - before
        return result

    def evaluator(host, step):
        pixels = torch.zeros(1, 3, 16, 16)
        counted("evaluation", host.model.model.get_image_features, pixels)
        return {}

    monkeypatch.setattr(Store, "get", lambda store, key: looked.append(key) or get(store, key))
    monkeypatch.setattr(loop, "probe", lambda *args: counted("probe", saved, *args))
    list(loop.fit(small.recipe(values | {"out": str(tmp_path / "out")}), evaluator))
    assert during == {"evaluation": 1, "probe": 0}
    assert result(tmp_path / "out") == expected


def test_what_a_recipe_says_of_features(world):
    def named(**features):
        return Recipe.of(world | {"features": features})

    assert named(path="x").features.bytes == 4_000_000_000
    sizes = {"1.5GiB": 1_610_612_736, "20 MB": 20_000_000, "7": 7, "2k": 2000, "1TB": 10**12, 9: 9}
    assert [named(path="x", limit=limit).features.bytes for limit in sizes] == list(sizes.values())
    for wrong in ("many", "-1GB", "0MB", "1PB", "GB"):
        with pytest.raises(ConfigError, match="no size"):
            named(path="x", limit=wrong)
    with pytest.raises(ConfigError, match=r"no key 'features\.size'"):
        named(path="x", size=3)
    assert named(path="x").hash == named(path="y", limit=5).hash != Recipe.of(world).hash


def work(values: dict, calls_to_live: int | None = None) -> None:
    """One run in a process of its own; dies at the given call that touches the folder of features, if any."""
    if calls_to_live is not None:
        counted = small.dying(calls_to_live)
        os.pwrite, os.replace, os.utime = counted(os.pwrite), counted(os.replace), counted(os.utime)
        Path.open, Path.unlink = counted(Path.open), counted(Path.unlink)
    small.run(values)


@pytest.fixture(scope="module")
def start():
    return small.starter(work)


def ended(process):
    process.join()
    return process.exitcode


@pytest.mark.parametrize("moment", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 20))])
def test_killed_while_the_cache_is_written_the_curve_is_the_same(start, reference, moment, tmp_path):
    values, expected, _ = reference
    # every second folder is so small that it is evicted from all the time
    limit = WIDE if moment % 2 else 5000
    values = values | {"out": str(tmp_path / "out"), "features": {"path": str(tmp_path / "kept"), "limit": limit}}
    assert ended(start(values, random.Random(moment).randrange(2, 70))) == -signal.SIGKILL
    before = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*.features")}
    assert ended(start(values)) == 0
    assert result(tmp_path / "out") == expected
    store = Store(tmp_path / "kept", WIDE)
    entries = list((tmp_path / "kept").rglob("*.features"))
    assert entries and all(store.get(bytes.fromhex(path.stem)) is not None for path in entries)
    assert store.damaged == 0 and not list((tmp_path / "kept").glob(".writing-*"))
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())


def test_two_runs_fill_one_folder_at_once(start, reference, tmp_path):
    values, expected, _ = reference
    values = values | {"features": {"path": str(tmp_path / "kept")}}
    processes = [start(values | {"out": str(tmp_path / n)}) for n in "ab"]
    assert [ended(process) for process in processes] == [0, 0]
    assert result(tmp_path / "a") == result(tmp_path / "b") == expected
