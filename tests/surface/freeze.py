"""The public surface as text. ``PYTHONPATH=src:tests python tests/surface/freeze.py`` writes it anew.

A change of these files in a commit is a change of what users may rely on: it belongs in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from surface import source

NAMES = Path(__file__).with_name("names.txt")
COMMANDS = Path(__file__).with_name("commands.txt")


def names() -> str:
    """A line for each package: its name and its __all__."""
    packages = ["tarsia", *(f"tarsia.{folder}" for folder in source.folders(source.PACKAGE))]
    lines = []
    for name in packages:
        public = getattr(importlib.import_module(name), "__all__", [])
        lines.append(f"{name}: {' '.join(sorted(public))}".rstrip())
    return "\n".join(lines) + "\n"


def commands() -> str:
    """A line for each verb: its arguments and options."""
    from tarsia.cli.parser import parser

    lines = []
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines += [
                f"{name}: {' '.join(map(_spell, sub._actions[1:]))}".rstrip() for name, sub in action.choices.items()
            ]
    return "\n".join(lines) + "\n"


def _spell(action: argparse.Action) -> str:
    """One argument: MODEL, [KEY=VALUE]*, --json, --data=SOURCE+ (! where it must be given)."""
    value = str(action.metavar or action.dest.upper())
    many = action.nargs if action.nargs in ("*", "+", "?") else ""
    choices = f"({'|'.join(map(str, action.choices))})" if action.choices else ""
    if not action.option_strings:
        return f"{value}{many}{choices}"
    name = ",".join(action.option_strings)
    return f"{name}{'!' if action.required else ''}" + ("" if action.nargs == 0 else f"={value}{many}{choices}")


if __name__ == "__main__":
    NAMES.write_text(names(), encoding="utf8")
    COMMANDS.write_text(commands(), encoding="utf8")
