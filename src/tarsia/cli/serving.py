"""A server while it runs: its worker, its socket, its signals, and what the person at the terminal is told."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import uvicorn
from rich.console import Console
from rich.status import Status

from tarsia.cli import output
from tarsia.core.errors import ConfigError, ServeError
from tarsia.serve import wire
from tarsia.serve.http.app import app
from tarsia.serve.http.listen import config
from tarsia.serve.http.logs import Journal
from tarsia.serve.http.models import base_name, hidden, unreached
from tarsia.serve.http.settings import Settings
from tarsia.serve.supervise import Supervisor

T = TypeVar("T")
_CLOSING = 5  # seconds for connections that are still open when everything is answered


@dataclass(frozen=True)
class Asked:
    """What is to be served, where, and how it ends. ``drain`` in seconds; ``log`` None is standard error."""

    configure: wire.Configure
    settings: Settings
    host: str
    port: int
    drain: float
    log: Path | None
    as_json: bool


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: what runs is finished by the worker first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(asked: Asked) -> int:
    """Serve until interrupted: 0 where all that ran was finished, else 1. Raises TarsiaError where it can not."""
    with ExitStack() as stack:
        sock = stack.enter_context(listening(asked.host, asked.port))
        journal = Journal() if asked.log is None else Journal(stack.enter_context(_opened(asked.log)))
        return asyncio.run(_Run(asked, sock, journal).run())


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError where that can not be, before anything large is opened."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            "The server can not listen there.",
            given=f"{host}, port {port}: {error.strerror}",
            do="choose another --port",
        ) from None


def _opened(log: Path) -> TextIO:
    try:
        return log.open("a", encoding="utf8")
    except OSError as error:
        raise ConfigError("The log can not be written.", given=f"--log {log}: {error.strerror}") from None


class _Run:
    """One run of the server."""

    def __init__(self, asked: Asked, sock: socket.socket, journal: Journal) -> None:
        self.asked, self.journal, self.sock = asked, journal, sock
        self.screen = _Screen()
        self.supervisor = Supervisor(asked.configure, notice=self._notice)
        application = app(self.supervisor, asked.settings, journal)
        made = config(application, asked.settings, asked.host, asked.port, timeout_graceful_shutdown=_CLOSING)
        self.server = _Server(made)
        self._interrupted, self._again = asyncio.Event(), asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        """From the start to the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signal, number)
        serving = asyncio.create_task(self.server.serve(sockets=[self.sock]))
        try:
            return await self._until_interrupted()
        finally:
            await self.supervisor.stop()
            self.server.should_exit = True
            await serving

    async def _until_interrupted(self) -> int:
        with self.screen:
            if not await _unless(self._interrupted, self.supervisor.start()):
                return 128 + self._code
        if (models := await self._models()) is not None:
            self._greet(models)
        await _unless(self._interrupted, self.supervisor.ended())
        running = self.supervisor.outstanding
        self.screen.line(f"finishing {running} requests; interrupt again to end now" if running else "ends")
        drained = await _unless(self._again, self.supervisor.drain(self.asked.drain))
        if drained and drained[0]:
            return 0
        self.screen.line("ended before all requests were finished")
        return 1

    def _signal(self, number: int) -> None:
        self._code = number
        (self._again if self._interrupted.is_set() else self._interrupted).set()

    def _notice(self, event: wire.Event) -> None:
        if isinstance(event, wire.Opening):
            self.screen.line(event.what)
        elif isinstance(event, wire.Log):
            facts = dict(event.facts)
            if "traceback" in facts:
                facts["traceback"] = str(facts["traceback"]).splitlines()
            self.journal.write(event.what, {"level": event.level, **facts})

    async def _models(self) -> Sequence[wire.Model] | None:
        """What may be asked for beside the base, if the worker is still there to say it.

        Warns of what no request reaches by its name.
        """
        try:
            found = await self.supervisor.models()
        except ServeError:  # the worker is lost already, which the log tells; another one starts
            return None
        base = base_name(self.asked.settings.name, self.supervisor.ready)
        for name in hidden(found, base):
            said = f"warning: the name {name} means something else here, so the library's adapter is hidden"
            self.screen.line(f"{said}: {unreached(name, base)}")
        return found

    def _greet(self, models: Sequence[wire.Model]) -> None:
        """Say where it serves what."""
        ready = self.supervisor.ready
        assert ready is not None
        host, port = self.sock.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        base = base_name(self.asked.settings.name, ready) or ready.model
        own = sum(not model.foreign for model in models)
        if self.asked.as_json:
            output.line({"address": address, "base": base, "adapters": own, **ready.model_dump()})
            return
        library = self.asked.configure.library
        print(f"{base}, {ready.form}, {ready.dtype} on {ready.device}; {ready.most_tokens:,} tokens a request")
        others = f", {len(models) - own} more are of another base" if own < len(models) else ""
        held = f"{own} adapter{'s' * (own != 1)} of {library}{others}"
        print(held if library else "no library: the base alone")
        print(f"serves at {address}" + (f", documented at {address}/docs" if self.asked.settings.docs else ""))
        print(_example(address, base, self.asked.settings), flush=True)


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> tuple[T] | None:
    """What work comes to; None, with the work cancelled, where the event happens before."""
    doing, happening = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([doing, happening], return_when=asyncio.FIRST_COMPLETED)
        return (doing.result(),) if doing.done() else None
    finally:
        for task in (doing, happening):
            task.cancel()
        await asyncio.gather(doing, happening, return_exceptions=True)


def _example(address: str, base: str, settings: Settings) -> str:
    body = json.dumps({"model": base, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16})
    key = "" if settings.keys is None else '-H "Authorization: Bearer $TARSIA_API_KEY" '
    return f"try: curl {address}/v1/chat/completions -H 'Content-Type: application/json' {key}-d '{body}'"


class _Screen:
    """What is going on, on stderr: with a spinner where that is a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = self._console.status("starts") if self._console.is_terminal else None

    def __enter__(self) -> None:
        if self._status is not None:
            self._status.start()

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()
        self._status = None

    def line(self, text: str) -> None:
        """Say what is going on now."""
        if self._status is not None:
            self._status.update(text)
        else:
            print(f"tarsia: {text}", file=sys.stderr, flush=True)
