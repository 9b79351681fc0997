"""Requests of somebody who means harm, by the thousand, against a server whose every step outside is watched.

    PYTHONPATH=src:tests python -m serve.hostile --cases 5000 [--real]

Half is made by hand (``hostile_requests``: adapters' names, another tenant's adapters, pictures, addresses, broken
JSON, framing, wrong types, loading), half by schemathesis from the server's own OpenAPI document. All with the key of
one tenant. None may be answered with 5xx, by an adapter that is not the tenant's, or with a word of others; meanwhile
the server's threads may open no file, list no folder, start no process, look up no name and connect to nobody.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import json
import logging
import os
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from serve.hostile_requests import KINDS, Sent
from serve.hostile_worker import EVENTS
from serve.http_world import ADAPTERS, SECRETS, Running, keyring, running

import tarsia
from tarsia.serve.http import gate
from tarsia.serve.http.settings import Limits, Settings

STATUSES = frozenset({200, 400, 401, 403, 404, 405, 408, 413, 415, 421, 429})
"""All that may be answered."""
LIMITS = Limits(
    body=300_000, structure=20_000, picture=100_000, pixels=1_000_000, text=50_000, tokens=16, body_seconds=5.0
)
SETTINGS = {"loading": True, "sources": ("/nowhere/allowed",), "limits": LIMITS}
_OWN_PROCESS = ("/proc/self/", f"/proc/{os.getpid()}/")
"""Where a process reads what it takes of memory."""


def _source(path: object) -> bool:
    """Whether this is code of our own that Python shows the lines of (FastAPI asks where a route's function stands)."""
    ours = (sys.prefix, sys.base_prefix, str(Path(tarsia.__file__).parent))
    return isinstance(path, str) and (path == "<unknown>" or (path.startswith(ours) and path.endswith(".py")))


class Watch:
    """What other threads than those that are exempt do outside of the process, while it is armed."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.armed = False
        self.exempt: set[int] = set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        asked = self.armed and event in EVENTS and threading.get_ident() not in self.exempt
        if asked and not (event == "open" and _source(args[0])):
            self.seen.append(f"{event} {args!r}"[:300])

    @contextlib.contextmanager
    def over(self) -> Iterator[Watch]:
        """Armed for as long as the block; the thread that asks is exempt."""
        self.seen, self.exempt, self.armed = [], {threading.get_ident()}, True
        try:
            yield self
        finally:
            self.armed = False


WATCH = Watch()
"""One for the process: a hook can not be taken out again."""


@dataclass
class Report:
    """What came of a run: cases by kind, answers by status, and everything that should not have been."""

    cases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    outside: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.cases.items()))
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        head = f"{self.cases.total()} cases in {self.seconds:.0f} s ({kinds})\nanswers: {statuses}"
        wrong = [f"{count} x {' '.join(what.split())}" for what, count in Counter(self.wrong).most_common(20)]
        outside = [f"the worker's own steps outside: {dict(self.outside.most_common(12))}"] if self.outside else []
        return "\n".join([head, *outside, f"wrong: {len(self.wrong)}", *wrong])


def answer(server: Running, sent: Sent) -> tuple[int, bytes]:
    """Status and the rest of what comes back for bytes; status 0 where nothing does."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(sent.raw)
            if sent.half:
                link.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := link.recv(65536):
                said += piece
    said = said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")  # no answer: the client may go on
    first = said.split(b"\r\n", 1)[0].split(b" ")
    return (int(first[1]) if len(first) > 1 and first[0].startswith(b"HTTP/") else 0), said


def check(server: Running, sent: Sent, status: int, said: bytes, report: Report) -> None:
    """Note what should not have been answered."""
    report.cases[sent.kind] += 1
    report.statuses[status] += 1
    body = said.partition(b"\r\n\r\n")[2]
    wrong = []
    if status not in STATUSES and not (status == 0 and sent.silent):
        wrong.append(f"status {status}")
    if b"rival" in body.replace(sent.said, b"") or b"Traceback" in said or SECRETS["rival"].encode() in said:
        wrong.append("a word of others")
    if said.count(b"HTTP/1.1 ") > 1 and sent.kind == "framing":
        wrong.append("a second answer")
    headless = sent.raw.startswith(b"HEAD ")
    if (
        status >= 400
        and not headless
        and b"application/json" in said
        and set(_error(body)) != {"message", "type", "param", "code"}
    ):
        wrong.append("no error object")
    if wrong:
        report.wrong.append(f"{sent.kind}: {', '.join(wrong)}: {sent.raw[:200]!r} -> {said[:200]!r}")


def _error(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def by_hand(server: Running, cases: int, seed: int, report: Report) -> None:
    """As many cases, each kind in its turn."""
    draw = random.Random(seed)
    kinds = [*KINDS.items()]
    for i in range(cases):
        kind, make = kinds[i % len(kinds)]
        sent = make(draw, SECRETS["acme"])
        sent.kind = kind
        check(server, sent, *answer(server, sent), report)


def by_schema(server: Running, cases: int, seed: int, report: Report) -> None:
    """As many cases of schemathesis: what the document says, and what it does not allow."""
    import httpx
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import Unsatisfiable
    from schemathesis import Case, GenerationMode, openapi
    from schemathesis.checks import CHECKS
    from schemathesis.core.failures import FailureGroup

    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    schema = openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    checks = CHECKS.get_by_names([*names, "response_headers_conformance"])  # they are known once there is a document
    weights = {op.label: 6 if op.method == "post" else 1 for op in operations}

    def judged(label: str, kind: str, key: str) -> Callable[[Case], None]:
        headers = {"authorization": f"Bearer {SECRETS[key]}", "connection": "close"}

        def judge(case: Case) -> None:
            report.cases[kind] += 1
            try:
                said = case.call(base_url=server.url, headers=headers, timeout=20)
            except (ValueError, UnicodeError):  # what its own client can not send
                report.statuses[0] += 1
                return
            report.statuses[said.status_code] += 1
            try:
                case.validate_response(said, checks=checks)
            except FailureGroup as failures:
                report.wrong.extend(f"{label}: {failure}"[:600] for failure in failures.exceptions)

        return judge

    for op, mode in itertools.product(operations, GenerationMode):
        number = -(-cases * weights[op.label] // (2 * sum(weights.values())))
        how = settings(
            max_examples=number, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        with contextlib.suppress(Unsatisfiable):  # nothing of an operation without parameters can be wrong
            judge = judged(op.label, f"schemathesis {mode.value}", "root" if "lora" in op.label else "acme")
            seeded(seed)(how(given(case=op.as_strategy(generation_mode=mode))(judge)))()


def run(cases: int, seed: int = 0, *, schema: bool = True, service: Any = None) -> Report:
    """Ask that many times, of a worker that is made up where ``service`` is None."""
    report = Report()
    begun = time.monotonic()
    settings = Settings(keys=keyring(), **SETTINGS)
    with mock.patch.multiple(gate, _GRACE=0.2, _LINGER=0.2), running(settings, service) as server:
        by_hand(server, len(KINDS) * 3, seed + 1, Report())  # modules that are imported late are opened here
        share = cases // 2 if schema else 0
        with WATCH.over():
            if schema:
                by_schema(server, share, seed, report)
            by_hand(server, cases - report.cases.total(), seed, report)  # schemathesis may have had less to try
        used = {command.adapter for command, _ in server.fake.asked}
        report.wrong += [f"asked the worker for {name}" for name in used if not _own(name)]
        report.wrong += [f"outside: {what}" for what in WATCH.seen]
        report.wrong += [f"left over: {what}" for what in server.fake.open]
        report.wrong += [f"loaded: {source}" for source in server.fake.loaded if not _loadable(source)]
        lines = server.log.getvalue().splitlines()
        report.wrong += [f"log: {line[:200]}" for line in lines if json.loads(line)["what"] != "request"]
    report.seconds = time.monotonic() - begun
    return report


def real(cases: int, seed: int, folder: Path) -> Report:
    """The same of a real worker with a real base and a library, whose process is watched as well."""
    from tarsia.serve.supervise import Supervisor
    from tarsia.serve.wire import Configure, Ready

    library, seen = shelved(folder), folder / "seen"
    seen.touch()
    at: list[int] = []  # how much was seen until the worker was ready, at every start

    def notice(event: object) -> None:
        if isinstance(event, Ready):
            at.append(seen.stat().st_size)

    configure = Configure(model="mini-1", library=str(library), dtype="float32", device="cpu", threads=1)
    command = (sys.executable, "-P", str(Path(__file__).with_name("hostile_worker.py")), str(seen))
    supervisor = Supervisor(configure, notice=notice, command=command)
    report = run(cases, seed, service=supervisor)
    report.wrong += [f"the worker was lost {supervisor.restarts} times"] * (supervisor.restarts > 0)
    inside = [sys.prefix, sys.base_prefix, str(Path(tarsia.__file__).parent), str(library)]
    for line in seen.read_bytes()[at[0] :].decode().splitlines():
        event, _, told = line.partition(" ")
        path = ast.literal_eval(told)[0]
        if told == "(None,)":  # ctypes opens the process itself
            continue
        path = path.decode() if isinstance(path, bytes) else path
        report.outside[f"{event} {path}" if not str(path).startswith(sys.prefix) else f"{event} (Python)"] += 1
        if not isinstance(path, str) or not path.removeprefix("file://").startswith((*inside, *_OWN_PROCESS)):
            report.wrong.append(f"worker: {line[:300]}")
    return report


def shelved(folder: Path) -> Path:
    """A library with an adapter under each name that the made-up worker knows."""
    from tarsia.adapter import open_base, save
    from tarsia.core.attach import Part
    from tarsia.core.method import find
    from tarsia.library import Library
    from tarsia.serve.load.drawn import Drawer, Make
    from tarsia.serve.load.inside import Text, shown

    host = open_base("mini-1", dtype="float32", device="cpu")
    written, pictures = shown(host, Text("What is shown?", 0))
    drawer = Drawer(host, host.processor(text=[written], images=pictures, return_tensors="pt"))
    library = Library.make(folder / "library")
    for number, name in enumerate(ADAPTERS):
        parts = (Part("lora", "language.*.{q,v}; vision.*.{q,v}", find("lora").configure({"rank": 4})),)
        save(drawer.draw(Make(parts, 0.2), number), folder / name)
        library.publish(folder / name, name)
    return library.places.root


def _loadable(source: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9._-]*([@#][a-z0-9._-]+)?|/nowhere/allowed(/.*)?", source) is not None


def _own(name: str | None) -> bool:
    return name in (None, "auto") or (name or "").startswith("acme-")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # uvicorn says of each broken frame that it is one
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="a real worker: mini-1 and a library of three adapters")
    given_ = parser.parse_args()
    if given_.real:
        with tempfile.TemporaryDirectory(prefix="tarsia-hostile-") as scratch:
            result = real(given_.cases, given_.seed, Path(scratch))
    else:
        result = run(given_.cases, given_.seed)
    print(result)
    sys.exit(bool(result.wrong))
