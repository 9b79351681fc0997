"""Keeps one worker alive, and tells everybody who waits on it when it is not.

``Supervisor`` starts the worker as a process of its own, with one end of a socket pair; whoever holds the other end is
the only one that it listens to, and when that closes it ends. What the worker says of a request goes to the request's
``Conversation``. A worker that dies, hangs or sends what is no frame is killed; each request that it had fails at once
with kind "lost", and another worker is started, after a pause that doubles with each death in a row. A first start
that fails is told as it is; later ones are tried ``Patience.deaths`` times.

No torch here: this runs in the process that speaks HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from tarsia.core.errors import ServeError, TarsiaError
from tarsia.serve import wire
from tarsia.serve.conversation import Conversation
from tarsia.serve.frames import BrokenFrame, Stream

COMMAND: Final = (sys.executable, "-P", "-m", "tarsia.serve.worker")
_ENDED: Final = "it ended"
_CLOSING: Final = 1.0
"""Seconds for a worker whose socket is closed to end by itself."""
_WAITING: Final = {"GOMP_SPINCOUNT": "20000"}
"""Threads that wait for the others' part of a product spin for microseconds only: this process has work too."""
_LOG = logging.getLogger("tarsia.serve")


class State(Enum):
    """What becomes of a new request: only ``READY`` takes it."""

    STARTING = "starting"
    READY = "ready"
    LOST = "lost"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: to be ``ready``, of ``silence`` of a ready worker, for the ``answer`` about adapters.

    Of ``pause`` before the next start, doubled with each death in a row, up to ``longest``; a worker that was ready for
    ``sound`` seconds starts a new row. ``deaths`` in a row before it was ready are the end.
    """

    ready: float = 3600.0
    silence: float = 600.0
    answer: float = 300.0
    pause: float = 0.25
    longest: float = 30.0
    sound: float = 60.0
    deaths: int = 5


@dataclass(eq=False)
class _Worker:
    """One worker, from its start to its end."""

    process: asyncio.subprocess.Process
    stream: Stream
    ready: wire.Ready | None = None
    unable: ServeError | None = None
    drained: bool = False
    since: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class Supervisor:
    """One worker at a time, the requests that it has, and what it last said of itself.

    ``notice`` is told every event that belongs to no request: opening, ready, stats, log. What it raises ends nothing.
    """

    def __init__(
        self,
        configure: wire.Configure,
        *,
        notice: Callable[[wire.Event], None] = lambda event: None,
        patience: Patience = Patience(),
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.configure = configure
        self.state = State.STARTING
        self.ready: wire.Ready | None = None
        self.stats: wire.Stats | None = None
        self.restarts = 0
        self.error: TarsiaError | None = None
        """Why no worker is started any more."""
        self._notice, self._patience, self._command = notice, patience, command
        self._worker: _Worker | None = None
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[wire.Ready] | None = None
        self._conversations: dict[str, Conversation] = {}
        self._answers: dict[str, asyncio.Future[wire.Answer]] = {}
        self._loaded: dict[str, str] = {}
        self._late: dict[str, wire.Load] = {}
        self._unheard = False
        self._ids = itertools.count(1)

    @property
    def pid(self) -> int | None:
        """The process id of the worker that lives now."""
        return None if self._worker is None else self._worker.process.pid

    @property
    def outstanding(self) -> int:
        """Requests that are not over."""
        return len(self._conversations)

    async def start(self) -> wire.Ready:
        """Start the worker and wait until it takes requests. Raises TarsiaError where it can not."""
        self._first = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(), name="worker")
        either: list[asyncio.Future[Any]] = [self._first, self._task]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._first.done():
            return self._first.result()
        await self.ended()
        raise ServeError("lost", "The server is shutting down.")

    async def ended(self) -> None:
        """Wait until no worker will be started any more. Raises why, where that was not asked for."""
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()  # a defect of the supervisor itself is raised here
        if self.error is not None:
            raise self.error

    # what is asked of it ------------------------------------------------------------------------------------------

    async def generate(self, command: wire.Generate, pictures: Sequence[bytes] = ()) -> Conversation:
        """Send a request; leave the conversation (``async with``) and it is cancelled where it is not over.

        Raises ServeError where no request is taken now, and for one that no frame can hold.
        """
        worker = self._taking()
        if command.id in self._conversations:
            raise ServeError("invalid", "A request of this id is under way.", given=command.id)
        conversation = Conversation(command.id, command.sampling.choices, self._left)
        self._conversations[command.id] = conversation
        try:
            await self._send(worker, command, pictures)
        except BaseException:
            conversation.close()
            raise
        return conversation

    async def models(self) -> tuple[wire.Model, ...]:
        """Which adapters may be asked for."""
        return (await self._ask(wire.Models(id=self._id()))).models

    async def load(self, name: str, source: str) -> wire.Model:
        """Serve ``source`` as ``name``, by workers that are started later too. Raises ServeError for a refusal."""
        answer = await self._ask(wire.Load(id=self._id(), name=name, source=source))
        if not answer.models:
            raise ServeError(
                "refused", "The adapter was gone as soon as it was loaded.", given=name, do="load it again"
            )
        self._loaded[name] = source
        return answer.models[0]

    async def unload(self, name: str) -> None:
        """Take no requests for a name that was loaded. Raises ServeError for one that was not."""
        await self._ask(wire.Unload(id=self._id(), name=name))
        self._loaded.pop(name, None)

    async def drain(self, seconds: float) -> bool:
        """Take nothing new, wait up to ``seconds`` for what runs, then stop; whether all of it was finished."""
        worker, self.state = self._worker, State.DRAINING
        if worker is not None and worker.ready is not None and self._task is not None:
            with contextlib.suppress(OSError):  # what of a worker that is lost is told below
                await worker.stream.send(wire.framed(wire.Drain()))
            await asyncio.wait([self._task], timeout=seconds)
        whole = worker is None or worker.drained or not self._conversations
        await self.stop()
        return whole

    async def stop(self) -> None:
        """End the worker now; what it still had is lost."""
        if self.state is not State.STOPPED:
            self.state = State.DRAINING
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        self._over(ServeError("lost", "The server is shutting down."))
        self.state = State.STOPPED

    # its side of the worker ---------------------------------------------------------------------------------------

    def _taking(self) -> _Worker:
        if self.state is State.READY and self._worker is not None:
            return self._worker
        said = {
            State.STARTING: "The worker is not ready yet.",
            State.LOST: "The worker was lost, and another one starts.",
            State.DRAINING: "The server is shutting down.",
        }
        if self.error is not None:
            raise ServeError("lost", "No worker could be started any more.", given=self.error.what)
        raise ServeError("overloaded", said.get(self.state, "The server is shutting down."), do="try again in a while")

    def _id(self) -> str:
        return f"ask-{next(self._ids)}"

    async def _send(self, worker: _Worker, command: wire.Command, blobs: Sequence[bytes] = ()) -> None:
        try:
            await worker.stream.send(wire.framed(command, blobs))
        except BrokenFrame as error:  # nothing of it was sent
            raise ServeError("invalid", error.what, given=error.given, allowed=error.allowed) from None
        except OSError:
            raise ServeError("lost", "The worker was lost before it had the request.", do="try again") from None

    async def _ask(self, command: wire.Load | wire.Unload | wire.Models) -> wire.Answer:
        worker = self._taking()
        future: asyncio.Future[wire.Answer] = asyncio.get_running_loop().create_future()
        self._answers[command.id] = future
        try:
            await self._send(worker, command)
            async with asyncio.timeout(self._patience.answer):
                answer = await future
        except TimeoutError:
            if isinstance(command, wire.Load):  # what nobody knows to be there is not served later
                self._late[command.id] = command
                worker.stream.post(wire.framed(wire.Cancel(id=command.id)))
            raise ServeError("timeout", "The worker did not answer in time.", do="try again in a while") from None
        finally:
            self._answers.pop(command.id, None)
        if answer.failure is not None:
            raise answer.failure.error
        return answer

    def _left(self, conversation: Conversation, over: bool) -> None:
        """A conversation was left; where it is not over, the worker is told to leave it too."""
        self._conversations.pop(conversation.id, None)
        worker = self._worker
        if over or worker is None:
            return
        with contextlib.suppress(OSError):
            worker.stream.post(wire.framed(wire.Cancel(id=conversation.id)))

    # one worker after the other -----------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Start workers until one is not to be followed by another."""
        deaths = 0  # in a row
        unready = 0  # of these, before they were ready, the last ones
        try:
            while True:
                worker = await self._one()
                lived = asyncio.get_running_loop().time() - worker.since
                sound = worker.ready is not None and lived >= self._patience.sound
                deaths = 1 if sound else deaths + 1
                unready = 0 if worker.ready is not None else unready + 1
                if self.state is State.DRAINING or self._given_up(worker, unready):
                    return
                self.restarts += 1
                await asyncio.sleep(min(self._patience.pause * 2 ** (deaths - 1), self._patience.longest))
        finally:
            self.state = State.STOPPED

    def _given_up(self, worker: _Worker, unready: int) -> bool:
        first = self._first is not None and not self._first.done()
        if worker.unable is not None and (first or unready >= self._patience.deaths):
            self.error = worker.unable
        elif unready >= self._patience.deaths:
            code = worker.process.returncode
            self.error = ServeError(
                "lost",
                f"The worker ended {unready} times before it was ready.",
                given=_ending(code),
                do="see what it said above; the memory of the machine may be too small (--dtype, --cache-bytes)",
            )
        return self.error is not None

    async def _one(self) -> _Worker:
        """A worker from its start to its end; when this returns or raises, its process is no more."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(theirs.fileno()),
                str(os.getpid()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                env={**_WAITING, **os.environ},
                process_group=0,  # an interruption from the keyboard is the server's to handle
            )
        worker = self._worker = _Worker(process, await Stream.of(ours))
        why = _ENDED
        try:
            async with asyncio.timeout(self._patience.ready):
                await self._opened(worker)
            await self._listen(worker)
        except TimeoutError:  # an OSError too
            why = "it said nothing for too long" if worker.ready else "it was not ready in time"
        except (BrokenFrame, OSError) as error:
            why = error.what if isinstance(error, BrokenFrame) else str(error)
        finally:
            await self._end(worker, why)
        return worker

    async def _opened(self, worker: _Worker) -> None:
        """Wait until the worker is ready, and has what was loaded into those before it."""
        await worker.stream.send(wire.framed(self.configure))
        while worker.ready is None and worker.unable is None and (frame := await worker.stream.receive()) is not None:
            self._heard(worker, wire.event_in(frame))
        if worker.ready is None:
            return
        for name, source in [*self._loaded.items()]:
            await self._again(worker, name, source)
        self.ready = worker.ready
        if self.state is not State.DRAINING:
            self.state = State.READY
        if self._first is not None and not self._first.done():
            self._first.set_result(worker.ready)

    async def _again(self, worker: _Worker, name: str, source: str) -> None:
        """Load what an earlier worker had; a name that can not be is no longer served, which the log tells."""
        asked = wire.Load(id=self._id(), name=name, source=source)
        await worker.stream.send(wire.framed(asked))
        while (frame := await worker.stream.receive()) is not None:
            event = wire.event_in(frame)
            if isinstance(event, wire.Answer) and event.id == asked.id:
                if event.failure is not None:
                    del self._loaded[name]
                    _LOG.error("%s is no longer served: %s", name, event.failure.error)
                return
            self._heard(worker, event)

    async def _listen(self, worker: _Worker) -> None:
        """Hand on what the worker says until it ends. Raises BrokenFrame, OSError, TimeoutError."""
        while worker.ready is not None:
            async with asyncio.timeout(self._patience.silence):
                frame = await worker.stream.receive()
            if frame is None:
                return
            self._heard(worker, wire.event_in(frame))

    def _heard(self, worker: _Worker, event: wire.Event) -> None:
        match event:
            case wire.Started() | wire.Text() | wire.Done() | wire.Failed():
                if (conversation := self._conversations.get(event.id)) is not None:  # None: cancelled meanwhile
                    conversation.hear(event)
                return
            case wire.Answer():
                if (future := self._answers.get(event.id)) is not None and not future.done():
                    future.set_result(event)
                late = self._late.pop(event.id, None)
                if late is not None and event.failure is None:  # it came before it could be called off
                    self._loaded[late.name] = late.source
                    _LOG.warning("%s is served now, though it came too late for who asked", late.name)
                return
            case wire.Ready():
                worker.ready = event
            case wire.Unable():
                worker.unable = event.error
            case wire.Stats():
                self.stats = event
            case wire.Drained():
                worker.drained = True
            case wire.Log():
                _LOG.log(logging.getLevelName(event.level.upper()), event.what, extra={"facts": event.facts})
        self._tell(event)

    def _tell(self, event: wire.Event) -> None:
        """Have an event noticed; where that can not be, a full disk say, it is nothing of the worker's."""
        try:
            self._notice(event)
        except Exception as error:  # noqa: BLE001 - whoever listens does not end whoever speaks
            if not self._unheard:
                _LOG.error("what the worker says is not written down: %s: %s", type(error).__name__, error)
            self._unheard = True
        else:
            self._unheard = False

    async def _end(self, worker: _Worker, why: str) -> None:
        """See that the process is gone, and tell everybody who waits on it."""
        self._worker = self.stats = self.ready = None
        self._late.clear()
        if self.state is State.READY:
            self.state = State.LOST
        worker.stream.close()
        expected = self.state is State.DRAINING
        lost = ServeError("lost", "The worker was lost.", given=why, do="ask again")
        self._over(ServeError("lost", "The server ended.") if expected else lost)
        code = await _gone(worker.process, _CLOSING if why == _ENDED else 0.0)
        if not expected and worker.unable is None:
            _LOG.error("the worker was lost: %s (%s)", why, _ending(code))

    def _over(self, error: ServeError) -> None:
        for conversation in [*self._conversations.values()]:
            conversation.hear(wire.Failed.about(conversation.id, error))
        for future in self._answers.values():
            if not future.done():
                future.set_exception(error)


async def _gone(process: asyncio.subprocess.Process, seconds: float) -> int:
    """The exit code of a process that has so long to end by itself.

    One that has ended must not be killed: to send a signal is to look at the process first, which takes the exit code
    away from who waits for it.
    """
    try:
        async with asyncio.timeout(seconds):
            return await process.wait()
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return await process.wait()


def _ending(code: int | None) -> str:
    return f"ended by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
