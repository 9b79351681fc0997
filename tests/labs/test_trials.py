"""The desk of short trainings chooses rates on validation rows alone, and takes no result of another run."""

from __future__ import annotations

import json

import pytest

from tarsia.core.errors import ConfigError
from tarsia.labs import replay
from tarsia.labs.placing import BOTH, JOBS, KINDS
from tarsia.labs.trials import Trial, Trials

TRIAL = Trial("visual", "language", 0.0, 0, 5)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """Its runs are not trained: which rows are right depends on the rate alone."""
    made = Trials(tmp_path, JOBS, KINDS, lambda name: None)
    made.rights = {1e-3: (5, 9, 0.5), 2e-3: (6, 1, 0.9), 3e-3: (6, 2, 0.7)}
    made.ran = []

    def perform(self, trial):
        self.ran.append(trial.name)
        valid, held, loss = self.rights[trial.rate]
        splits = {
            split: {"right": [1.0] * right + [0.0] * (10 - right), "loss": loss}
            for split, right in (("validation", valid), ("held-out", held))
        }
        return {"splits": splits, "trained": 3, "base": "a", "seconds": 1.0}

    monkeypatch.setattr(Trials, "perform", perform)
    return made


def test_the_rate_is_chosen_on_validation_rows_then_by_loss(desk):
    chosen = desk.chosen(TRIAL, (1e-3, 2e-3, 3e-3), (1, 2))
    assert chosen.rate == 3e-3 and chosen.accuracies == [20, 20]
    assert chosen.rates == {1e-3: 50, 2e-3: 60, 3e-3: 60}
    assert desk.ran == [
        *(f"visual-language-lr{rate:g}-seed-1" for rate in (1e-3, 2e-3, 3e-3)),
        "visual-language-lr0.003-seed-2",
    ]
    desk.chosen(TRIAL, (1e-3, 2e-3, 3e-3), (1, 2))
    assert len(desk.ran) == 4


def test_a_result_of_other_settings_is_refused(desk):
    desk.chosen(TRIAL, (1e-3,), (1,))
    path = replay.result(desk.out, "visual-language-lr0.001-seed-1")
    held = json.loads(path.read_text(encoding="utf8"))
    held["settings"]["parts"][0]["rank"] = 4
    path.write_text(json.dumps(held), encoding="utf8")
    with pytest.raises(ConfigError, match="another run"):
        desk.chosen(TRIAL, (1e-3,), (1,))


@pytest.mark.parametrize("kind,kept", [("language", True), ("projector", True), ("vision", False), (BOTH, False)])
def test_outputs_of_the_tower_are_kept_where_it_is_left_alone(kind, kept, tmp_path, monkeypatch):
    desk = Trials(tmp_path, JOBS, KINDS)
    monkeypatch.setattr(desk, "rows", lambda job, split: tmp_path / "rows.parquet")
    made = desk.recipe(Trial("visual", kind, 2e-3, 1, 5))
    assert (made.features is not None) is kept
    assert {part.lr for part in made.parts} == {2e-3} and made.steps == 5 and made.seed == 1
