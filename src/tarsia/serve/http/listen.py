"""How the application listens: uvicorn, with what it lacks against clients that say nothing."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tarsia.core.errors import ConfigError
from tarsia.serve.http.settings import Settings

_HEADER_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 10.0
_HEADER_BYTES: Final = 32 * 1024


class Protocol(H11Protocol):
    """Ends connections whose request does not begin within 10 s (uvicorn waits for ever), and those that do not end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads = 0
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch = self.loop.call_later(_HEADER_SECONDS, self._check, 0)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._heads += 1
            self._unwatch()
        elif before is not None and before.response_complete and self._watch is None:  # a next request's head
            self._watch = self.loop.call_later(_HEADER_SECONDS, self._check, self._heads)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # what is not read is thrown away in the end
            self.loop.call_later(_CLOSE_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _check(self, heads: int) -> None:
        self._watch = None
        if self._heads == heads:
            self.transport.abort()


def config(app: ASGIApp, settings: Settings, host: str = "127.0.0.1", port: int = 8000, **more: Any) -> uvicorn.Config:
    """How uvicorn runs the application. Raises ConfigError for a host that others reach where nobody needs a key.

    No header of a proxy is believed, no request's line is logged (``logs`` does that), no websocket is taken.
    """
    check_host(host, settings)
    most = settings.limits.queue + 256
    return uvicorn.Config(
        app, host=host, port=port, http=Protocol, ws="none", lifespan="off", proxy_headers=False, server_header=False,
        access_log=False, limit_concurrency=most, h11_max_incomplete_event_size=_HEADER_BYTES,
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
