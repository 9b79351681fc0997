"""Readers: tenants take turns, a thread of theirs computes alone, and nothing that breaks there ends a thread."""

import os
import sys
import threading
import time

import pytest
import torch

from tarsia.core.errors import DataError
from tarsia.serve import wire
from tarsia.serve.desk import Desk, Sheet
from tarsia.serve.request import Picture, Prompt


def sheet(id_, tenant="", text="x", deadline=float("inf")):
    message = wire.ChatMessage(role="user", content=(wire.TextPart(text=text),))
    return Sheet(wire.Generate(id=id_, messages=(message,), tenant=tenant), (), deadline)


def lost(why):
    raise AssertionError(why)


class Panic(BaseException):
    """As those of tokenizers: no Exception."""


class Done:
    def __init__(self):
        self.found, self._change = [], threading.Condition()

    def __call__(self, sheet, prompt):
        with self._change:
            self.found.append((sheet.command.id, prompt))
            self._change.notify()

    def wait(self, count):
        with self._change:
            assert self._change.wait_for(lambda: len(self.found) >= count, 10)
        return [id_ for id_, _ in self.found]


@pytest.fixture
def desk():
    made = []

    def begin(*args):
        made.append(Desk(*args, *([lost] if len(args) < 5 else [])))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def test_tenants_take_turns(desk):
    first, go, done = threading.Event(), threading.Event(), Done()

    def read(messages, pictures):
        first.set()
        go.wait(10)
        return Prompt((1,))

    readers = desk(read, lambda command: None, done, 1)
    readers.add(sheet("a0", "a"))
    first.wait(10)
    for id_ in ("a1", "a2", "a3", "b1", "c1", "b2"):
        readers.add(sheet(id_, id_[0]))
    assert len(readers) == 7
    go.set()
    assert done.wait(7) == ["a0", "a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(readers) == 0


def test_what_is_forgotten_is_not_told(desk):
    first, go, done = threading.Event(), threading.Event(), Done()

    def read(messages, pictures):
        first.set()
        go.wait(10)
        return Prompt((1,))

    readers = desk(read, lambda command: None, done, 1)
    readers.add(sheet("now"))
    first.wait(10)
    readers.add(sheet("later"))
    readers.add(sheet("last"))
    assert readers.forget("now") and readers.forget("later") and not readers.forget("nobody")
    go.set()
    assert done.wait(1) == ["last"]


def test_errors_are_handed_on_and_the_thread_goes_on(desk):
    done = Done()

    def read(messages, pictures):
        text = messages[0]["content"][0]["text"]
        if text == "x":
            return Prompt((1,))
        raise {"refused": DataError("No."), "defect": ZeroDivisionError(), "panic": Panic("at 3")}[text]

    def first(command):
        if command.id == "schema":
            raise DataError("No schema.")

    readers = desk(read, first, done, 1)
    for id_, text in (("1", "refused"), ("2", "defect"), ("schema", "x"), ("4", "panic"), ("3", "x")):
        readers.add(sheet(id_, text=text))
    done.wait(5)
    kinds = {id_: type(found).__name__ for id_, found in done.found}
    assert kinds == {
        "1": "DataError",
        "2": "ZeroDivisionError",
        "schema": "DataError",
        "4": "RuntimeError",
        "3": "Prompt",
    }
    assert [str(found) for id_, found in done.found if id_ == "4"] == ["Panic: at 3"]


def test_who_is_behind_already_stays_behind_and_a_refused_priority_is_no_end(desk, monkeypatch, caplog):
    asked, done = [], Done()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "getpriority", lambda which, who: 10, raising=False)
    monkeypatch.setattr(os, "setpriority", lambda which, who, to: asked.append(to), raising=False)
    desk(lambda messages, pictures: Prompt((1,)), lambda command: None, done, 1)
    assert asked == [15]

    def refuse(which, who, to):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "setpriority", refuse, raising=False)
    readers = desk(lambda messages, pictures: Prompt((1,)), lambda command: None, done, 1)
    readers.add(sheet("1"))
    assert done.wait(1) == ["1"] and "Permission denied" in caplog.text


def test_what_was_read_and_waits_is_bounded_and_shared(desk):
    done, lock = Done(), threading.Lock()
    largest, now = [0], {}

    def read(messages, pictures):
        return Prompt((1,), (Picture(b"k", {"pixels": torch.zeros(40, dtype=torch.uint8)}),) * 2)

    def told(sheet, found):
        with lock:
            now[sheet.command.id] = 40  # the two are one
            largest[0] = max(largest[0], sum(now.values()))
        done(sheet, found)

    readers = desk(read, lambda command: None, told, 1, lost, 100)
    for id_ in ("a1", "a2", "a3", "a4", "b1", "b2"):
        readers.add(sheet(id_, id_[0]))
    ids = [done.wait(1)[0]]
    while len(ids) < 6:  # each that is over lets another one be read
        settled(readers, done)
        ids = [id_ for id_, _ in done.found]
        assert 0 < sum(now.values()) <= 160
        with lock:
            first = next(iter(now))
            del now[first]
        readers.release(first)
    assert {"a1", "a2", "b1"} <= {*ids[:4]} and largest[0] <= 160
    readers.release("nobody")


def settled(readers, done):
    """Wait until nothing more is read."""
    end, before = time.monotonic() + 10, -1
    while before != len(done.found) or readers._busy:
        assert time.monotonic() < end
        before = len(done.found)
        time.sleep(0.01)


def test_what_is_too_late_is_not_read(desk):
    read, done = [], Done()

    def reading(messages, pictures):
        read.append(messages)
        return Prompt((1,))

    readers = desk(reading, lambda command: None, done, 1)
    readers.add(sheet("late", deadline=0.0))
    done.wait(1)
    assert done.found[0][1].kind == "timeout" and not read


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["at the start", "at the end of a request"])
def test_a_reader_that_dies_is_told(desk, monkeypatch, where):
    told, heard = [], threading.Event()

    def say(why):
        told.append(why)
        heard.set()

    def broken(*args):
        raise ZeroDivisionError

    if where == "at the start":
        monkeypatch.setattr("tarsia.serve.desk._alone", broken)
    readers = desk(lambda messages, pictures: Prompt((1,)), lambda command: None, broken, 1, say)
    readers.add(sheet("1"))
    assert heard.wait(10) and told == ["a reader broke"]
    readers._threads[0].join(10)


def test_a_reader_computes_with_one_thread_behind_the_engine(desk):
    own, seen, done = torch.get_num_threads(), {}, Done()
    torch.set_num_threads(2)
    try:

        def read(messages, pictures):
            torch.ones(100, 100) @ torch.ones(100, 100)
            niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) if sys.platform == "linux" else None
            seen[threading.current_thread().name] = (torch.get_num_threads(), niceness)
            return Prompt((1,))

        readers = desk(read, lambda command: None, done, 2)
        for n in range(6):
            readers.add(sheet(str(n), str(n)))
        done.wait(6)
        own_niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert {threads for threads, _ in seen.values()} == {1}
        assert torch.get_num_threads() == 2
        if sys.platform == "linux":
            assert {niceness for _, niceness in seen.values()} == {min(19, own_niceness + 5)}
    finally:
        torch.set_num_threads(own)
