"""Make one adapter of several, by a way of the field's or the plain sum, and prove that it is what its files say.

Before, it is told what the adapters would take from each other; after, what is left of each one's task where its rows
are given. Arithmetic is exact or refused: weights below 0 take away, and one adapter at weight 1 is that adapter.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarsia.cli import adapted, output, rows
from tarsia.cli.shelved import FORMS

if TYPE_CHECKING:
    from tarsia.cli.merging import Job, Outcome

HELP = "make one adapter of several"
WHICH = """Which one?
  the adapters share no site, or are to be added as they are    task_arithmetic
  each was saved with a probe (training does)                   regmean, of which most is left in the lab
  no probes, but validation rows                                wudi_both or tsv, with --tune
  one is to be unlearnt                                         task_arithmetic and a weight below 0"""
"""What --list ends with."""
SHOWN = 8
"""Sites whose errors are told of by name, the largest first."""


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia merge``."""
    parser.add_argument("adapters", metavar="ADAPTER", nargs="*", help=f"adapters' folders, those of runs, {FORMS}")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write it: not there yet")
    parser.add_argument("--list", action="store_true", help="print the ways to merge, with their sources")
    parser.add_argument("--recipe", metavar="FILE.yaml", type=Path, help="these options from a file; those given win")
    parser.add_argument("--method", metavar="WAY", help="see --list (default: linear, the weighted mean)")
    # argparse takes -1,0.5 for an option; a number is one, and so are several
    parser._negative_number_matcher = re.compile(r"^-\d*\.?\d+(e[+-]?\d+)?(,.*)?$", re.IGNORECASE)
    parser.add_argument("--weights", metavar="W,W", help="one number an adapter (default: 1 each)")
    parser.add_argument("--scale", type=float, metavar="S", help="what the result is multiplied with (default: 1)")
    parser.add_argument("--density", type=float, metavar="D", help="share of the numbers that ways with a trim keep")
    parser.add_argument(
        "--option", metavar="NAME=VALUE", action="append", default=[],
        help="another option of the way; may be given again",
    )  # fmt: skip
    parser.add_argument("--rank", type=int, metavar="R", help="re-factor the result to this rank, the error told")
    parser.add_argument(
        "--component", metavar="NAME=NUMBER", action="append", default=[],
        help="a factor for vision, projector or language; may be given again",
    )  # fmt: skip
    parser.add_argument("--base", metavar="MODEL", help="the base (default: the one that the adapters name)")
    adapted.resolution_option(parser)
    parser.add_argument("--report", metavar="FILE.html", type=Path, help="write a page, and its picture beside it")
    parser.add_argument(
        "--rows", metavar="[NAME=]SOURCE", action="append", default=[],
        help=f"a parent's task, by its folder's name: measured with the base, the parent and the result; {rows.KINDS}",
    )  # fmt: skip
    parser.add_argument(
        "--tune", metavar="[NAME=]SOURCE", action="append", default=[],
        help="validation rows: the scale is the best of --grid on their mean; may be given again",
    )  # fmt: skip
    parser.add_argument("--grid", metavar="S,S", help="the scales that --tune tries (default: 0.2 to 1.5)")
    parser.add_argument(
        "--min-kept", type=float, metavar="SHARE",
        help="exit with 1 where a task has less than this share of what its parent alone has right",
    )  # fmt: skip
    parser.add_argument("--metric", default="exact", help="exact (default), contains, numeric[:TOLERANCE] or fields")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows of each source")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="rows at a time (default: 16)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")


def run(args: argparse.Namespace) -> int:
    """Merge, prove and measure; 1 where --min-kept is not reached."""
    if args.list:
        return _list(as_json=args.json)
    from tarsia.cli import merging

    output.no_bars()
    job = merging.prepared(args)
    outcome = merging.done(job)
    if args.report is not None:
        merging.write_report(job, outcome, args.report)
    if args.json:
        output.line(merging.values(job, outcome))
    else:
        _show(job, outcome)
        if args.report is not None:
            print(f"page: {args.report}")
    return merging.judged(job, outcome)


def _list(*, as_json: bool) -> int:
    from tarsia.merge.ways import WAYS

    if as_json:
        output.line({name: _way(way) for name, way in WAYS.items()})
        return 0
    lines = []
    for name, way in WAYS.items():
        chosen = ", ".join(f"{key} {value}" for key, value in way.options.items()) or "-"
        lines.append([name, way.sparsify, way.align, way.combine, chosen, way.source])
    output.table("Ways to merge", ("way", "sparsify", "align", "combine", "options", "source"), lines)
    print(WHICH)
    return 0


def _counted(number: int, what: str, many: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else many}"


def _way(way: Any) -> dict[str, Any]:
    axes = {"sparsify": way.sparsify, "align": way.align, "combine": way.combine}
    return {**axes, "options": dict(way.options), "source": way.source}


def _show(job: Job, outcome: Outcome) -> None:
    report = outcome.interference
    if report is not None:
        print(
            f"if they were summed, {report.whole.conflict:.1%} of what they change would be lost to signs "
            f"({report.whole.entries:.1%} of the numbers that they share are pulled both ways)"
        )
        lines = [
            [
                f"{p.first} and {p.second}", str(p.sites), f"{p.conflict:.1%}", f"{p.cosine:+.3f}",
                *("-" if v is None else f"{v:.3f}" for v in (p.rows, p.rows_chance)),
            ]
            for p in report.whole.pairs
        ]  # fmt: skip
        columns = ("pair", "shared sites", "lost", "cosine", "overlap read", "chance")
        output.table("Interference", columns, lines, right=columns[1:])
    coverage = [[name, str(n), *map(str, by)] for name, (n, by) in outcome.coverage.items()]
    output.table("Coverage: patched sites", ("component", "merged", *job.names), coverage, right=("merged", *job.names))
    if outcome.tried:
        lines = [[f"{scale:g}", f"{share:.1%}", f"{loss:.3f}"] for scale, share, loss in outcome.tried]
        title = f"Scales on the validation rows; {outcome.scale:g} is taken"
        output.table(title, ("scale", "right", "loss"), lines, right=("right", "loss"))
    if off := outcome.off:
        lines = [[path, f"{error:.3g}"] for path, error in off[:SHOWN]]
        output.table(
            f"Re-factored with an error: {_counted(len(off), 'site')}", ("site", "error"), lines, right=("error",)
        )
        if len(off) > SHOWN:
            print(
                f"and {len(off) - SHOWN} more with an error of at most {off[SHOWN][1]:.3g} (all in --report and --json)"
            )
    if outcome.tasks:
        lines = [list(task.cells) for task in outcome.tasks]
        columns = ("task", "rows", "base", "its parent", "merged", "kept")
        output.table("Tasks: free answers right", columns, lines, right=columns[1:])
    print(
        f"{job.out}: {job.way.name} of {_counted(len(job.names), 'adapter')} at scale {outcome.scale:g}, "
        f"{_counted(len(outcome.merged.adapter.patches), 'patch', 'es')}; {outcome.proof}"
    )
