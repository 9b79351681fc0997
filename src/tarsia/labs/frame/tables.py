"""Measured values as Markdown: rows of named columns, of which a part can be shown alone."""

from __future__ import annotations

from collections.abc import Mapping

Cell = float | int | str
Rows = Mapping[str, Mapping[str, Cell]]
"""Values by row, then by column. A row of a part is named "PART: NAME"."""


def cell(value: Cell, digits: int = 4) -> str:
    """A value as it is shown: ``digits`` of a float, all of anything else."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def part_of(rows: Rows, part: str) -> Rows:
    """The rows whose names begin with ``PART:``, without it. Raises KeyError where there is none."""
    found = {name.removeprefix(f"{part}: "): row for name, row in rows.items() if name.startswith(f"{part}: ")}
    if not found:
        raise KeyError(part)
    return found


def markdown(rows: Rows, corner: str = "") -> str:
    """A table with the rows' names on the left under ``corner``, and a newline at its end."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = f"| {corner} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}\n".replace("|  |", "| |")
    return head + "".join(
        f"| {name} | {' | '.join(cell(row.get(column, '')) for column in columns)} |\n" for name, row in rows.items()
    )
