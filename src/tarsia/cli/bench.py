"""Measure: put a running server on this machine under a load that ends by itself, and write a report about it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarsia.serve.load import KEY

if TYPE_CHECKING:
    from tarsia.serve.load.asked import Mix
    from tarsia.serve.load.drive import Limits, Wrong
    from tarsia.serve.load.report import Told

HELP = "load a running server, and report what it did"
CODES = (
    "Exit code: 0 where something was answered and nothing was lost (429, too much at once, is no loss), 1 where an "
    "answer was lost or is another when it is asked again alone, 2 where it could not be done or not be written."
)


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia bench``."""
    verbs = parser.add_subparsers(metavar="WHAT", required=True)
    sub = verbs.add_parser("serve", help=HELP, description=f"{__doc__} An API key is read from {KEY}.", epilog=CODES)
    add = sub.add_argument
    add("--url", metavar="URL", default="http://127.0.0.1:8000", help="the server (default: http://127.0.0.1:8000)")
    add("--adapters", metavar="N", type=int, help="the first N that the server lists (default: all)")
    add("--model", metavar="NAME", action="append", default=[], help="ask this one, adapter or base; again: more")
    add("--zipf", metavar="S", type=float, default=1.1, help="the n-th is asked n^-S as often (default: 1.1)")
    add("--pictures", metavar="N", type=int, default=16, help="different pictures (default: 16; 0: none)")
    add("--pictured", metavar="SHARE", type=float, default=1.0, help="of the questions show one (default: 1)")
    add("--prompts", metavar="N", type=int, default=16, help="different prompts (default: 16)")
    add("--prompt-tokens", metavar="N", type=int, default=24, help="about how long they are (default: 24)")
    add("--max-tokens", metavar="N", type=int, default=32, help="longest answer (default: 32)")
    pace = sub.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", metavar="N", type=int, default=8, help="so many ask in turn (default: 8)")
    pace.add_argument("--rate", metavar="R", type=float, help="so many requests a second instead, answered or not")
    add("--requests", metavar="N", type=int, default=200, help="at most so many (default: 200)")
    add("--seconds", metavar="S", type=float, default=60.0, help="at most so long (default: 60)")
    add("--seed", metavar="N", type=int, default=0, help="of all that is drawn (default: 0)")
    add("--check", action="store_true", help="ask each question again alone, and compare the answers")
    add("--out", metavar="FILE.html", type=Path, help="write a report")
    add("--json", action="store_true", help="a JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Load the server; the code is one of CODES."""
    import asyncio

    from tarsia.core.errors import ConfigError
    from tarsia.serve.load import client, report
    from tarsia.serve.load.drive import Limits

    for option, least in (("adapters", 1), ("pictures", 0), ("prompts", 1), ("prompt_tokens", 1), ("zipf", 0)):
        value = getattr(args, option)
        if value is not None and not value >= least:
            given = f"--{option.replace('_', '-')} {value}"
            raise ConfigError("This is too small.", given=given, allowed=f"at least {least}")
    if not 0 <= args.pictured <= 1:
        raise ConfigError("A share is from 0 to 1.", given=f"--pictured {args.pictured}")
    client.local(args.url)
    if args.out is not None:
        report.writable(args.out)
    limits = Limits(args.requests, args.seconds, args.concurrency, args.rate, args.max_tokens)
    told = asyncio.run(_loaded(args, limits))
    _say(args, told)
    if args.out is not None:
        report.write(report.page(told), args.out)
    return 0 if told.found.passed else 1


async def _loaded(args: argparse.Namespace, limits: Limits) -> Told:
    from datetime import UTC, datetime

    from tarsia.serve.load.client import Client
    from tarsia.serve.load.drive import Drive, check
    from tarsia.serve.load.figures import figures
    from tarsia.serve.load.report import Told

    # an answer may take as long as the whole load; what takes longer is given up
    client = Client(
        args.url,
        max_tokens=limits.max_tokens,
        seconds=limits.seconds + limits.grace,
        connections=limits.at_once,
        key=os.environ.get(KEY) or None,
    )
    show = _shown(args)
    try:
        mix = _mix(args, await client.models())
        before, when = await client.metrics(), datetime.now(UTC).isoformat(timespec="seconds")
        answered = await Drive(client, mix.questions(), limits).run(lambda n, m: show(f"{n} answered, {m} under way"))
        after = await client.metrics()
        checked: int | None = None
        wrong: list[Wrong] = []
        if args.check:
            checked, wrong = await check(client, answered, limits, lambda n, m: show(f"checked {n} of {m}"))
    finally:
        show("")
        await client.close()
    grown = {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if name.partition(" ")[0].endswith(("_total", "_count"))
    }
    server = {name: value for name, value in sorted(grown.items()) if value}
    return Told(args.url, when, mix, limits, figures(answered, checked, wrong), answered, server)


def _mix(args: argparse.Namespace, listed: Sequence[Mapping[str, Any]]) -> Mix:
    """Whom to ask. Raises ConfigError for what is not there."""
    from tarsia.core.errors import ConfigError
    from tarsia.serve.load.asked import Mix

    names = [str(model["id"]) for model in listed]
    adapters = [str(model["id"]) for model in listed if model.get("parent")]
    unknown = sorted(set(args.model) - set(names))
    if unknown:
        raise ConfigError("The server has no such model.", given=unknown[0], allowed=", ".join(names[:8]))
    if args.adapters is not None and args.adapters > len(adapters):
        raise ConfigError("The server has not so many adapters.", given=args.adapters, allowed=len(adapters))
    if not names:
        raise ConfigError("The server lists nothing to ask.", given=args.url)
    models = tuple(args.model or (adapters or names)[: args.adapters])
    return Mix(models, args.zipf, args.pictures, args.pictured, args.prompts, args.prompt_tokens, args.seed)


def _shown(args: argparse.Namespace) -> Any:
    if args.json or not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _say(args: argparse.Namespace, told: Told) -> None:
    from tarsia.cli import output
    from tarsia.serve.load import report

    found = told.found
    if args.json:
        output.line(report.summary(told))
        return
    print(
        f"{found.answered} of {found.asked} answered in {found.seconds:.1f} s: {found.tokens_a_second:.1f} tokens and "
        f"{found.requests_a_second:.2f} answers a second, {len(found.adapters)} adapters"
    )
    rows = [
        (name, *report.cells(spread))
        for name, spread in (
            ("to the first text", found.first), ("a further token", found.each), ("to the end", found.whole),
        )
    ]  # fmt: skip
    columns = ("ms", "median", "90 %", "99 %", "longest")
    output.table("", columns, rows, columns[1:])
    for kind, many in found.errors.items():
        what = "refused, which counts as no failure" if kind.startswith("429") else "failed"
        print(f"{what}: {many} x {kind}: {found.told[kind]}")
    if found.checked is not None:
        print(f"asked again alone: {found.checked} questions, {len(found.wrong)} answers differ")
    for one in found.wrong[:5]:
        alone = one.alone.error or one.alone.text
        print(f"  {one.under_load.question.model}: {one.under_load.text!r} under load, {alone!r} alone")
