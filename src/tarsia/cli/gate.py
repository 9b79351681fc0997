"""The gate on forgetting, as the verbs that can fail by it declare, read and show it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tarsia.cli import output

if TYPE_CHECKING:
    from tarsia.evaluate import Report, Verdict
    from tarsia.evaluate.gate import Judged


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the limits."""
    parser.add_argument(
        "--max-forgetting", type=float, metavar="POINTS",
        help="exit with 1 where the mean of the general sources loses more points of free answers",
    )  # fmt: skip
    parser.add_argument(
        "--max-forgetting-each", type=float, metavar="POINTS", help="the same for every general source by itself"
    )
    parser.add_argument(
        "--judged-by", choices=("estimate", "upper"),
        help="what is held against the limits: what was measured (default), or the upper bound of its interval",
    )  # fmt: skip


def wanted(args: argparse.Namespace) -> bool:
    """Whether there is a limit. Raises ConfigError for one that is no number of points, or a way to judge none."""
    from tarsia.core.errors import ConfigError

    limits = {"--max-forgetting": args.max_forgetting, "--max-forgetting-each": args.max_forgetting_each}
    for option, limit in limits.items():
        if limit is not None and not 0 <= limit <= 100:
            raise ConfigError("That is no limit of points.", given=f"{option} {limit:g}", allowed="0 to 100")
    limited = any(limit is not None for limit in limits.values())
    if args.judged_by and not limited:
        raise ConfigError(
            "There is no limit to judge by.", given=f"--judged-by {args.judged_by}", do="add --max-forgetting POINTS"
        )
    return limited


def judged(args: argparse.Namespace) -> Judged:
    """What is held against the limits."""
    return "upper" if args.judged_by == "upper" else "estimate"


def judge(args: argparse.Namespace, before: Report, after: Report, general: tuple[str, ...]) -> Verdict:
    """Hold both reports against the limits that were given."""
    from tarsia.evaluate import gate

    return gate(before, after, general, args.max_forgetting, each=args.max_forgetting_each, judged=judged(args))


def show(verdict: Verdict, *, as_json: bool, quiet: bool = False) -> int:
    """Print the verdict; the exit code: 0 where it is passed, else 1. A gate that is not passed is never silent."""
    if as_json:
        output.line({"event": "gate", **verdict.model_dump(mode="json")})
    elif not quiet:
        print(verdict.sentence())
        if verdict.passed and verdict.judged == "estimate" and _unsure(verdict):
            print("To pass only where the rows can tell, add --judged-by upper.")
    if not verdict.passed and (quiet or as_json):
        print(f"tarsia: {verdict.sentence()}", file=sys.stderr)
    return 0 if verdict.passed else 1


def _unsure(verdict: Verdict) -> bool:
    """Whether a limit lies within its interval."""
    every = (verdict.mean, *verdict.each)
    return any(x.points.low <= x.allowed < x.points.high for x in every if x.allowed is not None)
