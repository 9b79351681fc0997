"""How the application listens: uvicorn, with what it lacks against clients that say nothing, or do not read."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tarsia.core.errors import ConfigError, TarsiaError
from tarsia.serve.http.errors import Refusal
from tarsia.serve.http.gate import CROWDED
from tarsia.serve.http.settings import Limits, Settings

_HEADER_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 10.0
_HEADER_BYTES: Final = 32 * 1024


class Config(uvicorn.Config):
    """uvicorn's, and the ``limits`` that its connections keep to."""

    def __init__(self, app: ASGIApp, limits: Limits, **more: Any) -> None:
        super().__init__(app, **more)
        self.limits = limits


class Ending:
    """A transport whose end is sure: what is not read some seconds after it was closed is thrown away."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._last: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Close it, for good within ``_CLOSE_SECONDS``."""
        self._transport.close()
        self.end()

    def end(self) -> None:
        """Wait no longer than that for a client to read what is left; the transport is closing."""
        if self._last is None:
            self._last = self._loop.call_later(_CLOSE_SECONDS, self._transport.abort)

    def over(self) -> None:
        """It is closed."""
        if self._last is not None:
            self._last.cancel()


class Protocol(H11Protocol):
    """Ends connections whose request does not begin within 10 s (uvicorn waits for ever), those whose client does not
    read what it is sent, and those that do not end. Where there are too many, or one says what is no HTTP, the answer
    is an error object as everywhere.
    """

    config: Config
    transport: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads = 0
        self._watch: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self.app_state = {**self.app_state, CROWDED: False}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Ending(transport, self.loop))  # type: ignore[arg-type]
        self._watch = self.loop.call_later(_HEADER_SECONDS, self._check, 0)

    def data_received(self, data: bytes) -> None:
        most = self.config.limits.connections
        self.app_state[CROWDED] = max(len(self.connections), len(self.tasks)) > most
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._heads += 1
            self._unwatch()
        elif before is not None and before.response_complete and self._watch is None:  # a next request's head
            self._watch = self.loop.call_later(_HEADER_SECONDS, self._check, self._heads)

    def eof_received(self) -> None:
        super().eof_received()
        self.transport.end()  # asyncio closes it now

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)
        if self._unread is not None:
            self._unread.cancel()
        self.transport.over()

    def send_400_response(self, msg: str) -> None:
        error = TarsiaError("This is no request of HTTP/1.1, or it is too long.", do="see its lines and its framing")
        refusal = Refusal(400, error, code="invalid_request", close=True)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is under way: it breaks off
            response = refusal.response
            for event in (
                h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _look(self) -> None:
        """While there is more to be read than is good: see that it is read."""
        limits = self.config.limits
        left = self.transport.get_write_buffer_size() - int(limits.write_seconds * limits.rate)
        self._unread = self.loop.call_later(limits.write_seconds, self._read, left)

    def _read(self, most: int) -> None:
        if self.transport.get_write_buffer_size() > max(0, most):
            self.transport.abort()
        else:
            self._look()

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _check(self, heads: int) -> None:
        self._watch = None
        if self._heads == heads:
            self.transport.abort()


def config(app: ASGIApp, settings: Settings, host: str = "127.0.0.1", port: int = 8000, **more: Any) -> Config:
    """How uvicorn runs the application. Raises ConfigError for a host that others reach where nobody needs a key.

    No header of a proxy is believed, no request's line is logged (``logs`` does that), no websocket is taken. How many
    connections there may be is looked at by ``Protocol``: uvicorn's own answer would be a text.
    """
    check_host(host, settings)
    return Config(
        app, settings.limits, host=host, port=port, http=Protocol, ws="none", lifespan="off", proxy_headers=False,
        server_header=False, access_log=False, h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_keep_alive=30, log_config=None, **more,
    )  # fmt: skip


def check_host(host: str, settings: Settings) -> None:
    """Raises ConfigError where others than this machine would be answered without a key."""
    if settings.keys is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            "Who asks from another machine needs a key.",
            given=host,
            allowed="127.0.0.1, ::1, localhost",
            do="tarsia serve --keys FILE",
        )
