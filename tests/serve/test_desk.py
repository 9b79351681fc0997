"""Readers: tenants take turns, a thread of theirs computes alone, and nothing that breaks there ends a thread."""

import os
import sys
import threading

import pytest
import torch

from tarsia.core.errors import DataError
from tarsia.serve import wire
from tarsia.serve.desk import Desk, Sheet
from tarsia.serve.request import Prompt


def sheet(id_, tenant="", text="x"):
    message = wire.ChatMessage(role="user", content=(wire.TextPart(text=text),))
    return Sheet(wire.Generate(id=id_, messages=(message,), tenant=tenant), (), 0.0)


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
        made.append(Desk(*args))
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
        raise {"refused": DataError("No."), "defect": ZeroDivisionError()}[text]

    def first(command):
        if command.id == "schema":
            raise DataError("No schema.")

    readers = desk(read, first, done, 1)
    for id_, text in (("1", "refused"), ("2", "defect"), ("schema", "x"), ("3", "x")):
        readers.add(sheet(id_, text=text))
    done.wait(4)
    kinds = {id_: type(found).__name__ for id_, found in done.found}
    assert kinds == {"1": "DataError", "2": "ZeroDivisionError", "schema": "DataError", "3": "Prompt"}


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
