"""A server on a free port of 127.0.0.1 with a worker that is made up: it says back what it was asked."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from PIL import Image

from tarsia.core.errors import ServeError
from tarsia.serve import wire
from tarsia.serve.conversation import Conversation
from tarsia.serve.http.app import app
from tarsia.serve.http.keys import Keyring, new_key
from tarsia.serve.http.listen import config
from tarsia.serve.http.logs import Journal
from tarsia.serve.http.settings import Settings
from tarsia.serve.supervise import State

HASH = "ab12" + "0" * 60
ADAPTERS = {name: (number, HASH) for name, number in (("acme-ocr", 3), ("acme-tone", 1), ("rival-plan", 7))}
READY = wire.Ready(
    model="/somewhere/models/mini-1", family="llava", form="bf16", digest="0", dtype="float32", device="cpu",
    context=512, most_tokens=4096, vocabulary=1000, pictures=True, router=True, seconds=0.1,
)  # fmt: skip


def png(width: int = 4, height: int = 4, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 7)).save(out, kind)
    return out.getvalue()


def data_url(raw: bytes | None = None, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(png() if raw is None else raw).decode()}"


def chat(text: str = "hello", model: str = "mini-1", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def picture_chat(*urls: str, model: str = "mini-1", **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "model": model,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, *parts]}],
        **more,
    }


class Fake:
    """Says back what it was told. Texts that begin with "!" make it do what a worker may do: see ``_say``."""

    def __init__(self) -> None:
        self.state = State.READY
        self.ready: wire.Ready | None = READY
        self.stats: wire.Stats | None = wire.Stats(picture_hits=5, adapter_bytes=77)
        self.restarts = 0
        self.asked: list[tuple[wire.Generate, list[bytes]]] = []
        self.open: set[str] = set()
        self.cancelled: list[str] = []
        self.aliases: dict[str, str] = {}
        self.loaded: list[str] = []
        self.chosen: str | None = "acme-ocr"
        self.running: dict[str, asyncio.Task[None]] = {}

    async def generate(self, command: wire.Generate, pictures: Sequence[bytes] = ()) -> Conversation:
        if self.state is not State.READY:
            raise ServeError("overloaded", "not ready")
        wire.command_in(wire.framed(command, pictures))  # what the wire can not carry is a fault
        self.asked.append((command, list(pictures)))
        self.open.add(command.id)
        conversation = Conversation(command.id, command.sampling.choices, self._left)
        task = self.running[command.id] = asyncio.create_task(self._say(command, conversation))
        task.add_done_callback(lambda _: self.running.pop(command.id))
        return conversation

    def _left(self, conversation: Conversation, over: bool) -> None:
        self.open.discard(conversation.id)
        if not over:
            self.cancelled.append(conversation.id)
            if conversation.id in self.running:
                self.running[conversation.id].cancel()

    def _by(self, command: wire.Generate) -> wire.ServedAdapter | None:
        name = command.adapter
        if name == "auto":
            name = self.chosen
        if name is None:
            return None
        bare = name.partition("@")[0].partition("#")[0]
        source = self.aliases.get(bare, bare).partition("@")[0]
        number, digest = ADAPTERS.get(source, (None, HASH))
        if bare not in ADAPTERS and bare not in self.aliases:
            raise ServeError(
                "unknown_adapter", "The library has no adapter of this name.", do="did you mean rival-plan?"
            )
        known = f"{source}@{number}" if bare != source and number is not None else None
        return wire.ServedAdapter(name=bare, version=number, hash=digest, source=known)

    async def _say(self, command: wire.Generate, to: Conversation) -> None:
        parts = [part for message in command.messages for part in message.content]
        last = next((p.text for p in reversed(parts) if isinstance(p, wire.TextPart)), "")
        try:
            by = self._by(command)
            if last.startswith("!fail "):
                kind = last.split()[1]
                given = "/etc/secret" if kind in ("refused", "damaged") else "x"
                raise ServeError(kind, "It can not be done.", given=given)
        except ServeError as error:
            return to.hear(wire.Failed.about(command.id, error))
        if last == "!other":
            by = wire.ServedAdapter(name="rival-plan", version=7, hash=HASH)
        routed = {"adapter": self.chosen, "confidence": 0.9} if command.adapter == "auto" else None
        if last == "!never":
            return None
        to.hear(wire.Started(id=command.id, adapter=by, routed=routed, prompt_tokens=11, cached_tokens=4))
        for choice in range(command.sampling.choices):
            await self._choose(command, to, choice, last)
        return None

    async def _choose(self, command: wire.Generate, to: Conversation, choice: int, last: str) -> None:
        said = command.sampling
        text = '{"answer": 42}' if said.schema is not None else f"you said {last}"
        for stop in said.stop:
            text = text.split(stop)[0]
        words = text.split(" ")
        most = said.max_tokens or 999
        for i, word in enumerate(words[:most]):
            piece = word if i == 0 else f" {word}"
            top = tuple(wire.Likely(token=f"t{j}", bytes=(116,), logprob=-1.0 - j) for j in range(said.logprobs or 0))
            told = wire.Logprob(token=piece, bytes=tuple(piece.encode()), logprob=-0.5, top=top)
            logprobs = (told,) if said.logprobs is not None else None
            to.hear(wire.Text(id=command.id, choice=choice, text=piece, logprobs=logprobs, tokens=1))
            await asyncio.sleep(0)
            if last == "!lose" and i == 1:
                return to.hear(wire.Failed.about(command.id, ServeError("lost", "The worker was lost.")))
            if last == "!stall" and i == 0:
                await asyncio.sleep(3600)
            if last == "!flood":
                for _ in range(20_000):
                    to.hear(wire.Text(id=command.id, choice=choice, text="x" * 500, tokens=1))
                await asyncio.sleep(3600)
        reason = "length" if len(words) > most else "stop"
        to.hear(wire.Done(id=command.id, choice=choice, reason=reason, completion_tokens=min(len(words), most)))
        return None

    async def models(self) -> tuple[wire.Model, ...]:
        if self.state is not State.READY:
            raise ServeError("overloaded", "not ready")
        own = [wire.Model(name=n, version=v, hash=h, methods="lora", bytes=9) for n, (v, h) in ADAPTERS.items()]
        held = {name: ADAPTERS.get(source.partition("@")[0], (None,))[0] for name, source in self.aliases.items()}
        return (*own, *(wire.Model(name=n, version=held[n], hash=HASH, source=s) for n, s in self.aliases.items()))

    async def load(self, name: str, source: str) -> wire.Model:
        if source.startswith("broken"):
            raise ServeError("refused", "The adapter's outputs are not those of the day it was saved.")
        if source.startswith("absent"):
            raise ServeError("unknown_adapter", "There is no such adapter.", given="x: the library has versions 1, 2")
        self.aliases[name] = source
        self.loaded.append(source)
        return wire.Model(name=name, version=None, hash=HASH, source=source)

    async def unload(self, name: str) -> None:
        del self.aliases[name]


SECRETS: dict[str, str] = {}


def keyring() -> Keyring:
    """acme (its own adapters), rival (its own), root (all, administrator), slow (few of everything)."""
    import yaml

    from tarsia.serve.http.keys import Key

    keys = []
    for name, more in (
        ("acme", {"adapters": ["acme-*"]}),
        ("rival", {"adapters": ["rival-*"], "base": False}),
        ("root", {"adapters": ["*"], "admin": True}),
        ("slow", {"adapters": ["*"], "requests_per_minute": 3, "tokens_per_minute": 100, "at_once": 1}),
        ("single", {"adapters": ["*"], "at_once": 1}),
    ):
        secret, text = new_key(name, name)
        SECRETS[name] = secret
        keys.append(Key.model_validate({**yaml.safe_load(text)[0], **more}))
    return Keyring.of(keys)


@dataclass(eq=False)
class Running:
    """A server that runs: where, with what worker, and what it logged."""

    url: str
    fake: Fake
    log: io.StringIO
    loop: asyncio.AbstractEventLoop
    settings: Settings
    port: int
    gate: Any
    connections: set[Any]

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def soon(self, what: Callable[[], bool], seconds: float = 5.0) -> bool:
        """Whether it comes true; looked at on the server's own loop."""

        async def until() -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while not what():
                        await asyncio.sleep(0.005)
            return what()

        return asyncio.run_coroutine_threadsafe(until(), self.loop).result(seconds + 5)


@contextlib.contextmanager
def running(settings: Settings | None = None, service: Any = None) -> Iterator[Running]:
    """A server in a thread of its own, for as long as the block; ``service`` may be a supervisor, not yet started."""
    settings = settings or Settings()
    fake, log = Fake(), io.StringIO()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    gate = app(service or fake, settings, Journal(log))
    server = uvicorn.Server(config(gate, settings, port=port))
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        if service is not None:
            await service.start()
        try:
            await server.serve(sockets=[listener])
        finally:
            if service is not None:
                await service.stop()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    try:
        yield Running(
            f"http://127.0.0.1:{port}", fake, log, loop, settings, port, gate, server.server_state.connections
        )
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
        loop.close()
