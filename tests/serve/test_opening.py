"""A worker's house over the embedded base, in 4 bits too: a picture, an adapter of a library, the router's seam."""

import base64
import io
import logging
import socket
import sys
from dataclasses import asdict, replace

import pytest
import torch
from e2e.made_adapters import made, saved
from PIL import Image

from tarsia.adapter import open_base, save
from tarsia.adapter.prototypes import Look
from tarsia.adapter.signature import signature, view
from tarsia.core.errors import AdapterError, LibraryError
from tarsia.library import Library
from tarsia.serve import arrivals, opening, routing, wire, worker
from tarsia.serve.frames import Connection
from tarsia.serve.read import Reader
from tarsia.serve.request import Prompt, Request, Sampling
from tarsia.serve.route import Choice
from tarsia.serve.routing import Chosen

LORA = (("lora", "language.*.{q,v}", {"rank": 4, "alpha": 8.0}),)
ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]


def picture(colour):
    shown = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(shown, "PNG")
    return shown.getvalue()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    made = Library.make(root / "library")
    made.publish(saved(open_base("mini-1"), root / "cats", LORA, 1, 0.3), "cats")
    return made


def answer(house, **more):
    prompt = house.read(ASKED, [picture((200, 30, 30))])
    house.engine.submit(Request("1", prompt, sampling=Sampling(max_tokens=6, temperature=0.0), **more))
    events = []
    while not house.engine.idle:
        events += house.engine.step()
    assert events[-1].kind == "done", events
    return "".join(event.data["text"] for event in events if event.kind == "text")


def test_everything_is_opened_as_it_was_told(library):
    said, threads = [], torch.get_num_threads()
    configure = wire.Configure(
        model="mini-1", library=str(library.places.root), dtype="float32", device="cpu", threads=1, rows=3, chunk=40,
        cache_bytes=4 << 20, picture_bytes=1 << 20, adapter_bytes=5 << 20,
    )  # fmt: skip
    house = opening.opened(configure, said.append)
    try:
        assert (torch.get_num_threads(), len(said)) == (1, 4)
        ready, limits = house.ready, house.engine.limits
        assert (ready.family, ready.dtype, ready.device, ready.pictures, ready.router) == (
            house.engine.host.anatomy.name, "float32", "cpu", True, True,
        )  # fmt: skip
        assert (limits.rows, limits.chunk, limits.cache_bytes, limits.picture_bytes) == (3, 40, 4 << 20, 1 << 20)
        assert ready.most_tokens == house.engine.most <= ready.context
        assert [model.name for model in house.shelf.models()] == ["cats"]
        assert answer(house) != answer(house, adapter="cats")
        prompt = house.read(ASKED, [picture((9, 9, 9))])
        choice = house.route(prompt, None)
        assert choice.adapter is None and choice.facts["why"] == "no adapter"  # cats was made without pictures
    finally:
        house.route.close()
        house.shelf.close()
        torch.set_num_threads(threads)


def test_adapters_of_another_base_are_counted_as_it_opens(library, tmp_path, caplog):
    """Those of another one are named: of 25 the first 20. Who says of no base is taken to be of this one."""
    host = open_base("mini-1")
    opening.count(library, host)
    assert not caplog.records
    own, other = library.search()[0], "files:" + "0" * 64
    foreign = [replace(own, name=f"x{i}", weights=other) for i in range(25)]
    unknown = replace(own, name="old", weights=None, architecture=None)

    class Shelf:
        def search(self):
            return [own, unknown, *foreign]

    opening.count(Shelf(), host)
    (told,) = [record.facts for record in caplog.records]
    assert (told["of_this_base"], told["of_another"]) == (2, 25)
    assert told["first"] == [f"x{i}@1" for i in range(20)]
    shelf = arrivals.Shelf(Shelf(), asdict(host.fingerprint))
    assert {v.name: v.foreign for v in shelf.all()} == {v.name: v in foreign for v in (own, unknown, *foreign)}


def test_a_base_in_four_bits_is_served(library):
    configure = wire.Configure(model="mini-1", dtype="float32", device="cpu", threads=1, four_bits={"kind": "nf4"})
    house = opening.opened(configure, lambda what: None)
    assert "nf4" in house.ready.form and house.ready.router is False
    assert answer(house)
    house.shelf.close()


@pytest.fixture
def looks(monkeypatch, tmp_path):
    """A library whose versions' cards are written by the test, and a router over it that looks when it is told to."""
    monkeypatch.setattr(routing, "_SECONDS", 3600.0)
    host = open_base("mini-1")
    library, cards = Library.make(tmp_path / "library"), {}

    class Card:
        def __init__(self, rest):
            self.rest = rest

    def read(library, reference):
        if reference not in cards:
            raise LibraryError("The card is not the one that was published.", given=reference)
        return None, Card(cards[reference])

    monkeypatch.setattr(routing, "read", read)
    return host, library, cards


def test_what_is_published_is_known_to_the_router_and_what_says_nothing_is_told(looks, tmp_path, caplog):
    host, library, _ = looks
    caplog.set_level(logging.INFO)
    router = Chosen(host, library)
    asked = Prompt((1,), ())
    assert router(asked, None).facts["why"] == "no picture" and not router.look()
    library.publish(saved(host, tmp_path / "a", LORA, 1, 0.3), "a")
    assert router.look() and not router.look()
    assert [record.facts["count"] for record in caplog.records if hasattr(record, "facts")] == [1]
    library.publish(saved(host, tmp_path / "b", LORA, 2, 0.3), "b")
    assert router.look()  # and says of b alone, once
    assert [[*record.facts["first"]] for record in caplog.records if hasattr(record, "facts")] == [["a@1"], ["b@1"]]
    router.close()


def looked_like(host, seed, scale=1.0, count=40):
    """A card of pictures around a place of their own, ``scale`` times as far from it as they are."""
    generator = torch.Generator().manual_seed(seed)
    width = len(signature(host, Reader(host).read(ASKED, [picture((9, 9, 9))]).pictures[0].inputs))
    card = Look.of(view(host), 3 * torch.randn(1, width, generator=generator) + torch.randn(count, width)).plain()
    held = torch.frombuffer(bytearray(base64.b64decode(card["directions"]["scale"])), dtype=torch.float32)
    card["directions"]["scale"] = base64.b64encode((held * scale).numpy().tobytes()).decode()
    return {"routing": card}


def test_the_router_chooses_among_those_that_may_be_asked_for(looks, tmp_path, monkeypatch):
    host, library, cards = looks
    asked = []

    def choose(router, signatures, among=None):
        asked.append(sorted(router.names if among is None else among))
        return Choice(None, 0.0, 0.0, "no picture")

    for number, name in enumerate(("ocr-a", "ocr-b", "cats", "blind")):
        library.publish(saved(host, tmp_path / name, LORA, number, 0.3), name)
        cards[f"{name}@1"] = {"routing": {"none": "no"}} if name == "blind" else looked_like(host, number)
    monkeypatch.setattr(routing.Router, "choose", choose)
    router = Chosen(host, library)
    for may in (None, ("ocr-*",), ("cats", "no*"), (), ("*",)):
        router(Prompt((1,), ()), may)
    assert asked == [["cats", "ocr-a", "ocr-b"], ["ocr-a", "ocr-b"], ["cats"], [], ["cats", "ocr-a", "ocr-b"]]
    library.publish(saved(host, tmp_path / "late", LORA, 9, 0.3), "ocr-late")
    cards["ocr-late@1"] = looked_like(host, 9)
    router.look()
    router(Prompt((1,), ()), ("ocr-*",))
    assert asked[-1] == ["ocr-a", "ocr-b", "ocr-late"]
    router.close()


def told(caplog):
    return [record.facts["first"] for record in caplog.records if hasattr(record, "facts")]


def test_a_card_with_which_nothing_can_be_computed_is_left_out_by_name(looks, tmp_path, caplog, monkeypatch):
    host, library, cards = looks
    caplog.set_level(logging.INFO)
    for number, name in enumerate(("a", "b", "narrow", "far", "odd")):
        library.publish(saved(host, tmp_path / name, LORA, number, 0.3), name)
        cards[f"{name}@1"] = looked_like(host, number, 1e25 if name == "far" else 1.0)
    cards["narrow@1"] = {"routing": Look.of(view(host), torch.randn(40, 8)).plain()}
    real = routing.Router.settle

    def settle(router):
        if "odd" in router.names:
            raise torch.linalg.LinAlgError("not positive-definite")
        real(router)

    monkeypatch.setattr(routing.Router, "settle", settle)
    router = Chosen(host, library)
    assert router._router.names == ("a", "b")
    (named,) = told(caplog)
    assert {*named} == {"narrow@1", "far@1", "odd@1"} and "nothing can be computed" in named["odd@1"]
    assert "can not be read" in named["far@1"]
    library.publish(saved(host, tmp_path / "c", LORA, 9, 0.3), "c")
    cards["c@1"] = looked_like(host, 9)
    assert router.look() and router._router.names == ("a", "b", "c") and len(told(caplog)) == 1
    router.close()


def test_the_router_lives_on_whatever_breaks_and_forgets_what_is_gone(looks, tmp_path, caplog, monkeypatch):
    host, library, cards = looks
    clock = [1000.0]
    monkeypatch.setattr(routing.time, "monotonic", lambda: clock[0])
    library.publish(saved(host, tmp_path / "a", LORA, 1, 0.3), "a")
    router = Chosen(host, library)  # whose card can not be read yet
    assert router._router.names == () and not router.look()
    cards["a@1"] = looked_like(host, 1)
    clock[0] += routing._AGAIN
    assert router.look() and router._router.names == ("a",) and not router.look()
    clock[0] += routing._AGAIN
    assert not router.look()
    with monkeypatch.context() as broken:
        broken.setattr(Library, "search", lambda library: 1 / 0)
        router._stamp = None
        router._looked()
    assert "ZeroDivisionError" in caplog.text and router._router.names == ("a",)
    old = [*router._looks]
    library.publish(saved(host, tmp_path / "again", LORA, 2, 0.3), "a")
    cards["a@2"] = {"routing": {"none": "no"}}
    assert router.look() and router._router.names == () and not {*old} & {*router._looks}
    router.close()


def colours(host, tint, count):
    """Signatures of noisy pictures of one tint, and the last of these as a file."""
    reader, generator, found = Reader(host), torch.Generator().manual_seed(sum(tint)), []
    for _ in range(count):
        pixels = (torch.tensor(tint) + torch.randint(-40, 41, (32, 32, 3), generator=generator)).clamp(0, 255).byte()
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "PNG")
        found.append(signature(host, reader.read(ASKED, [file.getvalue()]).pictures[0].inputs))
    return torch.stack(found), file.getvalue()


@pytest.mark.slow
def test_a_picture_is_answered_by_the_adapter_whose_pictures_look_like_it(tmp_path):
    host = open_base("mini-1")
    library, files = Library.make(tmp_path / "library"), {}
    for number, (name, tint) in enumerate((("reds", (200, 40, 40)), ("blues", (40, 60, 210)))):
        looks, files[name] = colours(host, tint, 24)
        adapter = made(host, LORA, number, 0.3)
        adapter = replace(adapter, card={**adapter.card, "routing": Look.of(view(host), looks).plain()})
        save(adapter, tmp_path / name)
        library.publish(tmp_path / name, name)
    configure = wire.Configure(
        model="mini-1", library=str(library.places.root), dtype="float32", device="cpu", threads=1
    )
    house = opening.opened(configure, lambda what: None)
    for name, other in (("reds", "blues"), ("blues", "reds")):
        prompt = house.read(ASKED, [files[name]])
        assert house.route(prompt, None).adapter == name
        assert house.route(prompt, (f"{other}*",)).adapter != name
        assert house.route(prompt, None).facts["nearest"] == name
    strange = house.route(house.read(ASKED, [picture((0, 255, 0))]), None)
    assert strange.adapter is None and strange.facts["why"] in ("strange", "unsure")
    house.route.close()
    house.shelf.close()


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (AdapterError("There is no such base.", do="check the name"), "invalid", "no such base"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "refused", "not enough memory"),
    ],
)
def test_what_can_not_be_opened_is_told_and_the_worker_ends(monkeypatch, error, kind, said):
    ours, theirs = socket.socketpair()

    def opened(configure, tell):
        tell("trying")
        raise error

    monkeypatch.setattr(opening, "opened", opened)
    monkeypatch.setattr(worker, "bound", lambda parent: None)
    monkeypatch.setattr(sys, "argv", ["worker", str(theirs.detach()), "1"])
    connection = Connection(ours)
    connection.send(wire.framed(wire.Configure(model="x")))
    log, before = logging.getLogger("tarsia"), [*logging.getLogger("tarsia").handlers]
    try:
        assert worker.main() == worker.UNABLE
    finally:
        log.handlers[:] = before
        log.setLevel(logging.NOTSET)
    assert wire.event_in(connection.receive()).what == "trying"
    unable = wire.event_in(connection.receive())
    assert (unable.kind, said in unable.message) == (kind, True) and unable.do
