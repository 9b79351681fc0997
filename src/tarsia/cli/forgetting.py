"""Measure what an adapter cost: the base before and after, on the task and on what it knew; with a gate and a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tarsia.cli import adapted, gate, rows

if TYPE_CHECKING:
    from rich.table import Table

    from tarsia.adapter import Host
    from tarsia.evaluate import ForgettingReport

HELP = "measure what an adapter cost"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia forgetting``."""
    adapted.options(parser)
    parser.add_argument(
        "--task", metavar="[NAME=]SOURCE", action="append", default=[],
        help=f"rows of what was learnt: {rows.KINDS}; may be given again",
    )  # fmt: skip
    rows.general_option(parser)
    gate.options(parser)
    parser.add_argument("--page", metavar="FILE.html", type=Path, help="write a page, and its picture beside it")
    parser.add_argument(
        "--stages", choices=("stacked", "alone"),
        help="the adapters learnt one task each, in the order of --task: measure every task after every stage, "
        "where a stage is all adapters so far (stacked) or one by itself (alone)",
    )  # fmt: skip
    parser.add_argument("--metric", default="exact", help="exact (default), contains, numeric[:TOLERANCE] or fields")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows of each source")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="rows at a time (default: 16)")
    parser.add_argument("--json", action="store_true", help="a JSON object for the report, and one for the gate")


def run(args: argparse.Namespace) -> int:
    """Print what was measured; 1 where the gate is not passed."""
    from tarsia.core.errors import ConfigError
    from tarsia.evaluate import Asking, find, forgetting
    from tarsia.evaluate.page import write_page

    for option in ("limit", "max_new_tokens", "batch"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError("This must be at least 1.", given=f"--{option.replace('_', '-')} {value}")
    if not args.adapter:
        raise ConfigError("Forgotten by what? No adapter is given.", do="add --adapter FOLDER")
    if args.compose is not None and args.stages is not None:
        raise ConfigError("Stages are of adapters one by one.", given="--compose, --stages", do="leave one of them out")
    find(args.metric)
    gated = gate.wanted(args)
    task = dict(rows.named(args.task, args.limit, "--task"))
    general = rows.general(args.general, args.model, args.limit)
    host = adapted.opened(args)
    asking = Asking(args.metric, args.max_new_tokens, args.batch)
    report = forgetting(
        host, task, general, asking=asking, stages=_stages(host, adapted.named(args.adapter), args.stages)
    )
    if not report.moved:
        print("tarsia: warning: the adapter changes nothing on the general rows", file=sys.stderr)
    verdict = gate.judge(args, report.before, report.after, report.general) if gated else None
    if args.page is not None:
        write_page(report, verdict, {**task, **general}, args.page)
    if args.json:
        print(report.json_text(), flush=True)
    else:
        _print(report)
        if args.page is not None:
            print(f"page: {args.page}")
    return 0 if verdict is None else gate.show(verdict, as_json=args.json)


def _stages(host: Host, names: Sequence[str], kind: str | None) -> list[tuple[str, ...]]:
    """The adapters that act in each stage; ``names`` are all in the order in which they were learnt, which their
    sites do not tell. Where they stand alone, only the last acts from now on."""
    from tarsia.core.attach import activate

    if kind is None:
        return []
    if kind == "stacked":
        return [tuple(names[: i + 1]) for i in range(len(names))]
    activate(host.model, names[-1])
    return [(name,) for name in names]


def _print(report: ForgettingReport) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(report.comparison.table())
    console.print(_general(report))
    lost = report.lost
    print(f"lost on the mean of the general sources: {lost.mean:.1f} points [{lost.low:.1f}, {lost.high:.1f}]")
    for name, rate in (("should", report.refusals.wanted), ("should not", report.refusals.unwanted)):
        if rate is not None:
            before, after = rate.before.mean, rate.after.mean
            print(f"refused of {rate.rows} rows that {name} be: {before:.1%} -> {after:.1%}")
    for s in report.tone:
        if s.changed:
            print(f"tone: {s.trait} ({s.definition}): {s.before:.3g} -> {s.after:.3g} {s.unit}, p {s.p:.2g}")
    if report.transfer is not None:
        t = report.transfer
        numbers = {"ACC": t.accuracy, "BWT": t.backward, "forgetting": t.forgetting, "FWT": t.forward}
        print(", ".join(f"{name} {100 * value:.1f}" for name, value in numbers.items() if value is not None))


def _general(report: ForgettingReport) -> Table:
    """What else changed on each general source."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("source", "KL on references", "KL on its own answers", "same next token", "in the task's words")
    for column in columns:
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    for name in report.general:
        apart = {d.forced: d for d in report.divergence if d.source == name}
        cells = [f"{d.kl.mean:.4f}" for d in apart.values()] + ["-"] * (2 - len(apart))
        agreed = f"{list(apart.values())[-1].agreement.mean:.1%}"
        leak = None if report.vocabulary is None else report.vocabulary.by_source[name]
        table.add_row(name, *cells, agreed, "-" if leak is None else f"{leak[0]:.1%} -> {leak[1]:.1%}")
    return table
