"""Ten checkpoints and ten adapters hold the same; each bound of the chapter can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tarsia.labs import ten
from tarsia.labs.chapters.ten import CHAPTER, compared
from tarsia.labs.frame import page
from tarsia.labs.frame.result import Result
from tarsia.labs.ten import Measured

WAYS = (
    "checkpoint: opened from its files",
    "checkpoint: its weights copied from memory",
    "adapter: read from its files",
    "adapter: held, made to act",
    "adapter: held, four in one batch",
    "page: read from the library",
    "page: held",
)
GOOD = Measured(
    10,
    11_000_000,
    1_600_000,
    22_000_000,
    1_350_000,
    338_000,
    dict(zip(WAYS, (0.3, 0.01, 0.02, 1e-4, 2e-4, 3e-3, 5e-5), strict=True)),
    0.99,
    0.003,
    "a",
)


@pytest.mark.parametrize(
    "changes,fails",
    [
        ({}, []),
        ({"adapter": 2_000_000}, ["mini-1: times fewer bytes on disk"]),
        ({"agreement": 0.94}, ["mini-1: same token, %"]),
        ({"times": {**GOOD.times, WAYS[0]: 0.009, WAYS[5]: 3e-4}}, ["mini-1: times sooner"]),
        ({"times": {**GOOD.times, WAYS[5]: 0.05}}, ["mini-1: a page is read times sooner"]),
        ({"times": {**GOOD.times, WAYS[6]: 6e-4}}, ["mini-1: a page that is held, ms"]),
        ({"times": {**GOOD.times, WAYS[0]: 3.0, WAYS[3]: 0.0021}}, ["mini-1: a switch, ms"]),
    ],
)
def test_each_bound_can_fail(changes, fails):
    found = compared({"mini-1": replace(GOOD, **changes)})
    assert [b.what for b in CHAPTER.bounds if b.judge(found, ("smol",)) == "FAIL"] == fails


def test_a_model_that_is_here_is_judged_too():
    found = compared({"mini-1": GOOD, "SmolLM2": replace(GOOD, adapter=2_000_000, base="b")})
    assert [b.what for b in CHAPTER.bounds if b.judge(found) == "FAIL"] == ["SmolLM2: times fewer bytes on disk"]
    assert found.bases == {"mini-1": "a", "SmolLM2": "b"}


@pytest.mark.parametrize("lacking,says", [(("smol",), "was not measured here"), ((), "two checkpoints were written")])
def test_the_page_and_the_picture_are_drawn(lacking, says):
    found = compared({"mini-1": GOOD} | ({} if lacking else {"SmolLM2": GOOD}))
    result = Result("ten", found, lacking, "2026-01-01", {})
    assert says in page.page(CHAPTER, result)
    assert page.picture(CHAPTER, result).startswith(b"\x89PNG")


def test_what_warms_up_is_not_counted():
    asked = []
    assert ten.timed(asked.append) >= 0
    assert asked == [0, *range(1, ten.ROUNDS + 1)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    rounds, count = ten.ROUNDS, ten.TEN
    ten.ROUNDS, ten.TEN = 1, 2
    try:
        yield ten.measure("mini-1", 1, tmp_path_factory.mktemp("ten"), lambda what: None)
    finally:
        ten.ROUNDS, ten.TEN = rounds, count


def test_both_forms_of_mini_1_answer_alike(measured):
    assert measured.agreement > 0.95 and 0 < measured.apart < 0.02
    assert measured.checkpoint > 5 * measured.adapter and measured.weights == 22_192_128
    assert measured.patches == 4 * measured.trained and tuple(measured.times) == WAYS


@pytest.mark.slow
def test_a_checkpoint_of_another_adapter_is_seen(tmp_path):
    """The comparison holds each checkpoint to its own adapter."""
    from tarsia.adapter import load, open_base, put
    from tarsia.core.attach import activate
    from tarsia.merge.fold import fold

    host = open_base("mini-1", dtype="float32", device="cpu")
    batch = ten.rows(host, tmp_path)
    folders = ten.adapters(host, batch, tmp_path)[:2]
    for i, folder in enumerate(reversed(folders)):
        activate(host.model)
        put(host, load(folder), f"task-{i}")
    fold("mini-1", folders[0], tmp_path / "checkpoint")
    agreement, apart = ten.alike(host, batch, [tmp_path / "checkpoint"])
    assert agreement < 0.9 and apart > 0.05
