"""LoRA within a share: both kinds are searched alike and measured on the same rows; the chapter fails where it must."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from data.processors import picture
from train import small

from tarsia.adapter import open_base
from tarsia.core.errors import ConfigError
from tarsia.core.select import select
from tarsia.core.site import PARAMETERS, Kind
from tarsia.labs import eyes, jobs, replay_rows, share
from tarsia.labs.chapters.share import CHAPTER, Job, compared
from tarsia.labs.frame.chapter import Desk
from tarsia.labs.shifts import SHIFTS


def held(lora, full, part=0.0194, known=0.9):
    """A job of 200 rows: ``lora`` and ``full`` of them right, at every seed."""

    def result(right, trained, forgotten):
        marks = [1.0] * right + [0.0] * (200 - right)
        return {"right": marks, "trained": round(5e6 * trained), "share": trained, "known": {"digits": [forgotten]}}

    results = {"LoRA": [result(lora, part, known)] * 3, "full": [result(full, 1.0, 0.5)] * 3}
    return Job({kind: {1e-3: 0.9, 3e-3: 0.8, 3e-4: 0.7} for kind in share.KINDS}, results)


def of(**changed):
    """Every job of mini-1 with 180 of 200 right, LoRA's and full training's, but what is changed."""
    found = dict.fromkeys(share.CONTESTS["mini-1"].tasks, held(180, 180)) | changed
    return compared("mini-1", found, {"digits": [1.0]})


@pytest.mark.parametrize("lora, ratio, verdict", [(180, 100, "PASS"), (171, 95, "PASS"), (170, 94.44, "FAIL")])
@pytest.mark.parametrize("job", share.CONTESTS["mini-1"].tasks)
def test_less_than_the_ratio_on_one_job_fails(job, lora, ratio, verdict):
    found = of(**{job: held(lora, 180)})
    assert found.rows[f"mini-1: {job}"]["LoRA of full, %"] == ratio
    assert CHAPTER.judge(found, ["smol"]) == verdict


def test_full_training_that_learnt_nothing_proves_nothing():
    assert CHAPTER.judge(of(blood=held(180, 0)), ["smol"]) == "FAIL"


@pytest.mark.parametrize("part, verdict", [(0.02, "PASS"), (0.0201, "FAIL")])
def test_one_run_that_trains_more_fails(part, verdict):
    assert CHAPTER.judge(of(blood=held(180, 180, part)), ["smol"]) == verdict


def test_what_is_forgotten_is_what_each_lost():
    rows = of().rows
    assert rows["mini-1 lost: blood, LoRA"] == {"mean": "10.0 (10.0 to 10.0)", "digits": 10.0}
    assert rows["mini-1 lost: blood, full"]["digits"] == 50.0


def test_rates_stand_in_order_with_the_best_beside_them():
    row = of().rows["mini-1 rates LoRA: blood"]
    assert list(row.items()) == [("0.0003", 70), ("0.001", 90), ("0.003", 80), ("best", "0.001")]


@pytest.mark.parametrize("kind", share.KINDS)
@pytest.mark.parametrize("peak", [1e-5, 1e-4, 3e-4, 1e-2])
def test_a_search_ends_where_the_best_has_a_worse_on_either_side(kind, peak, tmp_path, monkeypatch):
    found = searched(
        monkeypatch, tmp_path, kind, lambda rate: -abs(share.LADDER.index(rate) - share.LADDER.index(peak))
    )
    at = share.LADDER.index(peak)
    assert share.best(found) == peak
    assert {*share.LADDER[at - 1 : at + 2], *share.CONTESTS["mini-1"].tasks["blood"].first[kind]} <= set(found)


def test_of_equal_rates_the_first_tried_is_taken(tmp_path, monkeypatch):
    found = searched(monkeypatch, tmp_path, "full", lambda rate: 0.5)
    assert share.best(found) == share.CONTESTS["mini-1"].tasks["blood"].first["full"][0]
    assert set(found) == set(share.CONTESTS["mini-1"].tasks["blood"].first["full"])


def test_a_best_rate_at_the_end_of_the_ladder_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="beyond the ladder"):
        searched(monkeypatch, tmp_path, "full", lambda rate: rate)


def searched(monkeypatch, out, kind, accuracy):
    monkeypatch.setattr(share, "judged", lambda run, place: {"right": [accuracy(run.rate)]})
    return share.search("mini-1", "blood", kind, place(out))


def place(out):
    return share.Place(Path(out), None, None, lambda name: None)


def test_lora_is_within_the_share_and_full_is_everything():
    """mini-1 itself, by the shapes of its sites; SmolLM2's share is a bound of the chapter."""
    host = open_base("mini-1", dtype="float32", device="cpu")
    contest = share.CONTESTS["mini-1"]
    linear = frozenset({Kind.WEIGHT})
    numbers = sum(
        part["rank"] * sum(site.shape)
        for part in contest.parts["LoRA"]
        for site in select(part["select"], host.sites, linear)
    )
    assert 0.019 < numbers / sum(p.numel() for p in host.model.parameters()) <= contest.limit
    (all_of_it,) = contest.parts["full"]
    reached = {site.path for site in select(all_of_it["select"], host.sites, PARAMETERS)}
    assert reached == {site.path for site in host.sites if site.kind in PARAMETERS and site.dead is None}
    assert {"lm_head", "model.language_model.embed_tokens", "model.language_model.norm"} <= reached


def test_the_kinds_differ_in_what_is_trained_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "rows", lambda job, split, count, out, data: tmp_path / f"{job}.parquet")
    lora, full = (
        share.recipe(share.Run("mini-1", "commands", kind, 1e-3, 2), place(tmp_path)).model_dump()
        for kind in share.KINDS
    )
    assert {key for key in lora if lora[key] != full[key]} == {"parts", "out", "features"}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """One job of eight rows on a tiny base, one general source, two steps, one seed, and one rate that is trained."""
    base = str(small.base(tmp_path / "base"))

    def drawn(count, split, data=None):
        return [("what is this?", "a cat", (picture(shade=9 * i + 1),)) for i in range(count)]

    contest = share.Contest(
        model=lambda place: base,
        limit=1.0,
        parts={"LoRA": share._adapter(2, 2), "full": share._ALL},
        tasks={"infrared": share._task(2, 1e-3, 1e-3)},
        counts={"train": 8, "validation": 4, "held-out": 4},
        known=share.general,
    )
    monkeypatch.setattr(jobs, "JOBS", {"infrared": drawn})
    monkeypatch.setattr(jobs, "SHIFTS", {"infrared": dataclasses.replace(SHIFTS["infrared"], longest=2)})
    monkeypatch.setattr(replay_rows, "general", lambda split, data: {"digits": drawn(2, split)})
    monkeypatch.setattr(share, "CONTESTS", {"mini-1": contest})
    monkeypatch.setattr(share, "SEEDS", (1,))
    judged = share.judged
    monkeypatch.setattr(share, "judged", lambda run, at: judged(run, at) if run.rate == 1e-3 else {"right": [-1.0]})
    return Desk(tmp_path / "work", {"data": tmp_path}, lambda share, what: None)


@pytest.mark.slow
def test_the_desk_goes_from_rates_to_results_and_does_nothing_twice(tiny, monkeypatch):
    found = CHAPTER.measure(tiny)
    assert found.rows["mini-1: infrared"]["rows"] == 4
    assert len(found.series["mini-1 infrared LoRA"]) == len(found.series["mini-1 infrared full"]) == 1
    assert not list((tiny.work / "training").iterdir())
    assert float(found.rows["mini-1 trained: full"]["% of the model's"]) > 90
    monkeypatch.setattr(jobs, "learn", None)
    assert CHAPTER.measure(tiny) == found

    path = next((tiny.work / "results").glob("*-full-0.001-seed-1.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": "another"}))
    with pytest.raises(ConfigError, match="different bases"):
        CHAPTER.measure(tiny)


def test_blood_cells_are_not_drawn_from_nothing():
    with pytest.raises(ConfigError, match="BCCD"):
        jobs.cells(3, "train")


def test_eyes_carry_what_the_tower_saw(tmp_path):
    """Between two models of one vocabulary the map is the identity, and the projector mini-1's but for its size."""
    import torch

    from tarsia.base import resolve

    mini = Path(resolve("mini-1"))
    folder = eyes.build(mini, tmp_path / "both")
    (seer, processor), (made, again) = eyes._opened(mini), eyes._opened(folder)
    shown = [eyes.pictures.scene(seed)[0] for seed in range(2)]
    ours, theirs = (
        torch.cat(list(m.get_image_features(**p.image_processor(shown, return_tensors="pt")).pooler_output))
        for m, p in ((made, again), (seer, processor))
    )
    scale = ours.norm() / theirs.norm()
    assert (ours / scale - theirs).abs().max() < 1e-3 * theirs.abs().max()
    size = seer.get_input_embeddings().weight.norm(dim=-1).mean()
    assert 0.5 < ours.norm(dim=-1).mean() / size < 2
    text = made.model.language_model.state_dict()
    assert all(torch.equal(text[name], value) for name, value in seer.model.language_model.state_dict().items())
    assert eyes.build(Path("nowhere"), folder) == folder
