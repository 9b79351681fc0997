"""Row formats by name, and how a row's columns tell which one it is of."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tarsia.core.errors import DataError
from tarsia.data.samples import Sample

Row = Mapping[str, object]
_HARMLESS: Final = frozenset({"id"})
# What others carry beside pictures. Empty lists are everywhere; anything in them can not be trained on.
_UNSEEN: Final = ("video", "videos", "audio", "audios")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: its source's name, its number from 0, and the folder that paths start from
    (None: rows of the hub have none).

    ``columnar``: its table gives every row all columns and fields, null where a row has none.
    """

    source: str
    row: int
    folder: Path | None
    columnar: bool = False

    def error(self, what: str, *, given: object = None, allowed: object = None, do: str | None = None) -> DataError:
        """A DataError that begins with the row and its source."""
        return DataError(f"Row {self.row} of {self.source}: {what}", given=given, allowed=allowed, do=do)


Reader = Callable[[Row, Place], Sample]


@dataclass(frozen=True, slots=True)
class Format:
    """A row format: the columns that it must and may have, and its reader."""

    required: frozenset[str]
    optional: frozenset[str]
    read: Reader


FORMATS: dict[str, Format] = {}


def row_format(name: str, required: Sequence[str], optional: Sequence[str] = ()) -> Callable[[Reader], Reader]:
    """Register a reader under ``name`` for rows with the ``required`` columns."""

    def register(reader: Reader) -> Reader:
        FORMATS[name] = Format(frozenset(required), frozenset(optional), reader)
        return reader

    return register


def read_row(row: Row, place: Place) -> Sample:
    """Read one row in the format that its columns tell; columns that are null count as absent.

    Raises DataError where no format, or more than one, has these columns, or the row is malformed.
    """
    row = {str(key): value for key, value in row.items() if value is not None}
    for name in _UNSEEN:
        if row.pop(name, None):
            raise place.error(
                f"it has {name}, and only pictures can be learnt from.",
                given=name,
                do=f"take the row out, or name {name} in the source's `ignore` if its text stands without",
            )
    columns = frozenset(row) - _HARMLESS
    found = [f for f in FORMATS.values() if f.required <= columns]
    fitting = [f for f in found if columns <= f.required | f.optional]
    if len(fitting) == 1:
        return fitting[0].read(row, place)
    understood = "; ".join(
        f"{name}: {', '.join(sorted(f.required))} [{', '.join(sorted(f.optional))}]" for name, f in FORMATS.items()
    )
    if found:
        extra = columns.difference(*(f.required | f.optional for f in found))
        what = f"columns that no format understands: {', '.join(sorted(extra or columns))}."
        do = "name what may be left aside in the source's `ignore`, or correct the spelling"
    else:
        what = "its columns are of no known format."
        do = "map them with the source's `columns`, as in {question: instruction, answer: output}"
    raise place.error(what, given=", ".join(sorted(row)) or "no columns", allowed=understood, do=do)


def shown(value: object) -> str:
    """A value of any size and depth in few words, for errors."""
    return f"{type(value).__name__} {_SHORT.repr(value)}"


def _short() -> reprlib.Repr:
    made = reprlib.Repr()
    made.maxlevel, made.maxdict, made.maxlist, made.maxtuple, made.maxstring, made.maxother = 3, 4, 4, 4, 60, 60
    return made


_SHORT: Final = _short()
