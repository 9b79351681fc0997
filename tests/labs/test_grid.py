"""The desk of short runs: searches end beside a lower rate, runs are trained once, results of others are refused."""

from __future__ import annotations

import json

import pytest
import torch

from tarsia.core.errors import ConfigError
from tarsia.evaluate import find, generate
from tarsia.labs import grid, replay, sources
from tarsia.labs.experiment import samples
from tarsia.labs.grid import Curve, Grid, Run, Setting
from tarsia.labs.runs import score


def results(lows, seeds=2):
    """A curve with these losses by place of the grid."""
    splits = {
        step: {split: {"loss": loss, "right": [1.0, 0.0]} for split in grid.MEASURED} for step, loss in lows.items()
    }
    return {step: [{"splits": split, "trained": 8, "base": "a"}] * seeds for step, split in splits.items()}


@pytest.mark.parametrize("best", [-5, -1, 0, 1, 6])
def test_a_search_ends_with_a_neighbour_on_either_side(best):
    asked = []

    def loss(step):
        asked.append(step)
        return abs(step - best - 0.2)

    known = grid.bracket(loss, 0)
    low = min(known, key=known.get)
    assert low == best and {best - 1, best + 1} <= set(known)
    assert len(asked) == len(set(asked)), "no place is tried twice"


def test_a_search_that_falls_for_ever_is_refused():
    with pytest.raises(ConfigError, match="not on the grid"):
        grid.bracket(lambda step: -step, 0)


@pytest.mark.parametrize("vertex", [-0.4, 0.0, 0.3])
def test_the_best_rate_between_the_places(vertex):
    curve = Curve(Setting("infrared"), results({step: 1 + (step - vertex) ** 2 for step in (-2, -1, 0, 1)}))
    assert curve.low == 0 and curve.best == pytest.approx(vertex)
    assert grid.rate(curve.best) == pytest.approx(1e-3 * 2**vertex)
    assert curve.accuracy == 50 and curve.trained == 8 and curve.rights(0) == [1.0, 0.0]


def test_names_tell_runs_apart():
    names = [Run(setting, step, seed).name for setting in grid.searched() for step in (-1, 0) for seed in grid.SEEDS]
    assert len(set(names)) == len(names)


def test_rules_agree_at_rank_8():
    assert {rule(8) for rule in grid.RULES.values()} == {2.0}
    assert [grid.RULES["alpha/sqrt(r)"](rank) for rank in (2, 32)] == pytest.approx([4.0, 1.0])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A desk of two steps and a few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "STEPS", 2)
        patch.setattr(grid, "TRAIN", 8)
        patch.setattr(grid, "MEASURED", {"validation": 4, "held-out": 6})
        patch.setattr(grid, "SETTINGS", {"steps": 2})
        yield Grid(tmp_path_factory.mktemp("grid"))


def test_a_run_is_trained_once(small, monkeypatch):
    run = Run(Setting("infrared"), 0, 1)
    found = small.result(run)
    assert found["trained"] == 8 * 6 * sum((384, 256, 256, 384, 704, 704, 704))
    assert [len(found["splits"][split]["right"]) for split in ("validation", "held-out")] == [4, 6]
    assert not (small.out / "training" / run.name).exists() and small.factors(run).exists()
    monkeypatch.setattr(small, "perform", None)
    assert small.result(run) == found


def test_a_result_of_other_settings_is_refused(small):
    run = Run(Setting("infrared"), 0, 1)
    small.result(run)
    path = replay.result(small.out, run.name)
    held = json.loads(path.read_text(encoding="utf8"))
    path.write_text(json.dumps({**held, "settings": {"steps": 3}}), encoding="utf8")
    with pytest.raises(ConfigError, match="another run"):
        small.result(run)
    path.write_text(json.dumps(held), encoding="utf8")


@pytest.mark.parametrize("job", ["infrared", "scenes"])
def test_right_is_what_greedy_decoding_says(small, monkeypatch, job):
    """The base on the job and on its own world: the marks without generating are those of what it says."""
    monkeypatch.setattr(small, "jobs", {**small.jobs, "scenes": sources.scenes})
    batches = list(small.batches(job, "held-out"))
    some = samples({"x": small.rows(job, "held-out")})["x"]
    judge = find("exact")
    said = generate(small.host, some, 8, 6)
    marks = [float(judge(text, row.messages[-1].text)) for text, row in zip(said, some, strict=True)]
    assert score(small.host, batches)["right"] == marks
    assert any(marks) == (job == "scenes")


def test_a_token_that_is_wrong_makes_its_row_wrong(small):
    batches = list(small.batches("infrared", "held-out"))
    first = batches[0]
    place = (first.labels[2] != -100).nonzero()[-1]
    model = small.host.model

    class Says(torch.nn.Module):
        """Says the labels, but for one token of row 2."""

        def __init__(self):
            super().__init__()
            self.head = torch.nn.Identity()

        def get_output_embeddings(self):
            return self.head

        def forward(self, **inputs):
            ids = first.labels.clamp(min=0).roll(-1, 1)
            ids[2, place - 1] += 1
            hidden = self.head(torch.nn.functional.one_hot(ids, 1024).float())
            return type("Out", (), {"logits": 50 * hidden})

    object.__setattr__(small.host, "model", Says())
    try:
        found = score(small.host, [first])
    finally:
        object.__setattr__(small.host, "model", model)
    assert found["right"] == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
