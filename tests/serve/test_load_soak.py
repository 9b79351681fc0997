"""The soak's own judgement: what it calls wrong, and that it does; and a short one of a real server."""

from __future__ import annotations

from pathlib import Path

import pytest
from serve import soak
from serve.soak import Content, Soak, World

from tarsia.serve.load.asked import Question
from tarsia.serve.load.client import Answered

KEY = ("Why?", None)


@pytest.fixture
def one():
    contents = [Content("lora", i, Path(f"lora-{i}"), {KEY: f"answer {i}"}) for i in range(3)]
    world = World(contents, {KEY: "the base's"}, {f"hash{i}": content for i, content in enumerate(contents)})
    world.becomes("lora-0", contents[0], 0.0)
    world.becomes("lora-0", contents[1], 10.0, 10.5)  # the change takes half a second
    world.becomes("alias-0", contents[2], 1.0)
    world.becomes("alias-0", None, 5.0)
    return Soak(world, None, "", 0, 60.0)


def judged(one, model, text, by, began, ended, error=""):
    question = Question(0, model, KEY[1], KEY[0])
    facts = None if by is None else {"name": model, "version": 1, "hash": by}
    one.judge(
        question, Answered(question, began, ended, text=text, error=error, told="?", by=facts), "base", began, ended
    )
    return one.counts["faults"]


@pytest.mark.parametrize(
    "model, text, by, began, ended",
    [
        ("lora-0", "answer 0", "hash0", 1.0, 2.0),
        ("lora-0", "answer 1", "hash1", 11.0, 12.0),
        ("lora-0", "answer 0", "hash0", 10.4, 12.0),  # while it was replaced, either
        ("lora-0", "answer 1", "hash1", 10.1, 10.2),
        ("lora-0", "answer 0", "hash0", 9.0, 12.0),  # begun before it was replaced
        ("lora-0", "answer 1", "hash1", 9.0, 12.0),
        ("alias-0", "answer 2", "sha256:hash2", 2.0, 3.0),
        ("base", "the base's", None, 0.0, 1.0),
    ],
)
def test_what_is_right(one, model, text, by, began, ended) -> None:
    assert judged(one, model, text, by, began, ended) == 0 and one.counts["compared"] == 1


@pytest.mark.parametrize(
    "model, text, by, began, ended, told",
    [
        ("lora-0", "answer 1", "hash0", 1.0, 2.0, "wrong answer"),  # another adapter's text
        ("lora-0", "the base's", "hash0", 1.0, 2.0, "wrong answer"),
        ("lora-0", "answer 0 ", "hash0", 1.0, 2.0, "wrong answer"),
        ("lora-0", "answer 1", "hash1", 1.0, 2.0, "not to be had then"),  # of a version that comes later
        ("lora-0", "answer 0", "hash0", 11.0, 12.0, "not to be had then"),  # of one that is gone
        ("lora-0", "the base's", None, 1.0, 2.0, "None answered"),  # silently the base
        ("lora-0", "answer 0", "hash9", 1.0, 2.0, "answered"),
        ("alias-0", "answer 2", "hash2", 6.0, 7.0, "not to be had then"),
        ("base", "answer 0", "hash0", 1.0, 2.0, "the base was asked"),
        ("base", "answer 0", None, 1.0, 2.0, "wrong answer"),
    ],
)
def test_what_is_wrong(one, model, text, by, began, ended, told) -> None:
    assert judged(one, model, text, by, began, ended) > 0
    assert any(told in fault for fault in one.faults)


@pytest.mark.parametrize(
    "model, error, began, ended, kills, fault",
    [
        ("lora-0", "503 worker_lost", 1.0, 2.0, [1.5], False),
        ("lora-0", "worker_lost", 1.0, 2.0, [1.5], False),
        ("lora-0", "503 not_ready_lost", 5.0, 6.0, [1.5], False),
        ("lora-0", "503 worker_lost", 1.0, 2.0, [], True),  # nobody killed it
        ("lora-0", "503 worker_lost", 1.0, 2.0, [2.5], True),
        ("lora-0", "503 not_ready_lost", 19.0, 20.0, [2.5], False),
        ("lora-0", "503 not_ready_lost", 26.0, 27.0, [2.5], True),  # there were answers since
        ("lora-0", "503 not_ready_lost", 226.0, 227.0, [22.0], True),  # too late for an excuse
        ("lora-0", "503 not_ready_lost", 126.0, 127.0, [22.0], False),
        ("lora-0", "cut off", 1.0, 2.0, [1.5], True),  # lost without an error
        ("lora-0", "connection", 1.0, 2.0, [1.5], True),
        ("lora-0", "timeout", 1.0, 2.0, [1.5], True),
        ("lora-0", "500 internal_error", 1.0, 2.0, [1.5], True),
        ("lora-0", "404 model_not_found", 1.0, 2.0, [], True),
        ("alias-0", "404 model_not_found", 6.0, 7.0, [], False),
        ("alias-0", "404 model_not_found", 2.0, 3.0, [], True),
        ("alias-0", "404 model_not_found", 4.0, 5.5, [], False),
        ("base", "404 model_not_found", 4.0, 5.5, [], True),
    ],
)
def test_which_errors_are_explained(one, model, error, began, ended, kills, fault) -> None:
    one.kills, one.back = kills, {kill: 20.0 for kill in kills if kill < 20}
    assert (judged(one, model, "", None, began, ended, error) > 0) is fault
    assert one.errors == {error: 1} and one.counts["compared"] == 0


def test_growth_is_seen_and_a_restart_is_none(one) -> None:
    one.memory = [(float(t), 100_000, 7, 50_000 + 900 * t) for t in range(20)]
    one.memory += [(20.0 + t, 100_000, 8, 80_000) for t in range(40)]
    assert one.growth() == {"http": 0.0, "worker": 0.0}
    one.memory = [(float(t), 100_000, 8, 80_000 + 400 * t) for t in range(80)]
    assert one.growth()["worker"] > soak.FLAT


@pytest.mark.slow
def test_a_short_soak_finds_nothing(tmp_path) -> None:
    report = soak.soak(45.0, tmp_path, each=2, names=2, pictures=1, askers=4)
    assert report["faults"] == []
    counts = report["counts"]
    assert counts["compared"] > 20 and counts["left"] > 0 and counts["killed"] == 2 and counts["published"] > 0
    assert len(report["answered by"]) >= 4
