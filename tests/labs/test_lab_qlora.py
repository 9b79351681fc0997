"""The parity chapter fails where QLoRA is away from LoRA, and its runs differ in nothing else."""

from __future__ import annotations

import json

import pytest

from tarsia.core.errors import ConfigError
from tarsia.labs import parity
from tarsia.labs.chapters.qlora import CHAPTER, compared
from tarsia.labs.frame.chapter import Desk


def rights(worse=0, job="commands"):
    """For 3 seeds and 200 rows: LoRA has 180 right, QLoRA on ``job`` ``worse`` fewer."""

    def seeds(wrong):
        return [[0.0] * wrong + [1.0] * (200 - wrong) for _ in parity.SEEDS]

    return {
        (name, kind): seeds(20 + (worse if (name, kind) == (job, "QLoRA") else 0))
        for name in parity.JOBS
        for kind in parity.KINDS
    }


@pytest.mark.parametrize("worse,verdict", [(0, "PASS"), (2, "PASS"), (3, "FAIL"), (-3, "FAIL")])
@pytest.mark.parametrize("job", parity.JOBS)
def test_more_than_a_point_on_one_job_fails(worse, verdict, job):
    found = compared(rights(worse, job))
    assert CHAPTER.judge(found) == verdict
    assert found.rows[f"QLoRA less LoRA: {job}"]["points"] == -worse / 2
    assert found.rows["accuracy: infrared"]["LoRA"] == 90


def test_an_interval_holds_its_mean():
    for name, row in compared(rights(1)).rows.items():
        if "less" in name:
            assert row["from"] <= row["points"] <= row["to"]


@pytest.mark.parametrize("planted,says", [({"quantised": ""}, "another form"), ({"base": "b"}, "different bases")])
def test_results_that_do_not_belong_together_are_refused(planted, says, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "drive", lambda out, show: None)
    for run in parity.RUNS:
        held = {"right": [1.0, 0.0], "base": "a", "quantised": "nf4" if run.kind == "QLoRA" else ""}
        held |= planted if run == parity.Run("commands", "QLoRA", 3) else {}
        path = tmp_path / "results" / f"{run.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(held), encoding="utf8")
    with pytest.raises(ConfigError, match=says):
        CHAPTER.measure(Desk(tmp_path, {}, lambda share, what: None))


def test_the_runs_differ_in_their_base_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "rows", lambda job, split, out: tmp_path / f"{job}.parquet")
    lora, qlora, full = (
        parity.recipe(parity.Run("commands", kind, 2), tmp_path).model_dump() for kind in ("LoRA", "QLoRA", "full")
    )
    assert {key for key in lora if lora[key] != qlora[key]} == {"four_bits", "out"}
    assert {key for key in lora if lora[key] != full[key]} == {"parts", "out"}
    assert qlora["four_bits"]["kind"] == "nf4" and lora["four_bits"] is None
    assert [part["method"] for part in full["parts"]] == ["full", "full"]
