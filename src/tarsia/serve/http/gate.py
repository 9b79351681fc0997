"""What every request passes before anything is made of it: whose it is, how it is framed, how large, how slow.

Outermost of all: whatever goes wrong inside becomes an answer without a word of the inside, and one line in the log.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from h11 import LocalProtocolError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tarsia.core.errors import TarsiaError
from tarsia.serve.http.errors import AGAIN, Refusal, shown
from tarsia.serve.http.keys import ANYBODY, Key
from tarsia.serve.http.limits import Admission
from tarsia.serve.http.logs import Journal, where
from tarsia.serve.http.metrics import Metrics
from tarsia.serve.http.room import Room, Share
from tarsia.serve.http.settings import Limits, Settings

OPEN: Final = frozenset({"/health", "/ready", "/docs", "/openapi.json"})
"""Paths that need no key, and take no body."""
CROWDED: Final = "crowded"
"""In a scope's state: whether there are too many connections."""
_ONCE: Final = (b"host", b"authorization", b"content-length", b"content-type", b"transfer-encoding")
_GRACE: Final = 2.0
_LINGER: Final = 2.0
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
)


@dataclass(eq=False)
class Ticket:
    """A request: its id, whose it is, and what the log will say of it."""

    id: str
    key: Key
    share: Share
    """What of the memory for bodies it holds; given back when all that came is handed on, or it is over."""
    facts: dict[str, Any] = field(default_factory=dict)
    status: int | None = None


def ticket(scope: MutableMapping[str, Any]) -> Ticket:
    """The ticket that a request got at the gate."""
    found = scope["state"]["ticket"]
    assert isinstance(found, Ticket)
    return found


@dataclass(eq=False)
class Gate:
    """Stands before ``app``."""

    app: ASGIApp
    settings: Settings
    admission: Admission
    metrics: Metrics
    journal: Journal
    room: Room = field(init=False)

    def __post_init__(self) -> None:
        self.room = Room(self.settings.limits.bodies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.monotonic()
        held = Ticket(f"chatcmpl-{secrets.token_hex(16)}", ANYBODY, Share(self.room, ANYBODY.tenant))
        scope.setdefault("state", {})["ticket"] = held
        out = _Out(send, held)
        try:
            await self._passed(scope, receive, out, held)
        except Refusal as refusal:
            held.facts.setdefault("code", refusal.code)
            await _refuse(refusal, scope, receive, out)
        except Exception as error:  # noqa: BLE001 (a text of an error may hold what a client said: its place is logged)
            self.journal.write("error", {"id": held.id, "error": where(error)})
            held.facts["outcome"] = "failed"
            await _refuse(
                Refusal(500, "Something went wrong in the server.", code="internal_error"), scope, receive, out
            )
        finally:
            held.share.leave()
            self._tell(scope, held, time.monotonic() - begun)

    def _tell(self, scope: Scope, held: Ticket, seconds: float) -> None:
        status = held.facts.pop("status", held.status)
        if status is not None and status >= 400:
            self.metrics.refused.labels(str(status)).inc()
        route = getattr(scope.get("route"), "path", None)
        facts = {"id": held.id, "route": route, "status": status, "tenant": held.key.tenant, "key": held.key.name}
        self.journal.write("request", {**facts, "seconds": seconds, **held.facts})

    async def _passed(self, scope: Scope, receive: Receive, send: Send, held: Ticket) -> None:
        if scope["state"].get(CROWDED, False):
            error = TarsiaError("There are too many connections.", do="come again")
            raise Refusal(503, error, code="overloaded", again=AGAIN, close=True)
        headers = _headers(scope)
        self._check_host(headers)
        if scope["path"] not in OPEN:
            held.key = self._key(headers)
            held.share = Share(self.room, held.key.tenant)
            self.admission.count(held.key)
        elif b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0":
            error = TarsiaError("Nothing is to be sent here.", do="send no body")
            raise Refusal(400, error, code="invalid_request", close=True)
        if scope["query_string"] and scope["path"].startswith("/v1/"):
            given = shown(scope["query_string"].decode("latin-1"))
            raise Refusal.invalid("What stands after ? is not understood here.", given=given, do="leave it out")
        if b"content-length" in headers or b"transfer-encoding" in headers:
            receive = _replayed(await self._body(headers, receive, held.share), receive)
        await self.app(scope, receive, send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        called = self.settings.called
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if called is not None and name not in called:
            error = TarsiaError("This server is not called that.", given=shown(host), allowed=", ".join(called))
            raise Refusal(421, error, code="misdirected", close=True)

    def _key(self, headers: dict[bytes, bytes]) -> Key:
        if self.settings.keys is None:
            return ANYBODY
        scheme, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        found = self.settings.keys.find(secret.strip()[:512]) if scheme.lower() == "bearer" else None
        if found is None:
            error = TarsiaError("There is no such key.", do="send Authorization: Bearer KEY")
            raise Refusal(401, error, code="invalid_api_key", close=True)
        return found

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, share: Share) -> bytes:
        """All of a body, which ``share`` then holds. Raises Refusal: 413, 408, 429."""
        limits = self.settings.limits
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise Refusal.invalid("A length is a number.", given=shown(length.decode("latin-1")))
        if len(length) > 15 or int(length) > limits.body:
            raise _too_large(limits)
        body, begun = bytearray(), time.monotonic()
        while True:
            message = await _next(receive, begun, len(body), limits)
            if message["type"] == "http.disconnect":
                raise Refusal(408, "The client left before its request was whole.", code="gone", close=True)
            piece = message.get("body", b"")
            share.take(len(piece))
            body += piece
            if len(body) > limits.body:
                raise _too_large(limits)
            if not message.get("more_body", False):
                return bytes(body)


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """By name. Raises Refusal (400) where a header that decides something is there twice, or two contradict."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in found and name in _ONCE:
            error = TarsiaError("A header is there twice.", given=name.decode("latin-1"))
            raise Refusal(400, error, code="invalid_request", close=True)
        found[name] = value
    if b"content-length" in found and b"transfer-encoding" in found:
        error = TarsiaError("A body has a length or comes in chunks, not both.")
        raise Refusal(400, error, code="invalid_request", close=True)
    if b"content-encoding" in found:
        error = TarsiaError("Bodies are not unpacked here.", given=shown(found[b"content-encoding"].decode("latin-1")))
        raise Refusal(415, error, code="unsupported_media_type", close=True)
    return found


async def _next(receive: Receive, begun: float, received: int, limits: Limits) -> Message:
    """More of a body. Raises Refusal (408) where it comes too slowly."""
    passed = time.monotonic() - begun
    patience = min(limits.body_seconds, _GRACE + received / limits.rate) - passed
    try:
        async with asyncio.timeout(max(0.0, patience)):
            return await receive()
    except TimeoutError:
        error = TarsiaError("The body came too slowly.", given=f"{received} bytes in {passed:.0f} s")
        raise Refusal(408, error, code="timeout", close=True) from None


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, TarsiaError("The body is too large.", allowed=limits.body), code="too_large", close=True)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body at once, once, and then what the connection says."""
    left: list[bytes] = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return replay


class _Out:
    """A ``send`` that adds headers and remembers what was sent."""

    def __init__(self, send: Send, held: Ticket) -> None:
        self._send, self._held = send, held

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._held.status = message["status"]
            named = {name.lower() for name, _ in message["headers"]}
            extra = [(name, value) for name, value in _HEADERS if name not in named]
            extra.append((b"x-request-id", self._held.id.encode()))
            message = {**message, "headers": [*message["headers"], *extra]}
        await self._send(message)

    @property
    def begun(self) -> bool:
        """Whether a status was sent."""
        return self._held.status is not None


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, out: _Out) -> None:
    """Answer with an error where nothing was answered yet; else the connection ends, which no client takes for an end.

    Where the client may still be sending, a while is read on and forgotten: else its system throws the answer away.
    """
    if out.begun:
        return
    try:
        await _answered(refusal, scope, receive, out)
    except LocalProtocolError:  # its framing broke off meanwhile, which was answered below this
        ticket(scope).facts["code"] = "broken_framing"


async def _answered(refusal: Refusal, scope: Scope, receive: Receive, out: _Out) -> None:
    if not refusal.close:
        await refusal.response(scope, receive, out)
        return
    response = refusal.response
    await out({"type": "http.response.start", "status": refusal.status, "headers": response.raw_headers})
    await out({"type": "http.response.body", "body": response.body, "more_body": True})
    try:
        async with asyncio.timeout(_LINGER):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass
    await out({"type": "http.response.body", "body": b"", "more_body": False})
