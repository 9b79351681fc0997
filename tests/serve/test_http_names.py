"""Adapters whose names mean something else: never silently the base's answers."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
import pytest
from serve.http_world import HASH, READY, Fake, Running, chat, running

from tarsia.cli import serving
from tarsia.core.errors import ServeError
from tarsia.serve import wire
from tarsia.serve.http.models import hidden, unreached
from tarsia.serve.http.settings import Settings


def published(*names: str) -> list[wire.Model]:
    return [wire.Model(name=name, version=1, hash=HASH) for name in names]


def test_names_that_mean_something_else() -> None:
    loaded = wire.Model(name="signs", version=None, hash=HASH, source="other@1")  # refused where it is loaded
    assert hidden([*published("signs", "auto", "acme"), loaded], "signs") == ["auto", "signs"]
    assert hidden(published("acme", "signs"), "mini-1") == hidden([loaded], "signs") == []
    assert "--name" in unreached("signs", "signs") and "signs@1" in unreached("signs", "signs")
    assert "--name" not in unreached("auto", "signs") and "another name" in unreached("auto", None)


class Known(Fake):
    """A worker whose library has more adapters, and that is asked for nothing."""

    more: Sequence[str] = ()

    async def models(self) -> tuple[wire.Model, ...]:
        if not self.more:
            raise ServeError("lost", "The worker was lost.")
        return (*await super().models(), *published(*self.more))

    async def start(self) -> wire.Ready:
        return READY

    async def ended(self) -> None: ...

    async def stop(self) -> None: ...

    async def drain(self, seconds: float) -> bool:
        return True

    outstanding = 0


@pytest.mark.parametrize("more, name", [(["mini-1"], None), (["signs"], "signs"), (["auto"], "signs")])
def test_a_server_whose_library_has_the_bases_name_starts_and_says_what_is_hidden(
    more: list[str], name: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "Supervisor", lambda *args, **options: service)
    service = Known()
    asked = serving.Asked(wire.Configure(model="mini-1"), Settings(name=name), "127.0.0.1", 0, 1.0, None, True)
    service.more = more
    assert serving.serve(asked) == 0
    said = capsys.readouterr()
    assert '"adapters": 4' in said.out and unreached(more[0], name or "mini-1") in said.err
    service.more = ["another"]
    assert serving.serve(asked) == 0
    said = capsys.readouterr()
    assert '"adapters": 4' in said.out and "another" not in said.err
    service.more = []  # lost in between: it starts again, and the log tells later
    assert serving.serve(asked) == 0 and "adapters" not in capsys.readouterr().out


def chosen(server: Running, service: Fake, model: str) -> str | None:
    """Which adapter the worker is asked for."""
    httpx.post(f"{server.url}/v1/chat/completions", json=chat(model=model))
    return service.asked[-1][0].adapter


def test_one_that_is_published_later_is_told_once() -> None:
    service = Known()
    service.more = ["another"]
    with running(service=service) as server:
        httpx.get(f"{server.url}/v1/models")
        service.more = ["mini-1", "auto"]
        for _ in range(2):
            names = [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]
            assert names.count("mini-1") == 1 and "auto" not in names
        told = {line["adapter"]: line["do"] for line in server.logged() if line["what"] == "hidden"}
        assert told == {name: unreached(name, "mini-1") for name in ("auto", "mini-1")}
        assert len([line for line in server.logged() if line["what"] == "hidden"]) == 2
        assert chosen(server, service, "mini-1") is None and chosen(server, service, "auto") == "auto"
        assert chosen(server, service, "auto@1") == "auto@1"
