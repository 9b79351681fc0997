"""The parity chapter fails where QLoRA is away from LoRA, and its runs differ in nothing else."""

from __future__ import annotations

import pytest

from tarsia.labs import parity
from tarsia.labs.chapters.qlora import CHAPTER, compared


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


def test_the_runs_differ_in_their_base_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "rows", lambda job, split, out: tmp_path / f"{job}.parquet")
    lora, qlora, full = (
        parity.recipe(parity.Run("commands", kind, 2), tmp_path).model_dump() for kind in ("LoRA", "QLoRA", "full")
    )
    assert {key for key in lora if lora[key] != qlora[key]} == {"four_bits", "out"}
    assert {key for key in lora if lora[key] != full[key]} == {"parts", "out"}
    assert qlora["four_bits"]["kind"] == "nf4" and lora["four_bits"] is None
    assert [part["method"] for part in full["parts"]] == ["full", "full"]
