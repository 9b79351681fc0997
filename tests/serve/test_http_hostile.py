"""Hostile requests: a small part of them in the quick suite, all of them among the slow ones."""

from __future__ import annotations

import socket
import threading

import pytest
from serve import hostile
from serve.hostile_requests import KINDS

from tarsia.serve.http import models


def test_some_hostile_requests() -> None:
    report = hostile.run(200, seed=7, schema=False)
    assert report.wrong == [], str(report)
    assert set(report.cases) == set(KINDS) and report.cases.total() == 200
    assert {200, 400, 401, 404, 413} <= set(report.statuses)  # they reach what they are for


def test_some_of_schemathesis() -> None:
    report = hostile.run(100, seed=8)
    assert report.wrong == [], str(report)
    assert report.cases["schemathesis positive"] > 15 and report.cases["schemathesis negative"] > 15


@pytest.mark.slow
def test_five_thousand_hostile_requests() -> None:
    report = hostile.run(5000)
    assert report.wrong == [], str(report)
    assert report.cases.total() >= 5000


def test_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tenant's adapters are let through: the run says so."""
    monkeypatch.setattr(models.Key, "may", lambda self, name: True)
    assert any("rival" in wrong for wrong in hostile.run(40, schema=False).wrong)


def test_a_step_outside_is_seen() -> None:
    """A thread that opens a file or looks for a host, as the server's would."""

    def outside() -> None:
        with open("/etc/hostname", "rb"):
            pass
        with pytest.raises(OSError), socket.socket() as link:
            link.connect(("127.0.0.1", 1))

    with hostile.WATCH.over() as watch:
        thread = threading.Thread(target=outside)
        thread.start()
        thread.join()
        with open("/etc/hostname", "rb"):  # by the thread that asks: it is exempt
            pass
    assert [what.split()[0] for what in watch.seen] == ["open", "socket.connect"]
