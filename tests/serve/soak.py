"""Mixed load on a real server while everything happens to it: ``python tests/serve/soak.py --minutes 10 --out FOLDER``.

mini-1 is served from a library while askers ask the base and adapters of six kinds, with and without a picture.
Meanwhile versions are published, replaced, rolled back and withdrawn, the pages' budget holds a part of them, clients
leave in the middle of an answer, and the worker is killed with SIGKILL. What each adapter answers, alone, was written
down before, by Transformers' own ``generate``; only questions whose every token was clearly the likeliest are asked.

It fails where an answer is not, letter for letter, that of the version that is said to have answered; where that
version was not to be had at any moment of the request; where an answer ends without its end and without an error;
where an error comes that nothing explains; and where either process grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tarsia.serve.load.asked import Question, body
from tarsia.serve.load.client import Answered, Client

TOKENS = 16
GAP = 1e-3
"""How much likelier, in logits, a written-down token is at least than the next."""
PROMPTS = (
    "What is shown?",
    "Say a word.",
    "What colour is it?",
    "How many are there?",
    "Describe the picture.",
    "Why?",
)
KINDS = {
    "lora": ("lora", "language.*.{q,v}; vision.*.{q,v}", {"rank": 4, "alpha": 8.0}, 0.2),
    "wide": ("lora", "language.*.{q,k,v,o}; projector", {"rank": 16, "alpha": 16.0}, 0.08),
    "dora": ("dora", "language.*.{q,v}", {"rank": 4, "alpha": 8.0}, 0.2),
    "neck": ("houlsby", "language", {"reduction": 4}, 0.25),
    "prefix": ("prefix", "language", {"length": 5}, 2.0),
    "projector": ("full", "projector", {}, 0.2),
}
EXPLAINED = ("503", "lost", "worker_lost", "not_ready", "overloaded", "429")
"""What a request may be told from a kill until ``AFTER`` seconds after the first answer that follows it."""
AFTER = 5.0
LONGEST = 180.0
"""Seconds within which another worker must answer."""


@dataclass
class Content:
    """One version's content: its kind and number, its folder, and what it answers to which question."""

    kind: str
    number: int
    folder: Path
    said: dict[tuple[str, int | None], str] = field(default_factory=dict)


@dataclass
class Meant:
    """What a name meant, and from when to when (None: nothing)."""

    content: Content | None
    since: float
    until: float = float("inf")


@dataclass
class World:
    """What may be asked for: by name, what it meant when."""

    contents: list[Content]
    base: dict[tuple[str, int | None], str]
    hashes: dict[str, Content] = field(default_factory=dict)
    history: dict[str, list[Meant]] = field(default_factory=dict)

    def becomes(self, name: str, content: Content | None, since: float, until: float | None = None) -> None:
        """The name means this; the change took from ``since`` to ``until``, and in between either may answer."""
        held = self.history.setdefault(name, [Meant(None, float("-inf"))])
        held[-1].until = since if until is None else until
        held.append(Meant(content, since))

    def during(self, name: str, began: float, ended: float) -> list[Content | None]:
        """What the name meant at any moment from ``began`` to ``ended``."""
        return [one.content for one in self.history.get(name, ()) if one.since <= ended and began <= one.until]

    def now(self, name: str) -> Content | None:
        """What the name means."""
        return self.history[name][-1].content if name in self.history else None


def questions(pictures: int) -> list[tuple[str, int | None]]:
    return [(prompt, picture) for prompt in PROMPTS for picture in (None, *range(pictures))]


def prepare(folder: Path, each: int, pictures: int) -> World:
    """Draw ``each`` adapters of every kind, and write down what they answer."""
    from tarsia.adapter import load, open_base, put, save
    from tarsia.core.attach import Part, activate, detach
    from tarsia.core.method import find
    from tarsia.serve.load.drawn import Drawer, Make

    host = open_base("mini-1", dtype="float32", device="cpu")
    drawer = Drawer(host, probed(host))
    asked = questions(pictures)
    world = World([], dict(alone(host, asked)))
    for kind, (method, select, options, by) in KINDS.items():
        parts = (Part(method, select, find(method).configure(options)),)
        for number in range(each):
            content = Content(kind, number, folder / f"{kind}-{number}")
            save(drawer.draw(Make(parts, by), number), content.folder)
            activate(host.model)
            put(host, load(content.folder), "it")
            content.said = dict(alone(host, asked))
            detach(host.model, "it")
            world.contents.append(content)
            same = sum(world.base.get(key) == text for key, text in content.said.items())
            if not content.said or same > 0.5 * len(content.said):
                raise RuntimeError(f"{kind} {number} hardly changes what is said: {same} of {len(content.said)}")
    return world


def probed(host: Any) -> Any:
    """One row with a picture."""
    from tarsia.serve.load.inside import Text, shown

    written, pictures = shown(host, Text("What is shown?", 0))
    return host.processor(text=[written], images=pictures, return_tensors="pt")


def alone(host: Any, asked: list[tuple[str, int | None]]) -> Iterator[tuple[tuple[str, int | None], str]]:
    """Each question that is answered clearly, with its answer: Transformers' generation, greedy, one at a time."""
    import torch
    from transformers import GenerationConfig

    from tarsia.adapter.generation import generate
    from tarsia.evaluate.chat import Chat
    from tarsia.serve.load.inside import Text, shown

    chat = Chat(host)
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=sorted(chat.ends), pad_token_id=0)
    host.model.generation_config = config
    for prompt, picture in asked:
        written, pictures = shown(host, Text(prompt, picture))
        inputs = dict(host.processor(text=[written], images=pictures or None, return_tensors="pt"))
        with torch.inference_mode():
            out = generate(host, inputs, output_logits=True, return_dict_in_generate=True)
        tops = torch.stack(out.logits)[:, 0].topk(2).values
        if float((tops[:, 0] - tops[:, 1]).min()) < GAP:
            continue
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        end = next((i for i, token in enumerate(ids) if token in chat.ends), len(ids))
        yield (prompt, picture), chat.tokenizer.decode(ids[:end], skip_special_tokens=True)


@contextmanager
def served(library: Path, log: Path, options: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``tarsia serve`` in a process of its own; gives it and its address. It must end well when it is told to."""
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    command = [sys.executable, "-m", "tarsia", "serve", "mini-1", "--library", str(library), "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *options], stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        over = time.monotonic() + 180
        while not ready(url):
            if process.poll() is not None or time.monotonic() > over:
                raise RuntimeError(f"the server does not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield process, url
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text(errors='replace')[-2000:]}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def worker(process: int) -> int | None:
    """The engine's process: the child that has most in memory."""
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:
        return None
    return max(map(int, found), key=resident, default=None)


def resident(process: int) -> int:
    """Bytes in memory; 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


class Soak:
    """One soak: what was asked, what was wrong with it, and how much memory there was."""

    def __init__(self, world: World, library: Any, url: str, server: int, seconds: float, seed: int = 0) -> None:
        self.world, self.library, self.url, self.server, self.seconds = world, library, url, server, seconds
        self.drawn = random.Random(seed)
        self.began = time.perf_counter()
        self.counts: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.faults: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.kills: list[float] = []
        self.back: dict[float, float] = {}
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.memory: list[tuple[float, int, int, int]] = []
        self.next: dict[str, int] = {}

    def now(self) -> float:
        return time.perf_counter() - self.began

    def fault(self, text: str, at: float | None = None) -> None:
        kind = " ".join(text.partition(":")[2].split()[:3]) if text.startswith("unexplained") else text.split()[0]
        self.counts["faults"] += 1
        self.kinds[kind] += 1
        if self.kinds[kind] <= 10:
            self.faults.append(text if at is None else f"{at:.1f} s: {text}")

    # what happens to the library -----------------------------------------------------------------------------------

    def publish(self, name: str) -> None:
        """Put another content of the name's kind in its place."""
        kind = name.partition("-")[0]
        of_kind = [content for content in self.world.contents if content.kind == kind]
        content = of_kind[self.next.get(name, 0) % len(of_kind)]
        self.next[name] = self.next.get(name, 0) + 1
        since = self.now()
        version = self.library.publish(content.folder, name).version
        self.world.hashes[version.hash] = content
        if self.library.version(name).hash != version.hash:
            self.library.rollback(name, to=version.number)  # the same content again got no version of its own
        self.world.becomes(name, content, since, self.now())
        self.counts["published"] += 1

    async def change(self, names: list[str], over: float) -> None:
        """Publish and replace, and serve under other names and withdraw them, at random moments."""
        client = httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=60)
        try:
            while self.now() < over:
                await asyncio.sleep(self.drawn.expovariate(2.0))
                if self.drawn.random() < 0.5:
                    await asyncio.to_thread(self.publish, self.drawn.choice(names))
                else:
                    await self.alias(client, f"alias-{self.drawn.randrange(3)}", self.drawn.choice(names))
        finally:
            await client.aclose()

    async def alias(self, client: httpx.AsyncClient, alias: str, name: str) -> None:
        """Serve a version under another name, or withdraw that."""
        if self.world.now(alias) is not None:
            at = self.now()
            said = await client.post("/v1/unload_lora_adapter", json={"lora_name": alias})
            if said.status_code == 200:
                self.world.becomes(alias, None, at, self.now())
                self.counts["withdrawn"] += 1
                return
        else:
            at, version = self.now(), self.library.version(name)
            asked = {"lora_name": alias, "lora_path": f"{name}@{version.number}"}
            said = await client.post("/v1/load_lora_adapter", json=asked)
            if said.status_code == 200:
                self.world.becomes(alias, self.world.hashes[version.hash], at, self.now())
                self.counts["loaded"] += 1
                return
        told, kind, ended = f"{alias}: {said.status_code} {said.text[:200]}", str(said.status_code), self.now()
        self.later.append((ended, partial(self.unanswered, told, at, ended, kind)))

    # what is asked -------------------------------------------------------------------------------------------------

    async def ask(self, client: Client, base: str, over: float, seed: int) -> None:
        """One asker: a question, an answer, the next question."""
        drawn, keys = random.Random(seed), list(self.world.base)
        while self.now() < over:
            names = [*self.world.history, base]
            name = drawn.choice(names)
            prompt, picture = drawn.choice(keys)
            question = Question(self.counts["asked"], name, picture, prompt)
            self.counts["asked"] += 1
            began = self.now()
            if drawn.random() < 0.1:
                await self.leave(client, question, drawn.random() * 0.5)
                continue
            answered = await client.ask(question)
            # what a name meant is known once the change has ended: it is judged after all
            ended = self.now()
            self.later.append((ended, partial(self.judge, question, answered, base, began, ended)))
            if answered.error.startswith(("503", "429")):
                await asyncio.sleep(0.25)  # as it is told to come again

    async def leave(self, client: Client, question: Question, after: float) -> None:
        """Ask, and leave in the middle."""
        try:
            async with asyncio.timeout(after):
                async with client.held.stream("POST", "/v1/chat/completions", json=body(question, TOKENS)) as response:
                    await response.aread()
        except (TimeoutError, httpx.TransportError):
            pass
        self.counts["left"] += 1

    def judge(self, question: Question, answered: Answered, base: str, began: float, ended: float) -> None:
        """Whether this is an answer that the question could get."""
        if answered.error:
            self.unanswered(f"{question.model}: {answered.error}: {answered.told}", began, ended, answered.error)
            return
        key = (question.prompt, question.picture)
        if question.model == base:
            allowed, by = [self.world.base], "base"
            if answered.by is not None:
                self.fault(f"the base was asked, and {answered.by} answered", ended)
        else:
            hash_ = str((answered.by or {}).get("hash", "")).rpartition(":")[2]
            content = self.world.hashes.get(hash_)
            if content is None:
                self.fault(f"{question.model} was asked, and {answered.by} answered", ended)
                return
            if content not in self.world.during(question.model, began, ended):
                who = f"{content.kind} {content.number}"
                self.fault(f"{question.model} was asked, and answered by {who}: not to be had then", ended)
            allowed, by = [content.said], content.kind
        if key not in allowed[0]:
            self.counts["not compared"] += 1  # the adapter alone answers this one without being clear
            return
        self.counts["compared"] += 1
        for kill in self.kills:
            if began > kill:
                self.back.setdefault(kill, ended)
        self.answered[by] += 1
        if answered.text != allowed[0][key]:
            self.counts["wrong"] += 1
            self.fault(
                f"wrong answer: {question} by {answered.by}: {answered.text!r} is not {allowed[0][key]!r}", ended
            )

    def unanswered(self, told: str, began: float, ended: float, kind: str) -> None:
        """An error: one that a kill or a withdrawal explains, or a fault."""
        self.errors[kind] += 1
        name = told.partition(":")[0]
        near = any(kill <= ended and began <= self.back.get(kill, kill + LONGEST) + AFTER for kill in self.kills)
        known = name in self.world.history
        if kind.startswith("404") and known and None in self.world.during(name, began, ended):
            return
        if near and (kind.startswith(EXPLAINED) or any(word in kind for word in EXPLAINED)):
            return
        if near and kind.startswith("404") and name.startswith("alias"):
            return  # the next worker serves it again a moment later
        self.fault(f"unexplained: {told}", ended)

    # what happens to the worker ------------------------------------------------------------------------------------

    async def kill(self, at: list[float]) -> None:
        for moment in at:
            await asyncio.sleep(max(0.0, moment - self.now()))
            process = worker(self.server)
            if process is None:
                self.fault("there is no worker to kill")
                continue
            self.kills.append(self.now())
            os.kill(process, signal.SIGKILL)
            self.counts["killed"] += 1

    async def watch(self, over: float) -> None:
        while self.now() < over:
            process = worker(self.server)
            if process is not None:
                self.memory.append((round(self.now(), 1), resident(self.server), process, resident(process)))
            await asyncio.sleep(min(1.0, self.seconds / 40))

    async def run(self, names: list[str], askers: int, kills: list[float]) -> None:
        self.began = time.perf_counter()
        for name, held in self.world.history.items():
            self.world.history[name] = [Meant(held[-1].content, 0.0)]
        client = Client(self.url, max_tokens=TOKENS, seconds=120, connections=2 * askers)
        base = next(str(model["id"]) for model in await client.models() if not model.get("parent"))
        over = self.seconds
        try:
            await asyncio.gather(
                *(self.ask(client, base, over, seed) for seed in range(askers)),
                self.change(names, over),
                self.kill(kills),
                self.watch(over),
            )
            for _, judge in sorted(self.later, key=lambda pair: pair[0]):
                judge()
            self.metrics = await client.metrics()
        finally:
            await client.close()

    def growth(self) -> dict[str, float]:
        """By how much each process has grown, in %: the last quarter's median against that of the second, of the worker
        since its last start."""
        found = {}
        last = self.memory[-1][2]
        for name, series in (
            ("http", [(t, size) for t, size, _, _ in self.memory]),
            ("worker", [(t, size) for t, _, process, size in self.memory if process == last]),
        ):
            quarter = max(1, len(series) // 4)
            early = sorted(size for _, size in series[quarter : 2 * quarter])
            late = sorted(size for _, size in series[-quarter:])
            found[name] = round(100 * (late[len(late) // 2] / early[len(early) // 2] - 1), 2)
        return found


CACHE = 24 * 16 * 3072
"""Bytes of keys and values: mini-1's for 384 tokens, so that prompts wait and what was read is forgotten."""
FLAT = 5.0
"""Percent that a process may have grown."""


def soak(
    seconds: float, out: Path, *, each: int = 3, names: int = 3, pictures: int = 2, askers: int = 8
) -> dict[str, Any]:
    """Do it; the report. ``faults`` in it is empty where all was well."""
    from tarsia.library import Library

    with tempfile.TemporaryDirectory(prefix="tarsia-soak-") as scratch:
        began = time.perf_counter()
        world = prepare(Path(scratch, "made"), each, pictures)
        library = Library.make(Path(scratch, "library"))
        called = [f"{kind}-{i}" for kind in KINDS for i in range(names)]
        before = Soak(world, library, "", 0, 0)
        for name in called:
            before.publish(name)
        size = max(content.folder.joinpath("adapter_model.safetensors").stat().st_size for content in world.contents)
        options = ["--precision", "float32", "--loading", "--adapter-bytes", str(6 * size), "--threads", "1"]
        options += ["--cache-bytes", str(CACHE)]
        prepared = time.perf_counter() - began
        with served(library.places.root, out / "soak.log", options) as (process, url):
            one = Soak(world, library, url, process.pid, seconds)
            one.next = before.next
            kills = [0.2 * seconds, 0.35 * seconds]
            asyncio.run(one.run(called, askers, kills))
        pairs = [
            (a.said[key], b.said[key])
            for i, a in enumerate(world.contents) for b in world.contents[:i] for key in a.said.keys() & b.said.keys()
        ]  # fmt: skip
        growth = one.growth()
        for name, percent in growth.items():
            if percent > FLAT and seconds >= 120:
                one.fault(f"{name} has grown by {percent} %")
        report = {
            "seconds": seconds,
            "prepared in": round(prepared, 1),
            "contents": len(world.contents),
            "names": len(called),
            "questions": len(world.base),
            "answers of two contents that differ, %": round(100 * sum(a != b for a, b in pairs) / len(pairs), 1),
            "counts": dict(one.counts),
            "answered by": dict(one.answered),
            "errors": dict(one.errors),
            "kills at": [round(kill, 1) for kill in one.kills],
            "answers again after, s": [round(back - kill, 1) for kill, back in one.back.items()],
            "grown by %": growth,
            "counted by the server": one.metrics,
            "faults": one.faults,
            "memory": [(t, a >> 10, process, b >> 10) for t, a, process, b in one.memory],
        }
    (out / "soak.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--askers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    if not 0 < args.minutes <= 60:
        parser.error("a soak takes at most an hour")
    args.out.mkdir(parents=True, exist_ok=True)
    report = soak(60 * args.minutes, args.out, askers=args.askers)
    print(json.dumps({key: value for key, value in report.items() if key != "memory"}, indent=1))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
