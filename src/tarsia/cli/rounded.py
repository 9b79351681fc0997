"""What of a base is in 4 bits, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tarsia.cli import output

COLUMNS = ("component", "role", "weights", "parameters", "bits each", "error", "not in 4 bits, as it is")


def show(report: Mapping[str, Any]) -> None:
    """Print the report of ``tarsia.adapter.Quantisation``: bits from the bytes, errors as they were measured."""
    form = f"{report['kind']}, scales {'nested' if report['nested'] else 'in float32'}"
    title = f"in 4 bits ({form}): {report['parameters']:,} parameters, {report['share']:.2%} of the base"
    if report["bits"] is not None:
        title += f", {report['bits']:.4f} bits each"
    if report["error"] is not None:
        title += f", {report['error']:.2%} off"
    lines = [
        (
            line["component"],
            line["role"],
            str(line["weights"]),
            f"{line['parameters']:,}",
            "" if line["bits"] is None else f"{line['bits']:.4f}",
            "" if line["error"] is None else f"{line['error']:.2%}",
            line["kept"] or "",
        )
        for line in report["roles"]
    ]
    output.table(title, COLUMNS, lines, right=("weights", "parameters", "bits each", "error"))
