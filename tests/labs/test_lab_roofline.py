"""The chapter on the roofline can fail: slow products, and rows that know their neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tarsia.core.errors import ConfigError
from tarsia.labs.chapters import roofline
from tarsia.labs.frame.chapter import Desk, Found
from tarsia.serve import kernel

DESK = Desk(Path("."), {}, lambda share, what: None)
SLOW = ["over the roofline, 8 rows", "over the roofline, 64 rows"]
COPIES, BITS = "what gathering adds over what grouping adds", "rows that differ from themselves alone"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little to read, few rounds; times are given."""
    if kernel.library() is None:
        pytest.skip("no kernel is compiled")
    monkeypatch.setattr(roofline, "WIDTH", 128)
    monkeypatch.setattr(roofline, "ROWS", (8, 64))
    monkeypatch.setattr(roofline, "ROUNDS", 2)
    monkeypatch.setattr(roofline, "SIZE", 2**20)
    given(monkeypatch, grouped=1.0, gathered=3.0)


def given(monkeypatch: pytest.MonkeyPatch, grouped: float, gathered: float) -> None:
    """Times of adapters as shares of what their bytes take, everything called once all the same."""
    calls = roofline.timed

    def timed(steps):
        found, rows = calls(steps), len(steps["gathered"](0))
        share = 2 * rows * roofline.RANK / roofline.WIDTH
        by = {"read": 1.0, "grouped": grouped * share, "gathered": gathered * share, "one by one": 9.0}
        return {name: [by[name]] * len(seconds) for name, seconds in found.items()}

    monkeypatch.setattr(roofline, "timed", timed)


def failed() -> list[str]:
    found = roofline.measure(DESK)
    return [bound.what for bound in roofline.CHAPTER.bounds if bound.judge(Found(found.rows)) == "FAIL"]


def test_it_holds() -> None:
    assert failed() == []


def test_slow_products_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, grouped=1.6, gathered=3.0)
    assert failed() == SLOW


def test_gathering_that_costs_no_more_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, grouped=1.0, gathered=1.2)
    assert failed() == [COPIES]


def test_rows_that_know_their_neighbours_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = kernel.Kernel.grouped

    def planted(self, x, y, starts, forms, entries):
        found = exact(self, x, y, starts, forms, entries)
        return found.add_(2.0**-5 * (len(forms) > 1))

    monkeypatch.setattr(kernel.Kernel, "grouped", planted)
    assert failed() == [BITS]


def test_without_a_kernel_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "library", lambda: None)
    with pytest.raises(ConfigError, match="compiled kernel"):
        roofline.measure(DESK)
