"""One question to an OpenAI-compatible server on this machine, timed token by token. Nothing else is ever spoken to."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tarsia.core.errors import ConfigError, ServeError
from tarsia.serve.load import KEY
from tarsia.serve.load.asked import Question, body

HOST: Final = "127.0.0.1"
START: Final = "tarsia serve MODEL --library DIR"
_ROOTS: Final = ("", "/", "/v1", "/v1/")
_KEYLESS: Final = {401: "The server wants a key.", 403: "The server wants another key."}
_LONGEST: Final = 200
"""Characters of a server's words that are kept."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of a question. Times are seconds since the load began; None for what did not happen.

    ``first`` is when the first text came, ``last`` when the last or the end was told, ``gap`` the longest time between
    two pieces of text. ``error`` is a kind (a word or two), "" where all was well, ``told`` what the server said of it.
    ``tokens`` and ``prompt`` are the server's count. ``by`` is the adapter that answered as the server names it (name,
    version, hash), None for the base.
    """

    question: Question
    began: float
    ended: float
    first: float | None = None
    last: float | None = None
    gap: float = 0.0
    tokens: int = 0
    prompt: int = 0
    text: str = ""
    reason: str | None = None
    error: str = ""
    told: str = ""
    by: Mapping[str, Any] | None = None

    @property
    def waited(self) -> float | None:
        """Seconds to the first text."""
        return None if self.first is None else self.first - self.began

    @property
    def each(self) -> float | None:
        """Seconds for each token after the first."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


def local(url: str) -> str:
    """The server's address; /v1, which OpenAI's client wants, may be there.

    Raises ConfigError for any but http://127.0.0.1: this loads, and must not load others.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = parts.scheme == "http" and parts.hostname == HOST and not parts.username and not parts.password
    if not plain or parts.query or parts.fragment or port == 0:
        raise ConfigError(
            "A load test talks to a server on this machine alone.",
            given=url,
            allowed=f"http://{HOST}:PORT",
            do="run it where the server runs",
        )
    if parts.path not in _ROOTS:
        raise ConfigError("The server's address has a path.", given=url, allowed=f"http://{HOST}:{port or 80}")
    return f"http://{HOST}:{port or 80}"


class Client:
    """Speaks to one server. No proxy of the environment's is used and no redirect is followed."""

    def __init__(self, url: str, *, max_tokens: int, seconds: float, connections: int, key: str | None = None) -> None:
        self.url, self.max_tokens, self.began = local(url), max_tokens, time.perf_counter()
        self.held = httpx.AsyncClient(
            base_url=self.url,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(seconds, connect=5.0),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Give the connections back."""
        await self.held.aclose()

    def now(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self.began

    async def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists. Raises ServeError where no server answers, or another than was expected."""
        try:
            said = await self.held.get("/v1/models")
            if said.status_code in _KEYLESS:
                raise ServeError("invalid", _KEYLESS[said.status_code], given=self.url, do=f"set {KEY}")
            said.raise_for_status()
            listed: list[dict[str, Any]] = said.json()["data"]
        except httpx.TransportError as error:
            given = f"{self.url}: {type(error).__name__}"
            raise ServeError("lost", "No server answers there.", given=given, do=f"start one: {START}") from None
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            given = f"{self.url}/v1/models: {error}".splitlines()[0]
            raise ServeError("invalid", "What answers there lists no models.", given=given, do=START) from None
        return listed

    async def metrics(self) -> dict[str, float]:
        """The server's own numbers (see `counters`); {} where it shows none."""
        try:
            said = await self.held.get("/metrics")
        except httpx.TransportError:
            return {}
        try:
            return counters(said.text) if said.status_code == 200 else {}
        except ValueError:
            return {}

    async def ask(self, question: Question) -> Answered:
        """Ask, and read the answer to its end. Whatever fails is told in what this gives; nothing is raised for it."""
        stream = _Stream(question, self.now())
        try:
            async with self.held.stream(
                "POST", "/v1/chat/completions", json=body(question, self.max_tokens)
            ) as response:
                if response.status_code != 200:
                    stream.refused(response.status_code, await response.aread())
                else:
                    async for line in _data(response):
                        stream.read(line, self.now())
        except httpx.TimeoutException as error:
            stream.fail("timeout", type(error).__name__)
        except (httpx.TransportError, httpx.RemoteProtocolError) as error:
            stream.fail("connection", f"{type(error).__name__}: {error}")
        return stream.over(self.now())


async def _data(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


class _Stream:
    """An answer as it comes."""

    def __init__(self, question: Question, began: float) -> None:
        self.question, self.began = question, began
        self.first: float | None = None
        self.last: float | None = None
        self.gap = 0.0
        self.pieces: list[str] = []
        self.usage: dict[str, Any] = {}
        self.reason: str | None = None
        self.whole = False
        self.error, self.told = "", ""
        self.by: Mapping[str, Any] | None = None

    def fail(self, kind: str, told: str) -> None:
        """The first thing that went wrong is what is kept."""
        if not self.error:
            self.error, self.told = kind, told[:_LONGEST]

    def refused(self, status: int, raw: bytes) -> None:
        """An answer that is none."""
        try:
            told = json.loads(raw)["error"]
            kind, words = str(told.get("code") or told.get("type") or ""), str(told.get("message"))
        except (ValueError, KeyError, TypeError, AttributeError):
            kind, words = "", raw.decode(errors="replace")
        self.fail(f"{status} {kind}".strip(), words)

    def read(self, line: str, now: float) -> None:
        """One event."""
        if line == "[DONE]":
            self.whole = True
            return
        try:
            event = json.loads(line)
        except ValueError:
            self.fail("broken stream", line)
            return
        if "error" in event:
            told = event["error"]
            self.fail(str(told.get("code") or told.get("type") or "error"), str(told.get("message")))
            return
        self.usage = event.get("usage") or self.usage
        self.by = (event.get("tarsia") or {}).get("adapter") or self.by
        for choice in event.get("choices", ()):
            if choice.get("finish_reason"):
                self.reason, self.last = choice["finish_reason"], now  # the end is a token too, and has no text
            text = choice.get("delta", {}).get("content")
            if text:
                self._text(text, now)

    def _text(self, text: str, now: float) -> None:
        self.pieces.append(text)
        self.first = now if self.first is None else self.first
        self.gap = max(self.gap, now - self.last) if self.last is not None else 0.0
        self.last = now

    def over(self, now: float) -> Answered:
        """What became of it. An answer that ends without an end is lost without a word: the worst that can be."""
        if not self.error and not (self.whole and self.reason):
            self.fail("cut off", "the stream ended before the answer did, and no error was told")
        return Answered(
            question=self.question,
            began=self.began,
            ended=now,
            first=self.first,
            last=self.last,
            gap=self.gap,
            tokens=int(self.usage.get("completion_tokens", 0)),
            prompt=int(self.usage.get("prompt_tokens", 0)),
            text="".join(self.pieces),
            reason=self.reason,
            error=self.error,
            told=self.told,
            by=self.by,
        )


def counters(text: str) -> dict[str, float]:
    """Prometheus' numbers by name and labels, summed over adapters; no buckets. Raises ValueError for another text."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sorted(sample.labels.items()) if name != "adapter"}
            if sample.name.endswith("_created") or labels.keys() & {"le", "quantile"}:
                continue
            told = ",".join(f"{name}={value}" for name, value in labels.items())
            key = f"{sample.name} {told}".strip()
            found[key] = found.get(key, 0.0) + sample.value
    return found
