"""Fill README.md and docs/ from bench/results: ``python -m bench.render``.

The text between ``<!-- result: CASE -->`` and ``<!-- end -->`` is the last line of that case's results
as a table. ``<!-- result: CASE PART -->`` shows the rows alone whose names begin with ``PART:``. No number is
typed by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.run import RESULTS
from tarsia.labs.frame.tables import Rows, markdown, part_of

ROOT = RESULTS.parents[1]
BLOCK = re.compile(r"(<!-- result: (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(line: dict[str, Any], part: str | None = None) -> str:
    """One line of results as Markdown: its values, then where they come from. Raises KeyError for an unknown part."""
    values: Rows = line["values"]
    shown = markdown(values if part is None else part_of(values, part))
    where = f"{line['processor']}, {line['cores']} cores, torch {line['versions']['torch']}"
    where += "".join(f", {name} {digest[:12]}" for name, digest in line.get("base", {}).items())
    return f"{shown}\n<sub>bench/results/{line['case']}.jsonl: {line['at'][:10]}, {line['commit']}, {where}</sub>\n"


def render(text: str, results: Path = RESULTS) -> str:
    """``text`` with every block filled. Raises FileNotFoundError where a case has no results."""

    def fill(match: re.Match[str]) -> str:
        lines = (results / f"{match[2]}.jsonl").read_text(encoding="utf8").splitlines()
        return match[1] + table(json.loads(lines[-1]), match[3]) + match[4]

    return BLOCK.sub(fill, text)


def pages() -> list[Path]:
    """Every document that may hold results."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(render(page.read_text(encoding="utf8")), encoding="utf8")
