"""What a lint says: findings, each with a code, the rows it speaks of, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

NAMED = 8
"""How many rows a finding names; it counts all of them."""


class Severity(StrEnum):
    """How bad a finding is: an error would spoil or stop the training, a warning may, a note is for reading."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Where(NamedTuple):
    """A row: its source's name and its number from 0."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


def brief(text: str, most: int = 40) -> str:
    """A text in quotes, shortened to ``most`` characters."""
    return repr(text if len(text) <= most else f"{text[: most - 3]}...")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a rule found. ``rows`` are the first ``NAMED`` of ``count``; ``do`` suggests a fix.

    ``like`` is empty, or for each of ``rows`` the row that it is like.
    """

    code: str
    severity: Severity
    what: str
    do: str
    source: str | None = None
    rows: tuple[Where, ...] = ()
    count: int = 0
    like: tuple[Where, ...] = ()

    def plain(self) -> Mapping[str, Any]:
        """The finding as JSON values."""
        return {
            "code": self.code,
            "severity": self.severity.value,
            "source": self.source,
            "what": self.what,
            "count": self.count,
            "rows": [list(row) for row in self.rows],
            "like": [list(row) for row in self.like],
            "do": self.do,
        }

    @property
    def named(self) -> str:
        """The rows as people read them: "cells:3, cells:9 and 5 more"."""
        text = ", ".join(map(str, self.rows))
        more = self.count - len(self.rows)
        return f"{text} and {more:,} more" if more > 0 else text
