"""The worker's turns over an engine that is played: who is told what, whatever goes wrong."""

import logging
import socket
import threading
import time
from collections import Counter

import pytest
import torch

from tarsia.core.errors import DataError, LibraryError, ServeError
from tarsia.serve import wire
from tarsia.serve.frames import Connection
from tarsia.serve.house import Choice, House
from tarsia.serve.post import Closed, Inbox, Outbox, Told
from tarsia.serve.request import Event, Prompt
from tarsia.serve.turns import DONE, UNTRUSTED, Worker

READY = wire.Ready(
    model="played", family="none", form="float32", digest="0" * 64, dtype="float32", device="cpu",
    context=128, most_tokens=256, vocabulary=100, pictures=True, router=False, seconds=0.0,
)  # fmt: skip


class PlayedEngine:
    """Says a word of the prompt in each step. ``broken`` are exceptions that the next steps raise."""

    def __init__(self):
        self.jobs, self.broken, self.steps, self.stuck = {}, [], 0, False
        self.submitted, self.stepping = [], threading.Event()
        self.stepping.set()

    @property
    def idle(self):
        return not self.jobs

    def submit(self, request):
        if request.adapter == "unknown":
            raise ServeError("unknown_adapter", "There is no such adapter.", given=request.adapter)
        if request.adapter == "defect":
            raise KeyError("a defect")
        self.submitted.append(request)
        self.jobs[request.id] = (request, list(request.prompt.ids), False)

    def cancel(self, id_):
        self.jobs.pop(id_, None)

    def abort(self, error):
        ids = [*self.jobs]
        self.jobs.clear()
        return [Event(id_, "failed", {"error": error}) for id_ in ids]

    def step(self):
        self.stepping.wait(10)
        if self.stuck:
            return []
        self.steps += 1
        if self.broken:
            raise self.broken.pop(0)
        events = []
        for id_, (request, left, begun) in [*self.jobs.items()]:
            if not begun:
                adapter = {"name": request.adapter, "version": 1, "hash": "ab"} if request.adapter else None
                events.append(
                    Event(id_, "started", {"adapter": adapter, "prompt_tokens": len(left), "cached_tokens": 0})
                )
            likely = {"token": "a", "bytes": [97], "logprob": float("-inf"), "top": []}
            told = [likely] if request.sampling.logprobs is not None else None
            text = {"choice": 0, "text": f"{left[0]} ", "ids": [left[0]], "logprobs": told}
            if left[0] == 666:
                text["more"] = "what is no event"
            events.append(Event(id_, "text", text))
            self.jobs[id_] = (request, left[1:], True)
            if not left[1:]:
                del self.jobs[id_]
                events.append(
                    Event(id_, "done", {"choice": 0, "reason": "stop", "completion_tokens": len(request.prompt.ids)})
                )
        return events

    def stats(self):
        return {"steps": self.steps, "step_microseconds": 1_500_000, "running": len(self.jobs), "something_else": 1}


class PlayedTicket:
    def __init__(self, page=None, error=None):
        self.page, self.error, self.released = page, error, 0

    def release(self):
        self.released += 1


class PlayedShelf:
    def __init__(self):
        self.names, self.tickets, self.wanted = {}, {}, []

    def models(self):
        return [wire.Model(name=name, version=1, hash="ab", source=source) for name, source in self.names.items()]

    def bring(self, name, source):
        if source == "nowhere":
            raise LibraryError("There is nothing there.", given=source)
        return self.tickets.setdefault(f"{name}={source}", PlayedTicket())

    def alias(self, name, source):
        self.names[name] = source

    def drop(self, name):
        if name not in self.names:
            raise ServeError("unknown_adapter", "There is no such name.", given=name)
        del self.names[name]

    def want(self, reference):
        self.wanted.append(reference)
        if reference == "unknown":
            raise ServeError("unknown_adapter", "There is no such adapter.", given=reference)
        return self.tickets.setdefault(reference, PlayedTicket())

    def stats(self):
        return {"adapter_bytes": 77}


def read(messages, pictures):
    text = " ".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")
    if text == "unreadable":
        raise DataError("This can not be read.", given=text)
    if text == "a defect":
        raise ZeroDivisionError
    return Prompt(tuple(map(int, text.split())))


class Talk:
    """A worker in threads of this process, and what it has said."""

    def __init__(self, *, route=None, **more):
        ours, theirs = socket.socketpair()
        self.connection, self.theirs = Connection(ours), theirs
        self.engine, self.shelf = PlayedEngine(), PlayedShelf()
        self.prepared, self.inbox = [], Inbox()
        house = House(self.engine, self.shelf, more.pop("read", read), self.prepared.append, READY, route)
        self.outbox = Outbox(Connection(theirs), lambda why: self.inbox.put(Closed(why)))
        configure = wire.Configure(model="played", **more)
        self.worker = Worker(house, configure, Connection(theirs), self.outbox, self.inbox)
        self.codes, self.ids = [], Counter()
        self.thread = threading.Thread(target=lambda: self.codes.append(self.worker.run()))
        self.thread.start()
        self.heard = []
        assert self.until("ready")

    def ask(self, text, **more):
        self.ids["r"] += 1
        id_ = f"r{self.ids['r']}"
        message = wire.ChatMessage(role="user", content=(wire.TextPart(text=text),))
        self.send(wire.Generate(id=id_, messages=(message,), **more))
        return id_

    def send(self, command):
        self.connection.send(wire.framed(command))

    def hear(self):
        frame = self.connection.receive()
        assert frame is not None, "the worker has ended"
        event = wire.event_in(frame)
        self.heard.append(event)
        return event

    def until(self, event, id_=None):
        """The first event of this kind (about ``id_``), among those heard already too."""
        for told in self.heard:
            if told.event == event and id_ in (None, getattr(told, "id", None)):
                return told
        while True:
            told = self.hear()
            if told.event == event and id_ in (None, getattr(told, "id", None)):
                return told

    def of(self, id_):
        return [event.event for event in self.heard if getattr(event, "id", None) == id_]

    def text(self, id_):
        return "".join(event.text for event in self.heard if isinstance(event, wire.Text) and event.id == id_)

    def end(self):
        self.send(wire.Stop())
        self.thread.join(10)
        self.outbox.close()
        return self.codes


@pytest.fixture
def talk():
    made = []

    def begin(**more):
        made.append(Talk(**more))
        return made[-1]

    yield begin
    for each in made:
        each.engine.stepping.set()
        each.connection.close()
        each.thread.join(10)
        assert not each.thread.is_alive()
        each.outbox.close(5)
        each.theirs.close()


def test_a_request_is_read_stepped_and_told(talk):
    worker = talk()
    id_ = worker.ask("1 2 3", tenant="t", weight=2.0, seconds=60.0)
    assert worker.until("done", id_).completion_tokens == 3
    assert worker.of(id_) == ["started", "text", "text", "text", "done"]
    assert worker.text(id_) == "1 2 3 "
    request = worker.engine.submitted[0]
    assert (request.tenant, request.weight) == ("t", 2.0)
    assert 50 < request.deadline - time.monotonic() <= 60
    assert len(worker.prepared) == 1
    assert worker.end() == [DONE]


def test_the_logarithm_of_nothing_is_told_as_a_number(talk):
    worker = talk()
    id_ = worker.ask("1", sampling={"logprobs": 2})
    assert worker.until("text", id_).logprobs[0].logprob == wire.LEAST_LOGPROB


@pytest.mark.parametrize(
    "text, adapter, kind",
    [
        ("unreadable", None, "invalid"),
        ("a defect", None, "internal"),
        ("1", "unknown", "unknown_adapter"),
        ("1", "defect", "internal"),
        ("1", "auto", "unknown_adapter"),
        ("666", None, "internal"),
    ],
)
def test_what_is_wrong_with_one_request_is_its_own(talk, text, adapter, kind):
    worker = talk()
    other = worker.ask(" ".join(["7"] * 50))
    failed = worker.until("failed", worker.ask(text, adapter=adapter))
    assert failed.kind == kind
    assert worker.until("done", other).completion_tokens == 50
    assert worker.until("done", worker.ask("1 2"))
    assert not worker.worker._open


def test_a_defect_is_in_the_log_with_its_traceback(talk, caplog):
    worker = talk()
    worker.until("failed", worker.ask("a defect"))
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


def test_a_step_that_fails_ends_those_that_were_in_it_and_no_later_one(talk, caplog):
    worker = talk()
    worker.engine.stepping.clear()
    ids = [worker.ask("1 2 3") for _ in range(3)]
    while len(worker.engine.submitted) < 1:
        time.sleep(0.001)
    worker.engine.broken = [RuntimeError("the step broke")]
    worker.engine.stepping.set()
    first = worker.until("failed")
    assert (first.kind, "step" in first.message) == ("internal", True)
    assert "the step broke" in caplog.text and "Traceback" in caplog.text
    after = worker.ask("4 5")
    assert worker.until("done", after) and worker.text(after) == "4 5 "
    while set(ids) - {event.id for event in worker.heard if event.event in ("failed", "done")}:
        worker.hear()
    assert worker.end() == [DONE]


def test_no_memory_for_a_step_is_told_as_that(talk):
    worker = talk()
    worker.engine.broken = [MemoryError()]
    assert worker.until("failed", worker.ask("1")).kind == "overloaded"


@pytest.mark.parametrize("broken", [[RuntimeError("again")] * 3, [torch.AcceleratorError("the device is gone")]])
def test_what_can_not_be_trusted_ends_with_a_code_of_its_own(talk, broken):
    worker = talk()
    worker.engine.broken = [*broken]
    for _ in broken[:-1]:
        assert worker.until("failed", worker.ask("1 2 3")).kind == "internal"
    worker.ask("1 2 3")
    worker.thread.join(10)
    assert worker.codes == [UNTRUSTED]


def test_cancelled_at_any_time_nothing_more_is_done(talk):
    begun, go = threading.Event(), threading.Event()

    def slow(messages, pictures):
        begun.set()
        go.wait(10)
        return read(messages, pictures)

    worker = talk(read=slow, readers=1)
    reading = worker.ask("1 2 3")
    begun.wait(10)
    waiting = worker.ask("4 5 6")
    for id_ in (reading, waiting):
        worker.send(wire.Cancel(id=id_))
    worker.send(wire.Models(id="sync"))
    worker.until("answer", "sync")
    go.set()
    worker.until("done", worker.ask("7"))
    assert [request.prompt.ids for request in worker.engine.submitted] == [(7,)]
    worker.engine.stepping.clear()
    running = worker.ask("8 " * 1000)
    while len(worker.engine.submitted) < 2:
        time.sleep(0.001)
    worker.send(wire.Cancel(id=running))
    worker.engine.stepping.set()
    worker.until("done", worker.ask("9"))
    worker.until("done", worker.ask("9"))
    assert running not in worker.engine.jobs and "done" not in worker.of(running)
    assert not worker.worker._open


def test_what_was_refused_while_it_was_read_is_not_taken(talk):
    worker = talk()
    worker.engine.stepping.clear()
    running = worker.ask("1 2")
    while not worker.engine.submitted:
        time.sleep(0.001)
    refused = worker.ask("3", adapter="unknown")  # nothing is taken meanwhile: it is read before that is known
    while worker.inbox._items.qsize() < 2:
        time.sleep(0.001)
    worker.engine.stepping.set()
    assert worker.until("done", running) and worker.until("done", worker.ask("4"))
    assert worker.of(refused) == ["failed"]


def test_as_many_wait_as_may(talk):
    worker = talk(waiting=2)
    worker.engine.stepping.clear()
    first, second = worker.ask("1"), worker.ask("2")
    third = worker.until("failed", worker.ask("3"))
    assert third.kind == "overloaded" and third.do
    worker.engine.stepping.set()
    assert worker.until("done", first) and worker.until("done", second)
    assert worker.until("done", worker.ask("4"))


def test_the_router_chooses_and_says_so(talk):
    asked = []

    def route(prompt, may):
        asked.append((prompt.ids, may))
        if prompt.ids == (0,):
            return Choice(None, {"adapter": None, "confidence": 0.1})
        return Choice("ocr", {"adapter": "ocr", "confidence": 0.9})

    worker = talk(route=route)
    chosen, base = worker.ask("1", adapter="auto", may=("o*",)), worker.ask("0", adapter="auto")
    started = worker.until("started", chosen)
    assert started.adapter.name == "ocr" and started.routed["confidence"] == 0.9
    assert worker.until("started", base).adapter is None and worker.until("started", base).routed["adapter"] is None
    refused = worker.until("failed", worker.ask("0", adapter="auto", base=False))
    assert refused.kind == "unknown_adapter" and asked.pop() == ((0,), None)
    assert asked == [((1,), ("o*",)), ((0,), None)]
    assert worker.until("started", worker.ask("1", adapter="ocr")).routed is None


def test_a_load_is_answered_once_the_adapter_is_proved(talk):
    worker = talk()
    worker.send(wire.Load(id="l1", name="a", source="a@1"))
    worker.send(wire.Models(id="m1"))
    worker.until("answer", "m1")
    assert "answer" not in worker.of("l1")
    assert not worker.shelf.names
    worker.shelf.tickets["a=a@1"].page = object()
    answer = worker.until("answer", "l1")
    assert [model.name for model in answer.models] == ["a"] and answer.failure is None
    assert worker.shelf.tickets["a=a@1"].released == 1


def test_a_load_that_is_refused_leaves_no_name(talk):
    worker = talk()
    worker.send(wire.Load(id="l1", name="b", source="b"))
    worker.send(wire.Load(id="l2", name="c", source="nowhere"))
    assert worker.until("answer", "l2").failure.kind == "refused"
    worker.shelf.tickets["b=b"].error = ServeError("refused", "Its outputs are others.")
    assert worker.until("answer", "l1").failure.message == "Its outputs are others."
    worker.shelf.tickets["d=good"] = PlayedTicket(object())
    worker.send(wire.Load(id="l3", name="d", source="good"))
    assert worker.until("answer", "l3").failure is None
    worker.shelf.tickets["d=worse"] = PlayedTicket(error=ServeError("refused", "It is worse."))
    worker.send(wire.Load(id="l4", name="d", source="worse"))
    assert worker.until("answer", "l4").failure.message == "It is worse."
    assert worker.shelf.names == {"d": "good"}
    worker.send(wire.Unload(id="u", name="b"))
    assert worker.until("answer", "u").failure.kind == "unknown_adapter"


def test_a_name_means_what_it_did_until_what_is_loaded_is_proved(talk):
    worker = talk()
    worker.shelf.names["a"] = "old"
    for id_, source in (("l1", "first"), ("l2", "second"), ("l3", "third")):
        worker.send(wire.Load(id=id_, name="a", source=source))
    worker.send(wire.Cancel(id="l3"))
    worker.send(wire.Models(id="m"))
    assert [model.source for model in worker.until("answer", "m").models] == ["old"]
    worker.shelf.tickets["a=second"].page = worker.shelf.tickets["a=third"].page = object()
    worker.until("done", worker.ask("1"))
    assert worker.shelf.names == {"a": "old"}  # what was asked first is answered first
    worker.shelf.tickets["a=first"].error = ServeError("refused", "It is worse.")
    assert worker.until("answer", "l1").failure.message == "It is worse."
    assert [model.source for model in worker.until("answer", "l2").models] == ["second"]
    assert "Nobody waited" in worker.until("answer", "l3").failure.message
    assert worker.shelf.names == {"a": "second"}


@pytest.mark.parametrize("ticket", [PlayedTicket(object()), PlayedTicket(error=ServeError("refused", "No."))])
def test_what_is_unloaded_while_it_comes_is_not_served(talk, ticket):
    worker = talk()
    worker.send(wire.Load(id="l", name="a", source="a@1"))
    worker.send(wire.Unload(id="u", name="a"))
    assert worker.until("answer", "u").failure is None
    held = worker.shelf.tickets["a=a@1"]
    held.error, held.page = ticket.error, ticket.page
    assert "unloaded" in worker.until("answer", "l").failure.message
    assert not worker.shelf.names and held.released == 1
    assert worker.until("done", worker.ask("1"))


def test_an_adapter_is_fetched_while_its_request_is_read(talk):
    begun, go = threading.Event(), threading.Event()

    def slow(messages, pictures):
        begun.set()
        go.wait(10)
        return read(messages, pictures)

    worker = talk(read=slow, readers=1)
    id_ = worker.ask("1 2", adapter="ocr")
    begun.wait(10)
    unknown = worker.ask("3", adapter="unknown")
    assert worker.until("failed", unknown).kind == "unknown_adapter"  # and is never read
    assert worker.shelf.wanted == ["ocr", "unknown"] and not worker.engine.submitted
    left = worker.ask("4", adapter="dogs")
    worker.send(wire.Cancel(id=left))
    worker.send(wire.Models(id="sync"))
    worker.until("answer", "sync")
    assert worker.shelf.tickets["dogs"].released == 1 and worker.shelf.tickets["ocr"].released == 0
    worker.engine.stuck = True
    go.set()
    end = time.monotonic() + 10
    while worker.shelf.tickets["ocr"].released < 1:  # the engine has a ticket of its own
        assert time.monotonic() < end
        time.sleep(0.001)
    worker.engine.stuck = False
    assert worker.until("done", id_)
    assert not worker.worker._early and [request.id for request in worker.engine.submitted] == [id_]


def test_who_waits_to_be_read_keeps_no_adapter_and_has_few_fetched(talk):
    begun, go = threading.Event(), threading.Event()

    def slow(messages, pictures):
        begun.set()
        go.wait(10)
        return read(messages, pictures)

    worker = talk(read=slow, readers=1)
    ids = [worker.ask("1", adapter=f"a{n}", tenant="a") for n in range(8)]
    ids.append(worker.ask("1", adapter="b0", tenant="b"))
    worker.send(wire.Models(id="m1"))
    worker.until("answer", "m1")
    assert worker.shelf.wanted == ["a0", "a1", "a2", "a3", "b0"]
    worker.shelf.tickets["a1"].page = object()
    end = time.monotonic() + 10
    while not worker.shelf.tickets["a1"].released:  # though its request is not read
        assert time.monotonic() < end
        time.sleep(0.001)
    ids.append(worker.ask("1", adapter="a8", tenant="a"))
    worker.send(wire.Models(id="m2"))
    worker.until("answer", "m2")
    assert worker.shelf.wanted[-1] == "a8" and not worker.engine.submitted
    go.set()
    assert all(worker.until("done", id_) for id_ in ids)
    assert not worker.worker._early and all(ticket.released == 1 for ticket in worker.shelf.tickets.values())


def test_what_breaks_on_the_shelf_is_told_to_who_asked(talk, caplog):
    worker = talk()
    worker.shelf.models = lambda: 1 / 0
    worker.send(wire.Models(id="m"))
    assert worker.until("answer", "m").failure.kind == "internal"
    assert "ZeroDivisionError" in caplog.text
    assert worker.until("done", worker.ask("1"))


def test_figures_are_told_without_being_asked_for(talk):
    worker = talk()
    worker.until("done", worker.ask("1 2", adapter="ocr"))
    worker.until("done", worker.ask("1 2 3"))
    stats = worker.until("stats")
    while stats.steps < 3 or stats.running:
        stats = worker.hear()
        stats = stats if stats.event == "stats" else worker.until("stats")
    assert (stats.step_seconds, stats.adapter_bytes) == (1.5, 77)
    assert stats.process_bytes > 1e6
    ocr, base = stats.adapters["ocr"], stats.adapters[""]
    assert (ocr.requests, ocr.running, ocr.prompt_tokens, ocr.completion_tokens) == (1, 0, 2, 2)
    assert (base.requests, base.completion_tokens) == (1, 3)


def test_draining_finishes_what_is_there_and_ends(talk):
    worker = talk()
    worker.engine.stepping.clear()
    running = worker.ask("1 2 3")
    worker.send(wire.Drain())
    worker.engine.stepping.set()
    assert worker.until("done", running)
    worker.until("drained")
    worker.thread.join(10)
    assert worker.codes == [DONE]


def test_it_ends_when_nobody_speaks_to_it(talk):
    worker = talk()
    worker.ask("1 " * 100000)
    worker.connection.close()
    worker.thread.join(10)
    assert worker.codes == [DONE]


@pytest.mark.parametrize("data", [b"no frame at all, and more", b"TSR1\x00\x00\x00\x02\x00\x00\x00\x00{}"])
def test_it_ends_where_what_it_hears_is_broken(talk, data):
    worker = talk()
    worker.connection._socket.sendall(data)
    worker.thread.join(10)
    assert worker.codes == [DONE]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_ends_where_it_is_deaf_or_mute_or_blind(talk, caplog, capsys):
    deaf, mute, blind = talk(), talk(), talk(readers=1)
    blind.worker._desk._done = lambda sheet, found: 1 / 0
    blind.ask("1")
    deaf.worker._hear = lambda command, pictures: 1 / 0
    deaf.send(wire.Models(id="m"))
    mute.outbox.put(wire.Log(level="info", what="x" * (33 << 20)))  # no frame holds it
    for worker in (deaf, mute, blind):
        worker.thread.join(20)
        assert worker.codes == [DONE]
    for why in ("the receiver broke", "nothing can be sent any more", "a reader broke"):
        assert f"the worker ends: {why}" in caplog.text
    assert "nothing can be sent any more" in capsys.readouterr().err


def test_nothing_is_done_while_there_is_nothing_to_do(talk):
    worker = talk()
    worker.until("done", worker.ask("1"))
    turns, turn = Counter(), worker.worker._turn
    worker.worker._turn = lambda: (turns.update("t"), turn())[1]
    worker.heard.clear()
    worker.until("stats")
    worker.heard.clear()
    turns.clear()
    worker.until("stats")
    assert turns["t"] <= 3 and worker.engine.steps == 1


def test_an_engine_that_waits_for_adapters_is_not_asked_without_end(talk):
    worker = talk()
    worker.engine.stuck = True
    id_ = worker.ask("1")
    while not worker.engine.jobs:
        time.sleep(0.001)
    worker.heard.clear()
    worker.until("stats")
    assert worker.worker._pause() > 0
    worker.engine.stuck = False
    assert worker.until("done", id_)
    assert worker.worker._pause() > 0  # for the next figures


def test_what_is_logged_goes_to_the_other_side(talk):
    worker = talk()
    log = logging.getLogger("tarsia.played")
    handler = Told(worker.outbox)
    log.addHandler(handler)
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("it broke", extra={"facts": {"n": 3}})
    finally:
        log.removeHandler(handler)
    told = worker.until("log")
    assert (told.level, told.what, told.facts["n"]) == ("error", "it broke", 3)
    assert "ValueError: why" in told.facts["traceback"]
