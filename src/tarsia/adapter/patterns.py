"""Regular expressions from files: only those whose search ends soon.

Python's engine tries one way after another: for ``(a+)+`` on n letters up to 2^n of them, for k unbounded repeats in
a row up to n^k. Nothing stops it once it runs, so an expression is judged before.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from typing import Any, Final

LONGEST: Final = 20_000
"""Characters of a pattern; the longest that are in use name each module and have a few thousand."""

REPEATS: Final = 6
"""Repeats in a row; generated patterns in use have four: ``.*?(?:...).*?(?:...).*?(?:...).*?``."""

WAYS: Final = 100_000
"""Ways through alternatives and optional parts in a row."""

_parser: Any = importlib.import_module("re._parser")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def fault(pattern: str, frame: str = "%s") -> str | None:
    """Why a pattern is not used, alone or where ``%s`` stands in ``frame``; None where it is.

    It is too long, no regular expression, or one whose search may take for ever.
    """
    if len(pattern) > LONGEST:
        return f"{len(pattern)} characters, and no pattern has more than {LONGEST}"
    try:
        re.compile(pattern)
        re.compile(frame.replace("%s", pattern))
        repeats, ways = _work(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        return str(error)
    if repeats > REPEATS:
        return f"{repeats} repeats in a row, and no pattern needs over {REPEATS}"
    return None if ways <= WAYS else "too many alternatives in a row"


def _work(parsed: Iterable[tuple[Any, Any]]) -> tuple[int, int]:
    """Repeats that follow one another, and ways besides. Raises ValueError for a choice within a repeat."""
    repeats, ways = 0, 1
    for code, value in parsed:
        inner = [_work(part) for part in _within(str(code), value)]
        deep, wide = max((r for r, _ in inner), default=0), sum(w for _, w in inner) or 1
        if str(code) in _REPEATS:
            least, most = int(value[0]), int(value[1])
            if most > 1 and (deep or wide > 1):
                raise ValueError("a repeat of repeats or of alternatives may take for ever")
            deep += most > 1 and least != most
            wide += most == 1 and least == 0
        repeats, ways = repeats + deep, ways * wide
    return repeats, ways


def _within(code: str, value: Any) -> list[Any]:
    """The patterns that an element is made of."""
    if code in _REPEATS:
        return [value[2]]
    match code:
        case "BRANCH":
            return list(value[1])
        case "SUBPATTERN":
            return [value[3]]
        case "ASSERT" | "ASSERT_NOT":
            return [value[1]]
        case "ATOMIC_GROUP":
            return [value]
        case "GROUPREF_EXISTS":
            return [part for part in value[1:] if part is not None]
    return []
