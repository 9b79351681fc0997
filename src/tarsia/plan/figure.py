"""A figure of memory: lines that add up, what a text prints of them, and whether that holds. 1 GB = 10^9 bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

GIGA: Final = 10**9
TOTAL: Final = "in all"


class Relation(StrEnum):
    """How a text's number stands to ours."""

    IS = "="
    UNDER = "<="
    OVER = ">"


class Verdict(StrEnum):
    """Whether what a text prints follows from what it assumes."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNSAID = "no text says"


@dataclass(frozen=True, slots=True)
class Line:
    """One summand: what is held, the formula in words and numbers, bytes (below 0: what is given up)."""

    what: str
    formula: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Said:
    """A number that a text prints, in GB with ``decimals``: of the lines ``of`` together, or of all of them."""

    gigabytes: float
    relation: Relation = Relation.IS
    of: tuple[str, ...] = (TOTAL,)
    decimals: int = 0

    def holds(self, held: int) -> bool:
        """Whether ``held`` bytes are what was said: to the digits that were printed, or on the right side of it."""
        ours = held / GIGA
        if self.relation is Relation.IS:
            return abs(ours - self.gigabytes) <= 0.5 * 10.0**-self.decimals
        return ours <= self.gigabytes if self.relation is Relation.UNDER else ours > self.gigabytes

    def __str__(self) -> str:
        sign = "" if self.relation is Relation.IS else f"{self.relation} "
        return f"{sign}{self.gigabytes:.{self.decimals}f} GB"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: what a text says, from what, the formula, the lines that add up, and what has to be said with it."""

    name: str
    text: str
    assumed: Mapping[str, str]
    formula: str
    lines: tuple[Line, ...]
    said: tuple[Said, ...] = ()
    note: str = ""
    source: str = "the texts"

    @property
    def bytes(self) -> int:
        """All lines together."""
        return sum(line.bytes for line in self.lines)

    @property
    def gigabytes(self) -> float:
        """In units of 10^9 bytes."""
        return self.bytes / GIGA

    def of(self, said: Said) -> int:
        """Bytes of what ``said`` speaks of. Raises KeyError where it names a line that is not there."""
        if said.of == (TOTAL,):
            return self.bytes
        held = {line.what: line.bytes for line in self.lines}
        return sum(held[what] for what in said.of)

    @property
    def verdict(self) -> Verdict:
        """FAILS if one printed number does; UNSAID where none is printed."""
        if not self.said:
            return Verdict.UNSAID
        return Verdict.HOLDS if all(said.holds(self.of(said)) for said in self.said) else Verdict.FAILS

    @property
    def printed(self) -> str:
        """What the text prints, in words."""
        return ", ".join(str(s) if s.of == (TOTAL,) else f"{' + '.join(s.of)} {s}" for s in self.said)
