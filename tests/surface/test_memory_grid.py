"""The grid that plans of memory are held to: what it draws, that it runs, and that nothing which fails is left out."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace

import pytest

from bench.grid import runner
from bench.grid.configurations import (
    BUDGET,
    DEVELOPMENT,
    HELD_OUT,
    METHODS,
    NO_PLACE,
    STEPS,
    TOO_MUCH,
    UNTIED,
    Configuration,
    configuration,
    refused,
)
from bench.grid.judged import error, spread, summary
from bench.grid.measure import apart, borrowed, built, guarded
from bench.grid.rows import Rows
from bench.grid.words import CONTROLS, tokenizer
from bench.grid.worlds import FAMILIES, RESOLUTIONS, World, build, speak
from tarsia.adapter import open_base
from tarsia.core.method import METHODS as KNOWN
from tarsia.data import Encoder, read
from tarsia.data.sources import Source
from tarsia.train import Recipe

TINY = World("llava", 1024, 64, 128, 3, 2, 1, 64, 3, 2, 112, False)


@pytest.fixture(scope="module")
def drawn() -> list[Configuration]:
    return [configuration(seed) for seed in DEVELOPMENT]


def test_a_seed_is_one_configuration(drawn):
    assert [configuration(seed) for seed in DEVELOPMENT] == drawn
    assert [configuration(seed).redrawn for seed in DEVELOPMENT[:5]] == [found.redrawn for found in drawn[:5]]
    assert len({json.dumps(found.recipe) for found in drawn}) == len(drawn)
    assert not set(DEVELOPMENT) & set(HELD_OUT)


def test_the_whole_space_is_met(drawn):
    seen = {
        "family": {found.world.family for found in drawn},
        "method": {method for found in drawn for method in found.methods},
        "pictures": {found.pictures for found in drawn},
        "resolution": {found.world.resolution for found in drawn},
        "bits": {"four_bits" in found.recipe for found in drawn},
        "kinds": {found.recipe["four_bits"]["kind"] for found in drawn if "four_bits" in found.recipe},
        **{
            key: {found.recipe[key] for found in drawn}
            for key in ("precision", "checkpointing", "accumulate", "batching", "clip")
        },
        "features": {"features" in found.recipe for found in drawn},
    }
    assert seen == {
        "family": set(FAMILIES),
        "method": set(METHODS),
        "pictures": set(range(5)),
        "resolution": set(RESOLUTIONS),
        "bits": {False, True},
        "kinds": {"nf4", "fp4", "int4"},
        "precision": {"float32", "bfloat16"},
        "checkpointing": {False, True},
        "accumulate": {1, 2, 3},
        "batching": {"plain", "grouped", "packed"},
        "clip": {None, 1.0},
        "features": {False, True},
    }
    assert set(METHODS) == set(KNOWN)
    together = Counter(("four_bits" in c.recipe, c.pictures > 1, c.recipe["checkpointing"]) for c in drawn)
    assert len(together) == 8


def test_all_that_is_drawn_is_legal_and_cheap(drawn):
    for found in drawn:
        assert refused(found) is None
        assert found.work <= BUDGET
        places = {"model": "base", "data": {"train": [{"path": "rows.jsonl"}]}, "out": "out"}
        features = {"features": {"path": "features"}} if "features" in found.recipe else {}
        assert Recipe.of({**found.recipe, **places, **features}).steps == STEPS


def part(method: str, select: str = "language") -> dict[str, object]:
    return {"method": method, "select": select, "lr": 1e-4}


FOUR = {"kind": "nf4", "nested": True, "select": "language"}
ROWS = Rows(6, (1,), 112, 4, 2, 0.0)
PLAIN = {
    "parts": [part("lora")],
    "batch": 2,
    "accumulate": 2,
    "batching": "plain",
    "precision": "float32",
    "checkpointing": False,
}


@pytest.mark.parametrize(
    "reason, changed",
    [
        ("no picture for the tower or the projector", {"parts": [part("lora", "vision")], "pictures": (0,)}),
        ("two parts of one component", {"parts": [part("lora"), part("ia3")]}),
        ("a prompt with packed rows", {"parts": [part("prompt")], "batching": "packed"}),
        ("a prompt with checkpointing", {"parts": [part("prefix")], "checkpointing": True}),
        ("rows that can not be packed", {"batching": "packed", "family": "gemma3"}),
        ("nothing to group", {"batching": "grouped", "accumulate": 1}),
        ("nothing to pack", {"batching": "packed", "batch": 1}),
        ("LoftQ over weights that are not in 4 bits", {"parts": [part("loftq")]}),
        ("LoftQ over weights that are not in 4 bits", {"parts": [part("loftq", "vision")], "four_bits": FOUR}),
        ("full training of weights in 4 bits", {"parts": [part("full")], "four_bits": FOUR}),
        ("no biases to train", {"parts": [part("bitfit")]}),
        ("no biases to train", {"parts": [part("bitfit", "projector")], "family": "idefics3"}),
        ("gates that are experts", {"parts": [part("lora", "language.*.{gate,up,down}")], "family": "qwen3_vl_moe"}),
        ("layers that look at pictures, and none", {"pictures": (0, 0), "family": "mllama"}),
        ("a projector without a linear layer", {"parts": [part("vera", "projector")], "family": "gemma3"}),
        ("features of a tower that is trained", {"parts": [part("lora", "vision.0..1")], "features": {}}),
        (
            "features of a tower that ends with a projector that is trained",
            {"parts": [part("lora", "projector")], "features": {}, "family": "qwen2_vl"},
        ),
        ("features of no picture", {"features": {}, "pictures": (0, 0)}),
        (NO_PLACE, {"parts": [part("vpt", "vision")], "family": "qwen3_vl"}),
        ("prompts through two stacks of blocks", {"parts": [part("vpt", "vision")], "family": "mllama"}),
        (UNTIED, {"family": "mllama", "tied": True}),
        (TOO_MUCH, {"layers": 8000}),
    ],
)
def test_what_can_not_be_run_is_refused(reason, changed):
    sizes = {key: changed[key] for key in ("family", "tied", "layers") if key in changed}
    rows = replace(ROWS, pictures=changed.get("pictures", (1,)))
    recipe = PLAIN | {key: value for key, value in changed.items() if key not in (*sizes, "pictures")}
    assert refused(Configuration(0, TINY, ROWS, PLAIN)) is None
    assert refused(Configuration(0, replace(TINY, **sizes), rows, recipe)) == reason


@pytest.mark.parametrize("size", [1024, 4099])
def test_a_tokenizer_has_as_many_entries_as_it_is_asked_for(size):
    made = tokenizer(size, ("<image>",), {"image_token": "<image>"}, bos=True)
    assert len(made) == size
    ids = made("a word of letters<image>")["input_ids"]
    assert made.decode(ids) == "<s>a word of letters<image>"
    assert len(ids) < len("a word of letters") and made.pad_token_id == CONTROLS.index("<pad>")


def test_rows_follow_from_their_seed(tmp_path):
    rows = Rows(5, (2, 0), 112, 8, 4, 0.5)
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        rows.write(tmp_path / folder, seed)
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    lines = [json.loads(line) for line in files["a"]["rows.jsonl"].splitlines()]
    assert [len(line["images"]) for line in lines] == [2, 0, 2, 0, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_and_sees_its_pictures(family, tmp_path):
    import torch

    speak()
    build(replace(TINY, family=family), tmp_path / "base")
    rows = read(Source(path=str(ROWS.write(tmp_path / "rows", 0))))
    host = open_base(str(tmp_path / "base"))
    batch = Encoder(host.processor).batch([rows[0], rows[1]])
    with torch.no_grad():
        logits = host.model(**batch.inputs).logits
        other = {key: -v if key == "pixel_values" else v for key, v in batch.inputs.items()}
        assert not torch.allclose(host.model(**other).logits, logits)
    assert logits.shape == (*batch.labels.shape, TINY.vocabulary)
    assert (batch.labels >= 0).any()


@pytest.mark.slow
def test_one_configuration_runs(drawn, tmp_path):
    least = min(drawn, key=lambda found: found.work * ("four_bits" in found.recipe or 3))
    line = runner.run(least.seed, tmp_path / "one")
    assert "error" not in line, line["error"]
    assert abs(error(line, "live")) < 10 and abs(error(line, "step")) < 10
    assert line["configuration"]["family"] == least.world.family
    held, memory = line["live"]["held"], line["process"]["memory"]
    assert held["patches"] > 0 and held["states"] >= 2 * held["patches"]
    assert held["weights"] == memory["weights"] and held["quantised"] == memory["quantised"]
    step = max(line["live"]["peaks"][phase] for phase in ("forward", "backward", "update"))
    assert memory["peak"] == pytest.approx(step, rel=1e-4)
    assert line["live"]["peak"] >= step > sum(held.values())
    assert len(line["process"]["losses"]) == STEPS
    assert line["process"]["peak"] > line["process"]["before"] > 0


def test_pictures_of_numpy_are_counted_while_they_live():
    import numpy as np
    import torch

    from tarsia.train.memory import live

    with live() as watched, borrowed(watched):
        watched.mark("lent")
        tensor = torch.from_numpy(np.zeros(1000, dtype=np.float32))
        other = tensor[:10].view(2, 5)
        del tensor
        watched.mark("seen in part")
        assert other.sum() == 0
        del other
        watched.mark("gone")
        torch.empty(10)
    assert watched.peaks["lent"] == 4000
    assert 4000 <= watched.peaks["seen in part"] < 4100
    assert [held for _, held in watched.line][-1] == 0
    assert torch.from_numpy.__name__ == "from_numpy"


def test_what_fails_in_a_copy_of_the_process_is_told():
    assert apart(lambda: {"value": 3})["value"] == 3
    assert apart(lambda: {"value": 1 // 0})["error"] == "ZeroDivisionError: integer division or modulo by zero"
    assert "status" in apart(lambda: os._exit(3))["error"]
    assert guarded(lambda: {"value": [][0]})["error"].startswith("IndexError")


def test_a_process_that_says_nothing_or_does_not_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert runner.run(0, tmp_path / "x")["error"] == "it ended with 1: nothing said"
    monkeypatch.undo()
    monkeypatch.setattr(runner, "LIMIT", 0.05)
    assert runner.run(0, tmp_path / "x")["error"] == "it took more than 0.05 s"


def test_a_set_goes_on_where_it_stopped_and_past_what_failed(tmp_path, monkeypatch):
    asked = []

    def run(seed, folder):
        asked.append(seed)
        (folder / "base").mkdir(parents=True)
        return {"seed": seed} | ({"error": "planted"} if seed == 1 else {})

    monkeypatch.setattr(runner, "run", run)
    results = tmp_path / "lines.jsonl"
    assert next(runner.series(range(4), results))["seed"] == 0
    assert [line["seed"] for line in runner.series(range(4), results)] == [1, 2, 3]
    assert asked == [0, 1, 2, 3]
    assert [line.get("error") for line in runner.read(results)] == [None, "planted", None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]


def line(seed: int, live: tuple[int, int], process: tuple[int, int]) -> dict[str, object]:
    """A line of results with these planned and measured bytes."""
    return {
        "seed": seed,
        "configuration": json.loads(json.dumps(runner.described(configuration(seed)))),
        "planned": {"live": live[0], "step": live[0], "process": process[0]},
        "live": {"peak": live[1], "peaks": {"forward": live[1] - 1, "update": 5}},
        "process": {"peak": process[1], "memory": {"peak": live[1]}},
    }


def test_how_far_a_plan_is_off_is_counted():
    lines = [line(0, (1010, 1000), (990, 1000)), line(1, (980, 1000), (900, 1000))]
    assert error(lines[0], "live") == pytest.approx(1.0)
    assert error(lines[1], "process") == pytest.approx(-10.0)
    found = summary([*lines, {**line(2, (1, 1), (1, 1)), "error": "planted"}])
    assert found["bar: live bytes, all"] == {
        "runs": 2,
        "median %": 1.5,
        "95th percentile %": 1.95,
        "most under %": 2.0,
        "most over %": 1.0,
        "under by over 1 %": 1,
    }
    assert found["bar: process, all"]["under by over 3 %"] == 1
    assert found["bar: process, seeds never looked at"] == {"runs": 0}
    assert found["failed: seed 2"] == {"error": "planted"}
    assert found[f"family_live: {configuration(1).world.family}"]["most under %"] == 2.0
    assert found[f"method_process: {configuration(0).methods[0]}"]["most under %"] == 1.0
    lines[0]["planned"]["process"] = None
    assert summary(lines)["bar: process, all"]["not planned"] == 1
    assert found["instruments: run and record of all"]["most %"] == pytest.approx(0.1, abs=0.01)


def test_errors_are_spread_over_both_sides():
    assert spread([], 1) == {"runs": 0}
    assert spread([-3.0, 2.0, 1.0], 3)["under by over 3 %"] == 0
    assert spread([-3.01, 2.0, 1.0], 3)["under by over 3 %"] == 1
    assert spread([4.0], 1)["95th percentile %"] == 4.0


def test_files_of_a_configuration_are_what_a_recipe_needs(tmp_path):
    least = min((configuration(seed) for seed in DEVELOPMENT), key=lambda found: found.world.vocabulary)
    assert built(least.seed, tmp_path)["files"] > 0
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.model == str(tmp_path / "base")
    assert tuple(part.method for part in recipe.parts) == least.methods
