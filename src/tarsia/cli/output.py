"""What a command prints: lines of JSON for machines, tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence


def line(values: Mapping[str, object]) -> None:
    """One JSON object on one line of stdout, at once."""
    print(json.dumps(values, ensure_ascii=False, allow_nan=False), flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> None:
    """A table on stdout. The columns named in ``right`` are set flush right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    numbers = set(right)
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    # Into a pipe or a file the table is as wide as it needs to be.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(title, style="bold", markup=False)
    console.print(drawn)


def no_bars() -> None:
    """Let Transformers load models without drawing bars of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
