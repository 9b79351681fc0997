"""Measure how well a model answers the rows of its sources: freely, and choosing among the answers."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from tarsia.cli import adapted, gate, output, rows

if TYPE_CHECKING:
    from rich.table import Table

    from tarsia.adapter import Host
    from tarsia.data import Rows
    from tarsia.evaluate import Report

HELP = "measure answers, with bootstrap intervals"
PROBED = 8  # rows of a source on which an adapter must show an effect


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia eval``."""
    adapted.options(parser)
    parser.add_argument(
        "--data", metavar="[NAME=]SOURCE", action="append", required=True,
        help=f"{rows.KINDS}; may be given again",
    )  # fmt: skip
    parser.add_argument("--metric", default="exact", help="exact (default), contains, numeric[:TOLERANCE] or fields")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows of each source")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="rows at a time (default: 16)")
    parser.add_argument("--before", action="store_true", help="measure the base without adapters too, and compare")
    gate.options(parser)
    parser.add_argument("--json", action="store_true", help="a JSON object a report, and one for the comparison")


def run(args: argparse.Namespace) -> int:
    """Print the report, or both and what changed."""
    from tarsia.core.attach import activate
    from tarsia.core.errors import ConfigError
    from tarsia.evaluate import active, compare, find

    for option in ("limit", "max_new_tokens", "batch"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError("This must be at least 1.", given=f"--{option.replace('_', '-')} {value}")
    if args.before and not args.adapter:
        raise ConfigError("Before what? No adapter is given.", given="--before", do="add --adapter FOLDER")
    gated = gate.wanted(args)
    if gated and not args.before:
        raise ConfigError("What is lost is told by comparing with the base.", do="add --before")
    find(args.metric)
    sources = rows.named(args.data, args.limit, "--data")
    host = adapted.opened(args)
    names = active(host)
    for members in sources.values() if names else ():
        adapted.warn_without_effect(host, members[:PROBED])
    before = None
    if args.before:
        activate(host.model)
        before = _measured(host, sources, args)
        activate(host.model, *names)
    after = _measured(host, sources, args)
    if before is not None:
        comparison = compare(before, after)
        _show(comparison.model_dump_json(), comparison.table(), as_json=args.json)
    if before is None or not gated:
        return 0
    return gate.show(gate.judge(args, before, after, tuple(sources)), as_json=args.json)


def _measured(host: Host, sources: dict[str, Rows], args: argparse.Namespace) -> Report:
    from tarsia.evaluate import evaluate

    report = evaluate(host, sources, metric=args.metric, max_new_tokens=args.max_new_tokens, batch=args.batch)
    _show(report.json_text(), report.table(), as_json=args.json)
    return report


def _show(text: str, table: Table, *, as_json: bool) -> None:
    if as_json:
        output.line(json.loads(text))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
