"""A worker that ends in any way: nobody waits in vain, another one is started, and none is left behind."""

import asyncio
import functools
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tarsia.core.errors import ServeError
from tarsia.serve import wire
from tarsia.serve.request import Sampling
from tarsia.serve.supervise import Patience, State, Supervisor

COMMAND = (sys.executable, str(Path(__file__).with_name("pretended_worker.py")))
QUICK = Patience(pause=0.0, silence=60.0, ready=60.0)


def asked(text, **more):
    message = wire.ChatMessage(role="user", content=(wire.TextPart(text=text),))
    asked.count += 1
    return wire.Generate(id=f"r{asked.count}", messages=(message,), **more)


asked.count = 0


@asynccontextmanager
async def supervised(model="pretended", patience=QUICK):
    events = []
    supervisor = Supervisor(wire.Configure(model=model), notice=events.append, patience=patience, command=COMMAND)
    supervisor.events = events
    await supervisor.start()
    try:
        yield supervisor
    finally:
        pid = supervisor.pid
        await supervisor.stop()
        assert supervisor.state is State.STOPPED
        assert pid is None or gone(pid)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def until_gone(pid):
    async with asyncio.timeout(10):
        while not gone(pid):
            await asyncio.sleep(0.01)


async def ready_again(supervisor, before):
    async with asyncio.timeout(30):
        while supervisor.state is not State.READY or supervisor.pid == before:
            await asyncio.sleep(0.01)


async def whole(supervisor, command, pictures=()):
    async with await supervisor.generate(command, pictures) as conversation:
        return [event async for event in conversation]


def text_of(events, choice=0):
    return "".join(event.text for event in events if isinstance(event, wire.Text) and event.choice == choice)


def run(test):
    """A test that is a coroutine, ended where it hangs."""

    @functools.wraps(test)
    def running(*args, **kwargs):
        async def bounded():
            async with asyncio.timeout(60):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return running


@run
async def test_a_request_is_answered_and_forgotten():
    async with supervised() as supervisor:
        assert supervisor.ready.model == "pretended"
        events = await whole(supervisor, asked("one two three"), ())
        assert [event.event for event in events] == ["started", "text", "text", "text", "done"]
        assert text_of(events) == "one two three"
        assert supervisor.outstanding == 0
        assert [event.event for event in supervisor.events[:2]] == ["opening", "ready"]


@run
async def test_a_request_of_two_choices_is_over_with_the_last():
    async with supervised() as supervisor:
        events = await whole(supervisor, asked("one two", sampling=Sampling(choices=2)))
        assert [event.choice for event in events if event.event == "done"] == [0, 1]


@run
async def test_killed_in_the_middle_of_streams_every_request_is_told_and_the_next_is_answered(caplog):
    async with supervised() as supervisor:
        conversations = [await supervisor.generate(asked("wait for it")) for _ in range(5)]
        heard = [[await anext(conversation), await anext(conversation)] for conversation in conversations]
        assert all(text_of(events) == "wait" for events in heard)
        before = supervisor.pid
        os.kill(before, signal.SIGKILL)
        ends = [[event async for event in conversation] for conversation in conversations]
        assert [[event.event for event in end] for end in ends] == [["failed"]] * 5
        assert all(end[0].kind == "lost" for end in ends)
        assert supervisor.outstanding == 0
        with pytest.raises(ServeError, match="another one starts"):
            await supervisor.generate(asked("too early"))
        await ready_again(supervisor, before)
        assert gone(before)
        assert "ended by signal 9" in caplog.text
        assert text_of(await whole(supervisor, asked("here again"))) == "here again"
        assert supervisor.restarts == 1


@pytest.mark.parametrize("way", ["die", "garbage"])
@run
async def test_a_worker_that_dies_or_sends_garbage_is_replaced(way, caplog):
    async with supervised() as supervisor:
        before = supervisor.pid
        other = await supervisor.generate(asked("wait"))
        events = await whole(supervisor, asked(way))
        assert events[-1].kind == "lost"
        assert [event async for event in other][-1].kind == "lost"
        await ready_again(supervisor, before)
        assert gone(before)
        assert text_of(await whole(supervisor, asked("fine"))) == "fine"
    assert ("signal 9" if way == "die" else "no frame") in caplog.text


@run
async def test_a_worker_that_says_nothing_any_more_is_replaced(caplog):
    async with supervised(patience=Patience(pause=0.0, silence=0.2)) as supervisor:
        before = supervisor.pid
        events = await whole(supervisor, asked("hang"))
        assert events[-1].kind == "lost" and "nothing for too long" in events[-1].given
        await ready_again(supervisor, before)
        assert gone(before)


@run
async def test_a_request_that_fails_is_over_and_the_others_are_not():
    async with supervised() as supervisor:
        other = await supervisor.generate(asked("wait"))
        assert (await whole(supervisor, asked("fail")))[-1].kind == "internal"
        assert (await whole(supervisor, asked("x", adapter="nobody")))[-1].kind == "unknown_adapter"
        assert not other.over and supervisor.outstanding == 1
        other.close()


@run
async def test_stopping_while_a_lost_worker_is_cleared_away_leaves_none():
    async with supervised() as supervisor:
        pid = supervisor.pid
        os.kill(pid, signal.SIGSTOP)  # it neither answers nor ends when its socket closes
        supervisor._worker.stream.close()
        await asyncio.sleep(0.05)
        await supervisor.stop()
        await until_gone(pid)


@run
async def test_who_leaves_early_cancels():
    async with supervised() as supervisor:
        command = asked("wait")
        async with await supervisor.generate(command) as conversation:
            await anext(conversation)
        assert supervisor.outstanding == 0
        await whole(supervisor, asked("after it"))  # the worker answers in order
        assert f"cancelled {command.id}" in [event.what for event in supervisor.events if event.event == "log"]
        # One that is over cancels nothing.
        done = asked("over")
        await whole(supervisor, done)
        await whole(supervisor, asked("after that"))
        assert f"cancelled {done.id}" not in [getattr(event, "what", "") for event in supervisor.events]


@run
async def test_an_id_twice_and_pictures_beyond_the_limit_are_refused():
    async with supervised() as supervisor:
        command = asked("wait")
        async with await supervisor.generate(command):
            with pytest.raises(ServeError, match="this id"):
                await supervisor.generate(command)
        with pytest.raises(ServeError, match="too many blobs") as refused:
            await supervisor.generate(asked("many"), [b""] * 300)
        assert refused.value.kind == "invalid"
        assert text_of(await whole(supervisor, asked("and goes on"))) == "and goes on"


@run
async def test_what_was_loaded_is_loaded_into_the_next_worker_too(tmp_path, caplog):
    stays, goes = str(tmp_path / "stays"), str(tmp_path / "goes")
    async with supervised() as supervisor:
        assert (await supervisor.load("a", stays)).name == "a"
        await supervisor.load("b", goes)
        await supervisor.load("c", "whatever")
        await supervisor.unload("c")
        with pytest.raises(ServeError, match="no such adapter"):
            await supervisor.load("d", "bad")
        Path(goes + ".gone").touch()
        before = supervisor.pid
        os.kill(before, signal.SIGKILL)
        await ready_again(supervisor, before)
        assert [model.name for model in await supervisor.models()] == ["a"]
        assert "b is no longer served" in caplog.text


@run
async def test_an_ask_is_told_when_the_worker_is_lost():
    async with supervised() as supervisor:
        hanging = await supervisor.generate(asked("hang"))
        asking = asyncio.create_task(supervisor.models())
        await anext(hanging)
        os.kill(supervisor.pid, signal.SIGKILL)
        with pytest.raises(ServeError, match="was lost"):
            await asking


@run
async def test_a_journal_that_can_not_be_written_ends_no_worker(caplog):
    async with supervised() as supervisor:
        before = supervisor.pid

        def full(event):
            raise OSError(28, "No space left on device")

        supervisor._notice = full
        for text in ("wait for nobody", "one two"):
            async with await supervisor.generate(asked(text)) as conversation:
                await anext(conversation)  # and leaving the first one is told by a log event
        assert text_of(await whole(supervisor, asked("three"))) == "three"
        assert supervisor.pid == before and caplog.text.count("No space left") == 1


@run
async def test_a_load_of_what_is_gone_at_once_is_refused():
    async with supervised() as supervisor:
        with pytest.raises(ServeError, match="gone"):
            await supervisor.load("a", "nothing")
        assert not supervisor._loaded


@run
async def test_an_ask_that_nobody_answers_is_told():
    async with supervised(patience=Patience(answer=0.05)) as supervisor:
        hanging = await supervisor.generate(asked("hang"))
        with pytest.raises(ServeError, match="in time") as late:
            await supervisor.load("a", "b")
        assert late.value.kind == "timeout" and not supervisor._loaded and not supervisor._answers
        (id_,) = supervisor._late
        supervisor._heard(supervisor._worker, wire.Answer(id=id_))  # it was there before it could be called off
        assert supervisor._loaded == {"a": "b"} and not supervisor._late
        hanging.close()


@run
async def test_draining_finishes_what_runs_and_takes_nothing_new():
    async with supervised() as supervisor:
        running = await supervisor.generate(asked("finish"))
        await anext(running)
        draining = asyncio.create_task(supervisor.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(ServeError, match="shutting down") as refused:
            await supervisor.generate(asked("more"))
        assert refused.value.kind == "overloaded"
        assert [event async for event in running][-1].event == "done"
        assert await draining
        assert supervisor.state is State.STOPPED and supervisor.restarts == 0
        await supervisor.ended()


@run
async def test_draining_ends_in_time_and_says_what_was_lost():
    async with supervised() as supervisor:
        pid, running = supervisor.pid, await supervisor.generate(asked("wait"))
        assert not await supervisor.drain(0.05)
        last = [event async for event in running][-1]
        assert last.kind == "lost" and last.message == "The server ended." and last.do is None
        assert gone(pid)


@run
async def test_a_base_that_can_not_be_opened_is_told_as_it_is():
    supervisor = Supervisor(wire.Configure(model="unable"), patience=QUICK, command=COMMAND)
    with pytest.raises(ServeError, match="no such base") as refused:
        await supervisor.start()
    assert refused.value.do == "check the name"
    assert supervisor.restarts == 0 and supervisor.state is State.STOPPED
    with pytest.raises(ServeError, match="No worker"):
        await supervisor.generate(asked("x"))


@run
async def test_a_worker_that_never_becomes_ready_is_given_up():
    supervisor = Supervisor(wire.Configure(model="crash"), patience=Patience(pause=0.0, deaths=3), command=COMMAND)
    with pytest.raises(ServeError, match="ended 3 times before it was ready") as refused:
        await supervisor.start()
    assert "exit code 3" in str(refused.value)


@run
async def test_later_deaths_at_the_start_are_the_end_too(tmp_path):
    marker = tmp_path / "crash-now"
    patience = Patience(pause=0.0, deaths=2)
    async with supervised(f"crash-after-{marker}", patience) as supervisor:
        running = await supervisor.generate(asked("wait"))
        marker.touch()
        os.kill(supervisor.pid, signal.SIGKILL)
        with pytest.raises(ServeError, match="ended 2 times"):
            await supervisor.ended()
        assert [event async for event in running][-1].kind == "lost"
        with pytest.raises(ServeError, match="No worker"):
            await supervisor.generate(asked("x"))
