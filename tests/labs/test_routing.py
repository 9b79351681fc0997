"""The sixty jobs are what they say; each bound of the chapter can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tarsia.labs import routing
from tarsia.labs.chapters.routing import CHAPTER, Measured, compared
from tarsia.labs.frame import page
from tarsia.labs.frame.result import Result
from tarsia.labs.routing import Asked, centroids, logistic, reliability, risk
from tarsia.labs.routing_answers import Answers
from tarsia.labs.routing_jobs import answer
from tarsia.labs.routing_world import CAMERAS, JOBS, KINDS, NEAR, STRANGERS, conditions, shots, strange
from tarsia.serve.route import Choice

DRAWN = [job for job in JOBS if job.kind in ("circle", "blueprint", "infrared", "chart", "rings")]


def test_there_are_enough_jobs_and_each_has_its_own_answer():
    assert len(JOBS) == len({job.name for job in JOBS}) == len({answer(job) for job in JOBS}) >= 50


def test_no_condition_of_a_job_is_in_two_splits_and_no_kind_is_both_known_and_strange():
    for job in JOBS:
        parts = [set(conditions(job, split)) for split in ("train", "development", "held-out")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 48 and all(parts)
    groups = [KINDS, *STRANGERS.values(), *NEAR.values()]
    assert len({kind for group in groups for kind in group}) == sum(map(len, groups))


@pytest.mark.parametrize("job", DRAWN[::5], ids=lambda job: job.name)
def test_pictures_are_drawn_alike_again_and_others_in_each_split_and_seed(job, tmp_path):
    def drawn(split, seed):
        return [picture.tobytes() for picture in shots(job, split, 4, tmp_path, seed)]

    assert drawn("train", 0) == drawn("train", 0)
    sets = [set(drawn(split, seed)) for split in ("train", "development", "held-out") for seed in (0, 1)]
    assert len(set.union(*sets)) == 24
    assert all(picture.size == (64, 64) for picture in shots(job, "train", 2, tmp_path))


def test_strangers_come_before_every_camera(tmp_path):
    assert len({picture.tobytes() for picture in strange("bricks", "held-out", 6, tmp_path)}) == 6
    assert set(CAMERAS) == {job.camera for job in JOBS}


def two_clouds():
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    return middles[:, None] + torch.randn(2, 40, 2, generator=generator) * torch.tensor([0.3, 20.0])


def test_logistic_regression_tells_apart_what_centroids_do_not():
    clouds = two_clouds()
    owners = torch.arange(2).repeat_interleave(40)
    right = {
        way: float((scores(clouds.flatten(0, 1)).argmax(1) == owners).float().mean())
        for way, scores in {"near": centroids(clouds), "fitted": logistic(clouds)}.items()
    }
    assert right["fitted"] > 0.97 > 0.8 > right["near"]


def choice(name, confidence, typical=0.5, nearest=None):
    return Choice(name, confidence, typical, "nearest", nearest or name)


def test_reliability_and_risk_count_what_is_wrong():
    pairs = [("a", choice("a", 0.95)), ("a", choice("b", 0.95, 0.4)), ("b", choice("b", 0.55, 0.3))]
    assert reliability(pairs, (0.0, 0.7, 1.01)) == [(0.55, 1.0, 1), (pytest.approx(0.95), 0.5, 2)]
    assert [wrong for _, wrong in risk(pairs)][-1] == pytest.approx(1 / 3)


WAYS = ("router", "nearest centroid", "logistic regression")


def asked(router=0.98, centroid=0.8, far=0.95, confidence=0.97):
    def share(value, count=50):
        return [1.0] * round(value * count) + [0.0] * (count - round(value * count))

    rights = dict(zip(WAYS, (router, centroid, 0.94), strict=True))
    right = {name: share(value) for way, value in rights.items() for name in (way, f"{way}, never open")}
    groups = {"held-out": ["weave"], "first look": ["radar"], "near": NEAR["held-out"]}
    strange = {
        group: {way: {kind: share(far if way == "router" else 0.3) for kind in kinds} for way in WAYS}
        for group, kinds in groups.items()
    }
    choices = [("star-warm", choice("star-warm" if hit else "rbc-cool", confidence)) for hit in right["router"]]
    return Asked(right, {name: share(0.02) for name in right}, strange, choices)


GOOD = Measured([asked()] * 3, Answers({"oracle": [1.0] * 9, "router": [1.0] * 9}, 48e3, "ties at scale 1"), "a")


@pytest.mark.parametrize(
    "changes,fails",
    [
        ({}, []),
        ({"router": 0.92, "confidence": 0.92}, ["known pictures right, %"]),
        ({"far": 0.8}, ["strangers left to the base, %"]),
        ({"centroid": 0.94}, ["points before the nearest centroid", "the nearest centroid, %"]),
        ({"confidence": 0.85}, ["confidence off, points"]),
    ],
)
def test_each_bound_can_fail(changes, fails):
    found = compared(replace(GOOD, asked=[asked(**changes)] * 3))
    assert [bound.what for bound in CHAPTER.bounds if bound.judge(found) != "PASS"] == fails


def test_the_page_and_the_picture_can_be_made():
    result = Result("routing", compared(GOOD), (), "2026-01-01T00:00:00+00:00", {})
    shown = page.page(CHAPTER, result)
    assert "weave" in shown and f"{len(JOBS)} jobs" in shown
    assert page.picture(CHAPTER, result).startswith(b"\x89PNG")


def test_signatures_are_kept_and_not_made_again(tmp_path, monkeypatch):
    made = []

    def signed(host, shown):
        made.append(len(shown))
        return torch.zeros(len(shown), 6)

    monkeypatch.setattr(routing, "signed", signed)
    monkeypatch.setattr(routing, "shots", lambda *args: [None] * args[2])
    monkeypatch.setattr(routing, "strange", lambda *args: [None] * args[2])
    host = type("H", (), {"fingerprint": type("F", (), {"weights": "a"})})
    held = routing.seen(host, 0, tmp_path, tmp_path, lambda what: None)
    count = len(made)
    assert held.trained.shape == (len(JOBS), routing.TRAIN, 6) and held.asked.shape == (len(JOBS), routing.TEST, 6)
    routing.seen(host, 0, tmp_path, tmp_path, lambda what: None)
    assert len(made) == count == 3 * len(JOBS) + sum(map(len, held.strange.values()))
