"""Fold an adapter into a new copy of its base, and prove that it says the same; plain Transformers loads the result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarsia.cli import output
from tarsia.cli.export import named as base_named
from tarsia.cli.export import where
from tarsia.cli.rows import KINDS, named
from tarsia.cli.shelved import FORMS

if TYPE_CHECKING:
    from tarsia.data import Sample
    from tarsia.merge.fold import Folded

HELP = "make an adapter part of its base"
ROWS = 8
"""Rows of each source that the fold is proved on, at most."""


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia fold``."""
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        nargs="+",
        help=f"a folder, that of a run, {FORMS}; of several each is folded over those before it",
    )
    parser.add_argument("--base", metavar="MODEL", help="the base (default: the one that the first adapter names)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="where to write it: not there yet")
    parser.add_argument(
        "--onto",
        choices=("dequantised", "original"),
        help="of an adapter that was trained over 4 bits: the numbers that they stand for, or the 16-bit files' own",
    )
    parser.add_argument(
        "--over",
        choices=("nf4", "fp4", "int4"),
        help="what an adapter was trained over that does not say it (PEFT's QLoRA): 4 bits of all linear layers in the "
        "blocks, scales nested; without it, the files' own numbers",
    )
    parser.add_argument(
        "--requantise",
        choices=("nf4", "fp4", "int4"),
        help="round the result to 4 bits again; refused where that takes the change away",
    )
    parser.add_argument(
        "--rows",
        metavar="[NAME=]SOURCE",
        action="append",
        default=[],
        help=f"rows to prove it on beside the adapter's own probe, {ROWS} of each source at most: {KINDS}",
    )
    parser.add_argument(
        "--keep", metavar="SHARE", type=float, default=0.9, help="least share of the change to be left (default: 0.9)"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="what the proof computes in (default: the probe's)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object: the record that lies in the folder")


def run(args: argparse.Namespace) -> int:
    """Write the folded base, and print what was proved."""
    from tarsia.adapter import FourBits
    from tarsia.core.errors import ConfigError
    from tarsia.merge.fold import fold
    from tarsia.merge.live import Bar

    output.no_bars()
    if not 0 <= args.keep <= 1:
        raise ConfigError(
            "A share is between 0 and 1.", given=f"--keep {args.keep}", do="write --keep 0.9, or leave it out"
        )
    folders = [where(given) for given in args.adapter]
    folded = fold(
        base_named(folders[0], args.base),
        folders,
        args.out,
        onto=args.onto,
        over=None if args.over is None else FourBits(args.over),
        requantise=None if args.requantise is None else FourBits(args.requantise),
        bar=Bar(_rows(args), args.keep, args.precision),
        show=lambda line: print(f"tarsia: {line}", file=sys.stderr),
    )
    if args.json:
        output.line({**folded.record, "out": str(folded.out)})
    else:
        _show(folded)
    return 0


def _rows(args: argparse.Namespace) -> tuple[Sample, ...]:
    found = named(args.rows, ROWS, "--rows")
    return tuple(row for rows in found.values() for row in list(rows)[:ROWS])


def _show(folded: Folded) -> None:
    proof, remains = folded.proof, folded.record["remains"]
    seen = "pictures among them" if proof.pictures else "no picture among them"
    print(
        f"{folded.out}: {remains['share']:.2%} of the change is there, which is {remains['size']:.2e} of the weights' "
        "own size (|d|/|W|, Frobenius); "
        f"rounding adds {remains['stray']:.2g} times as much beside it\n"
        f"proved on {proof.rows} rows, {seen}, {proof.positions} positions, in {proof.precision}: "
        f"a logit differs by at most {proof.difference:.3g} of {proof.peak:.3g} (allowed {proof.allowed:.3g}; "
        f"the adapter moves it by {proof.moved:.3g}), and {proof.agreement:.2%} have the same likeliest token"
    )
    lines = _least(remains["by_parameter"])
    if lines:
        output.table("least is left of", ("parameter", "left", "|d|/|W|"), lines, right=("left", "|d|/|W|"))


def _least(parts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The parameters of whose change less than 99 % is left, the least first."""
    short = sorted((one["share"], name, one["size"]) for name, one in parts.items() if one["share"] is not None)
    return [(name, f"{share:.2%}", f"{size:.2e}") for share, name, size in short[:5] if share < 0.99]
