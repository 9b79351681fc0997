"""Requests of somebody who means harm, by the thousand, against a server whose every step outside is watched.

    PYTHONPATH=src:tests python -m serve.hostile --cases 5000

Half is made by hand (``hostile_requests``: adapters' names, another tenant's adapters, pictures, addresses, broken
JSON, framing, wrong types, loading), half by schemathesis from the server's own OpenAPI document. All with the key of
one tenant. None may be answered with 5xx, by an adapter that is not the tenant's, or with a word of others; meanwhile
the server's threads may open no file, list no folder, start no process, look up no name and connect to nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from serve.hostile_requests import KINDS, Sent
from serve.http_world import SECRETS, Running, keyring, running

from tarsia.serve.http import gate
from tarsia.serve.http.settings import Limits, Settings

STATUSES = frozenset({200, 400, 401, 403, 404, 405, 408, 413, 415, 421, 429})
"""All that may be answered."""
LIMITS = Limits(body=300_000, structure=20_000, picture=100_000, pixels=1_000_000, text=50_000, body_seconds=5.0)
SETTINGS = {"loading": True, "sources": ("/nowhere/allowed",), "limits": LIMITS}
_OUTSIDE = (
    *("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.chmod", "os.link", "os.symlink"),
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "sqlite3.connect"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "ctypes.dlopen"),
)


class Watch:
    """What other threads than those that are exempt do outside of the process, while it is armed."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.armed = False
        self.exempt: set[int] = set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if self.armed and event in _OUTSIDE and threading.get_ident() not in self.exempt:
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
    seconds: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.cases.items()))
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        head = f"{self.cases.total()} cases in {self.seconds:.0f} s ({kinds})\nanswers: {statuses}"
        wrong = [f"{count} x {' '.join(what.split())}" for what, count in Counter(self.wrong).most_common(20)]
        return "\n".join([head, f"wrong: {len(self.wrong)}", *wrong])


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


def run(cases: int, seed: int = 0, *, schema: bool = True) -> Report:
    """Ask that many times."""
    report = Report()
    begun = time.monotonic()
    with mock.patch.multiple(gate, _GRACE=0.2, _LINGER=0.2), running(Settings(keys=keyring(), **SETTINGS)) as server:
        warm = Report()
        by_hand(server, len(KINDS) * 3, seed + 1, warm)  # modules that are imported late are opened here
        share = cases // 2 if schema else 0
        with WATCH.over():
            by_hand(server, cases - share, seed, report)
            if schema:
                by_schema(server, share, seed, report)
        used = {command.adapter for command, _ in server.fake.asked}
        report.wrong += [f"asked the worker for {name}" for name in used if not _own(name)]
        report.wrong += [f"outside: {what}" for what in WATCH.seen]
        report.wrong += [f"left over: {what}" for what in server.fake.open]
        report.wrong += [f"loaded: {source}" for source in server.fake.loaded if not _loadable(source)]
        lines = server.log.getvalue().splitlines()
        report.wrong += [f"log: {line[:200]}" for line in lines if json.loads(line)["what"] != "request"]
    report.seconds = time.monotonic() - begun
    return report


def _loadable(source: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9._-]*([@#][a-z0-9._-]+)?|/nowhere/allowed(/.*)?", source) is not None


def _own(name: str | None) -> bool:
    return name in (None, "auto") or (name or "").startswith("acme-")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # uvicorn says of each broken frame that it is one
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    result = run(given_.cases, given_.seed)
    print(result)
    sys.exit(bool(result.wrong))
