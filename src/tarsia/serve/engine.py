"""Many requests over one base: each step reads some tokens of every row that runs, and says what came of it.

    engine.submit(request)
    while not engine.idle:
        for event in engine.step():
            ...

A step is one pass of the decoder (`line`): one token of each row that writes, and of rows that still read their prompt
as many as there is room for. Rows come and go between steps. Nothing here is called from more than one thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tarsia.adapter import Host
from tarsia.core.errors import ServeError, TarsiaError
from tarsia.serve import trial
from tarsia.serve.blocks import Blocks
from tarsia.serve.front import Front
from tarsia.serve.line import Line
from tarsia.serve.read import Reader
from tarsia.serve.request import Event, Request
from tarsia.serve.row import Job, Row
from tarsia.serve.sample import Drawn, draw
from tarsia.serve.schedule import Queue
from tarsia.serve.voice import Voice

if TYPE_CHECKING:
    from tarsia.serve.pages import Pages


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine may take. Bytes of keys and values, and of pictures' features; tokens of a block of the former.

    ``rows`` run at once at most, ``chunk`` tokens are read in one step beside those of rows that write, and an answer
    has at most ``answer`` tokens where its request does not say.
    """

    cache_bytes: int = 1 << 30
    picture_bytes: int = 256 << 20
    block: int = 16
    rows: int = 32
    chunk: int = 512
    answer: int = 1024


class Engine:
    """The engine of ``host`` with the adapters of ``pages``.

    Its pass is held to the model's own before anything is served, with pictures where a ``reader`` can make rows of
    them: raises ServeError for a base whose answers here would be others. ``difference`` is how far they were apart.
    """

    def __init__(
        self,
        host: Host,
        pages: Pages,
        limits: Limits | None = None,
        voice: Voice | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.host, self.pages, self.limits = host, pages, limits or Limits()
        self.front = Front(host, pages.board, self.limits.picture_bytes)
        self.line = Line(host, pages.board, self.limits.cache_bytes, self.limits.block)
        self.blocks = Blocks(self.line.count, self.limits.block)
        self.voice = voice or Voice(host)
        text = host.model.config.get_text_config()  # type: ignore[operator,union-attr]
        self.context = int(getattr(text, "max_position_embeddings", None) or 1 << 30)
        self._queue: Queue[Row] = Queue()
        self._jobs: dict[str, Job] = {}
        self._running: list[Row] = []
        self._counts: Counter[str] = Counter()
        rows = [*trial.texts(host), *(trial.seen(host, reader) if reader is not None else ())]
        self.difference = trial.tried(host, self.front, self.line, rows)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._jobs

    @property
    def most(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.context, self.blocks.count * self.blocks.size)

    def submit(self, request: Request) -> None:
        """Take a request. Raises ServeError for one that can not be served, and TarsiaError for its adapter."""
        length, wanted = len(request.prompt.ids), request.sampling.max_tokens
        if request.id in self._jobs:
            raise ServeError("invalid", "This request is there already.", given=request.id)
        if length < 1:
            raise ServeError("invalid", "The prompt has no tokens.")
        room = self.most - length
        wanted = min(self.limits.answer, max(room, 1)) if wanted is None else wanted
        if wanted > room:
            raise _too_long(length, wanted, self.most)
        ticket = None if request.adapter is None else self.pages.want(request.adapter)
        job = Job(request, ticket, wanted, self.voice)
        self._jobs[request.id] = job
        for row in job.rows:
            self._queue.add(row)

    def cancel(self, id_: str) -> None:
        """Nobody waits for this request any more; nothing more is said of it."""
        job = self._jobs.get(id_)
        if job is not None:
            self._end(job)
            self._counts["cancelled"] += 1

    def abort(self, error: TarsiaError) -> list[Event]:
        """End all that runs, after a step that failed: the events that say so. What waits goes on to wait."""
        jobs = {row.job.id: row.job for row in self._running}
        return [self._fail(job, error) for job in jobs.values()]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Do what is next, and say what came of it; nothing where all that waits waits for its adapter."""
        self.pages.pump()
        events = [*self._expired(), *self._admitted()]
        turn = list(self._turn())
        if not turn:
            return events
        begun = time.perf_counter()
        parts = [row.part(count) for row, count in turn]
        logits = self.line.run(parts)
        drawing = [row for (row, _), part in zip(turn, parts, strict=True) if part.wanted]
        for (row, count), part in zip(turn, parts, strict=True):
            self._queue.charge(row.tenant, count)
            row.advance(count, self.blocks)
            self._counts["read" if part.embeds is not None else "written"] += count
        if drawing:
            drawn = draw(logits, [row.drawer for row in drawing])
            for row, one in zip(drawing, drawn, strict=True):
                events += self._said(row, one)
        self._counts["steps"] += 1
        self._counts["microseconds"] += int((time.perf_counter() - begun) * 1e6)
        return events

    def stats(self) -> Mapping[str, int]:
        """Counters since the engine began, and what is now: see `wire.Stats`."""
        found = self._counts
        return {
            "waiting": len(self._queue),
            "running": len(self._running),
            "blocks_used": self.blocks.count - self.blocks.available,
            "blocks_free": self.blocks.available,
            "steps": found["steps"],
            "step_microseconds": found["microseconds"],
            "prompt_tokens": found["prompt"],
            "cached_tokens": found["cached"],
            "completion_tokens": found["said"],
            "prefix_hits": found["prefix_hits"],
            "prefix_misses": found["prefix_misses"],
            "picture_hits": self.front.hits,
            "picture_misses": self.front.misses,
            "picture_bytes": self.front.held,
        }

    def _expired(self) -> list[Event]:
        """Requests that nobody waits for any more, or whose adapter was refused."""
        now, events = time.monotonic(), []
        for job in [*self._jobs.values()]:
            if job.request.deadline < now:
                late = ServeError(
                    "timeout", "The time of this request is over.", do="ask for fewer tokens, or wait for longer"
                )
                events.append(self._fail(job, late))
            elif job.ticket is not None and job.ticket.error is not None and not job.begun:
                events.append(self._fail(job, job.ticket.error))
        return events

    def _admitted(self) -> list[Event]:
        """Begin rows while there is room for them: in the table, in the cache, and in the next step."""
        events: list[Event] = []
        unread = sum(row.unread for row in self._running)
        for row in self._queue.turns():
            if len(self._running) >= self.limits.rows or unread >= self.limits.chunk:
                break
            job = row.job
            if not job.ready or not row.may_begin:
                continue
            needed = self.blocks.needed(row.most)
            if needed > self.blocks.count:
                events.append(self._fail(job, _too_long(row.length, job.wanted, self.most)))
                continue
            if needed > self.blocks.available:
                break  # who came first is not passed by who needs less
            try:
                if job.read is None:
                    job.read = self.front.read(job.request.prompt, job.page)
                row.begin(self.blocks, self.line)
            except TarsiaError as error:
                events.append(self._fail(job, error))
                continue
            self._queue.begin(row)
            self._running.append(row)
            self._counts["prefix_hits" if row.cached else "prefix_misses"] += 1
            self._counts["prompt"] += row.length
            self._counts["cached"] += row.cached
            unread += row.unread
            if not job.begun:
                job.begun = True
                events.append(job.started(row.cached))
        return events

    def _turn(self) -> Iterator[tuple[Row, int]]:
        """Whose tokens the next pass reads, and how many: of all who write one, then of prompts, the oldest first."""
        yield from ((row, 1) for row in self._running if row.writes)
        left = self.limits.chunk
        for row in self._running:
            if row.writes or left <= 0:
                continue
            count = row.unread if row.whole else min(row.unread, left)
            left -= count
            yield row, count

    def _said(self, row: Row, drawn: Drawn | TarsiaError) -> list[Event]:
        """What a row's next token comes to."""
        if isinstance(drawn, TarsiaError):
            return [self._fail(row.job, drawn)]
        events = row.say(drawn)
        self._counts["said"] += 1
        if row.over:
            self._leave(row)
            if all(one.over for one in row.job.rows):
                self._end(row.job)
        return events

    def _leave(self, row: Row) -> None:
        self._running.remove(row)
        row.leave(self.blocks)
        self._queue.end(row)

    def _end(self, job: Job) -> None:
        """Take a request out, wherever its rows are."""
        self._queue.drop(lambda row: row.job is job)
        for row in [row for row in self._running if row.job is job]:
            self._leave(row)
        del self._jobs[job.id]
        if job.ticket is not None:
            job.ticket.release()

    def _fail(self, job: Job, error: TarsiaError) -> Event:
        self._end(job)
        self._counts["failed"] += 1
        return Event(job.id, "failed", {"error": error})


def _too_long(length: int, wanted: int, most: int) -> ServeError:
    return ServeError(
        "too_long",
        "The prompt and its answer are longer than there is room for.",
        given=f"{length} tokens, and {wanted} to answer",
        allowed=f"{most} together",
        do="shorten the prompt, or ask for fewer tokens",
    )


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[Event]]:
    """Submit all requests and step until they are over: the events of each, by its id."""
    found: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        for event in engine.step():
            found[event.id].append(event)
    return found


def texts(events: Sequence[Event]) -> dict[int, str]:
    """The whole text of each choice of a request. Raises the error that it failed with."""
    found: dict[int, Any] = {}
    for event in events:
        if event.kind == "failed":
            raise event.data["error"]
        if event.kind == "text":
            found[event.data["choice"]] = found.get(event.data["choice"], "") + event.data["text"]
    return found
