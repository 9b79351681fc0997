"""Many requests over one base: each step reads some tokens of every row that runs, and says what came of it.

    engine.submit(request)
    while not engine.idle:
        for event in engine.step():
            ...

A step is one pass of the decoder (`line`): one token of each row that writes, and of rows that still read their prompt
as many as there is room for. Rows come and go between steps. Nothing here is called from more than one thread.
"""

from __future__ import annotations

import logging
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


_LOG = logging.getLogger(__name__)


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
        self._told: list[Event] = []
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
        """Take a request. Raises ServeError for one that can not be served, for an unknown adapter too."""
        length, wanted = len(request.prompt.ids), request.sampling.max_tokens
        if request.id in self._jobs:
            raise ServeError("invalid", "This request is there already.", given=request.id)
        if length < 1:
            raise ServeError("invalid", "The prompt has no tokens.")
        room = self.most - length
        if wanted is None:
            wanted = min(request.sampling.at_most or self.limits.answer, max(room, 1))
        if wanted > room:
            raise _too_long(length, wanted, self.most)
        if request.adapter is not None:
            self.pages.resolve(request.adapter)
        job = self._jobs[request.id] = Job(request, wanted, self.voice)
        for row in job.rows:
            self._queue.add(row)

    def cancel(self, id_: str) -> None:
        """Nobody waits for this request any more; nothing more is said of it."""
        job = self._jobs.get(id_)
        if job is not None:
            self._end(job)
            self._counts["cancelled"] += 1

    def abort(self, error: TarsiaError) -> list[Event]:
        """End all that runs, after a step that failed: the events that say so, and what that step had to tell before.

        What waits goes on to wait.
        """
        for job in {row.job.id: row.job for row in self._running}.values():
            self._fail(job, error)
        return self._news()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Do what is next, and say what came of it; nothing where all that waits waits for its adapter."""
        self.pages.pump()
        self._expire()
        self._admit()
        self._grow()
        turn = list(self._turn())
        if turn:
            begun = time.perf_counter()
            self._pass(turn)
            self._counts["steps"] += 1
            self._counts["microseconds"] += int((time.perf_counter() - begun) * 1e6)
        return self._news()

    def _pass(self, turn: Sequence[tuple[Row, int]]) -> None:
        """Read these rows' next tokens, and draw what follows."""
        parts = [row.part(count) for row, count in turn]
        logits = self.line.run(parts)
        drawing = [row for (row, _), part in zip(turn, parts, strict=True) if part.wanted]
        for row, count in turn:
            self._queue.charge(row.tenant, row.advance(count, self.blocks))
        if not drawing:
            return
        for row, one in zip(drawing, draw(logits, [row.drawer for row in drawing]), strict=True):
            if row.job.id in self._jobs:  # else another of its answers has ended them all
                self._say(row, one)

    def _news(self) -> list[Event]:
        """What has happened since this was asked for the last time."""
        told, self._told = self._told, []
        return told

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
            "block_evictions": self.blocks.forgotten,
            "preemptions": found["preempted"],
            "picture_hits": self.front.hits,
            "picture_misses": self.front.misses,
            "picture_bytes": self.front.held,
        }

    def _expire(self) -> None:
        """End requests that nobody waits for any more, and those whose adapter was refused."""
        now = time.monotonic()
        for job in [*self._jobs.values()]:
            if job.request.deadline < now:
                late = ServeError(
                    "timeout", "The time of this request is over.", do="ask for fewer tokens, or wait for longer"
                )
                self._fail(job, late)
            elif job.ticket is not None and job.ticket.error is not None and not job.begun:
                self._fail(job, job.ticket.error)

    def _admit(self) -> None:
        """Begin rows while there is room for them: in the table, in the cache, and in the next step.

        As many adapters are asked for ahead as rows can run: more would keep those of other tenants out.
        """
        unread = sum(row.unread for row in self._running)
        ahead = sum(job.ticket is not None and not job.begun for job in self._jobs.values())
        for row in self._queue.turns():
            job = row.job
            if len(self._running) >= self.limits.rows or unread >= self.limits.chunk:
                break
            if job.request.adapter is not None and job.ticket is None:
                if ahead >= self.limits.rows:
                    break
                if not self._wanted(job):
                    continue
                ahead += 1
            if not job.ready or not row.may_begin:
                continue
            if row.most > self.most:  # with what its adapter lays before it
                self._fail(job, _too_long(row.length, job.wanted, self.most))
                continue
            # a block more for each that runs: who begins now is not to be taken out again at once
            if self.blocks.needed(row.reach) + len(self._running) > self.blocks.available:
                break  # who came first is not passed by who needs less
            if self._begun(row):
                unread += row.unread

    def _wanted(self, job: Job) -> bool:
        """Ask for a request's adapter; False where there is none any more, and the request has failed."""
        try:
            job.ticket = self.pages.want(job.request.adapter or "")
        except TarsiaError as error:
            self._fail(job, error)
            return False
        return True

    def _begun(self, row: Row) -> bool:
        """Read a row's prompt as far as the decoder, and take its blocks; False where its request has failed."""
        job = row.job
        try:
            if job.read is None:
                hits = self.front.hits
                job.read = self.front.read(job.request.prompt, job.page)
                job.picture_hits = self.front.hits - hits
            row.begin(self.blocks, self.line)
        except TarsiaError as error:
            self._fail(job, error)
            return False
        except Exception as error:
            # it is this request that brought it about: the others' rows were not touched
            _LOG.exception("a prompt could not be read")
            self._fail(job, ServeError("internal", "This prompt could not be read.", given=type(error).__name__))
            if isinstance(error, torch.AcceleratorError):
                raise  # what is on the device can not be trusted any more
            return False
        self._queue.begin(row)
        self._running.append(row)
        if not row.postponed:
            self._counts["prefix_hits" if row.cached else "prefix_misses"] += 1
            self._counts["prompt"] += row.length
            self._counts["cached"] += row.cached
        if not job.begun:
            job.begun = True
            self._told.append(job.started(row.cached))
        return True

    def _grow(self) -> None:
        """Let each row that writes have the block of its next token, of the row that began last where none is left."""
        for row in [*self._running]:
            while row in self._running and row.writes and not row.grow(self.blocks):
                self._postpone(self._running[-1])

    def _postpone(self, row: Row) -> None:
        """Take a row's blocks: it reads again what it has read and said, as soon as there is room."""
        self._running.remove(row)
        row.leave(self.blocks)
        row.postponed = True
        self._queue.again(row)
        self._counts["preempted"] += 1

    def _turn(self) -> Iterator[tuple[Row, int]]:
        """Whose tokens the next pass reads, and how many: of all who write one, then of prompts, the oldest first."""
        yield from ((row, 1) for row in self._running if row.writes)
        left = self.limits.chunk
        for row in self._running:
            if row.writes or left <= 0:
                continue
            count = row.next if row.whole else min(row.next, left)
            left -= count
            yield row, count

    def _say(self, row: Row, drawn: Drawn | TarsiaError) -> None:
        """What a row's next token comes to."""
        try:
            if isinstance(drawn, TarsiaError):
                raise drawn
            self._told += row.say(drawn)
        except TarsiaError as error:
            self._fail(row.job, error)
            return
        self._counts["said"] += 1
        if row.over:
            self._leave(row)
            if all(one.over for one in row.job.rows):
                self._end(row.job)

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

    def _fail(self, job: Job, error: TarsiaError) -> None:
        self._end(job)
        self._counts["failed"] += 1
        self._told.append(Event(job.id, "failed", {"error": error}))


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
