"""Teach the embedded model a new job, with and without replay, and show what it learnt and what it kept."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "the main job in a few minutes"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia demo``."""
    parser.add_argument("--out", metavar="FOLDER", default="demo-out", help="what it writes to (default: demo-out)")


def run(args: argparse.Namespace) -> int:
    """Run the demo on the embedded model."""
    from rich.console import Console

    from tarsia.cli import output
    from tarsia.labs import demo

    output.no_bars()
    demo.run(Path(args.out), Console())
    return 0
