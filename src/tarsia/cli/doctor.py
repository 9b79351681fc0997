"""Say what this machine can do, and what to do where it can not. Exits with 1 where something fails."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from tarsia.cli import output

HELP = "what this machine can do"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia doctor``."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")


def run(args: argparse.Namespace) -> int:
    """Print every finding as it comes; 1 where one fails."""
    from tarsia.cli import machine

    failed = False
    for finding in machine.examine():
        failed |= finding.state is machine.State.FAIL
        if args.json:
            output.line(asdict(finding))
        else:
            print(f"{finding.state:6}{finding.name:17}{finding.text}", flush=True)
            if finding.do:
                print(f"{'':23}to do: {finding.do}")
    return int(failed)
