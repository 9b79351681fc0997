"""Write a base with its weights in 4 bits, as Transformers opens it with bitsandbytes (INT4: as Tarsia alone does)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tarsia.cli import output

HELP = "write a base in 4 bits"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia quantise``."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or mini-1, in 16 or 32 bits")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="where to write it: not there yet")
    parser.add_argument("--kind", choices=("nf4", "fp4", "int4"), default="nf4", help="the 16 levels (default: nf4)")
    parser.add_argument("--no-nested", action="store_true", help="keep the scale of each 64 weights in float32")
    parser.add_argument(
        "--select", metavar="SELECTION", help="which weights (default: linear layers in language and vision blocks)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")


def run(args: argparse.Namespace) -> int:
    """Write it, and print what is in 4 bits, what each weight takes and how far it is from the base's."""
    from tarsia.adapter import FourBits
    from tarsia.adapter.export import quantise
    from tarsia.cli import rounded

    output.no_bars()
    form = FourBits(args.kind, not args.no_nested, args.select)
    written = quantise(args.model, args.out, form, lambda line: print(f"tarsia: {line}", file=sys.stderr))
    sizes = {"bits_in_file": written.bits, "bytes": written.whole, "bytes_of_source": written.source}
    if args.json:
        output.line({**written.report, **sizes, "out": str(args.out)})
        return 0
    rounded.show(written.report)
    held = float(written.report["bits"])
    print(
        f"{args.out}: {written.whole:,} bytes, {written.whole / written.source:.1%} of {args.model}; "
        f"with each weight's tables and state {written.bits:.4f} bits a parameter, {written.bits - held:.4f} more"
    )
    return 0
