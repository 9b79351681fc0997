"""How the rows of a table become conversations: one reader for each format, found by its columns."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

from PIL import Image

from tarsia.core.errors import DataError
from tarsia.data.samples import PICTURE, Message, Picture, Placeholder, Sample

Row = Mapping[str, object]
# A marker takes one newline with it: "<image>\nWhat is this?" and "What is this?\n<image>" are how the
# field spells a picture beside a text, and chat templates put their own separator there.
_MARKER: Final = re.compile(r"<image>\n|\n<image>\Z|<image>")
_HARMLESS: Final = frozenset({"id"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: its source's name, its number from 0, and the folder that paths start from."""

    source: str
    row: int
    folder: Path

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
    row = {key: value for key, value in row.items() if value is not None}
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
        do = "map them with the source's `columns`, as in {question: prompt, answer: completion}"
    raise place.error(what, given=", ".join(sorted(row)) or "no columns", allowed=understood, do=do)


@row_format("messages", required=("messages",), optional=("image", "images"))
def _messages(row: Row, place: Place) -> Sample:
    turns = row["messages"]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise place.error("`messages` is not a list.", given=type(turns).__name__)
    messages = tuple(_message(turn, place) for turn in turns)
    return Sample(messages, _pictures(row, place), place.source, place.row)


@row_format("question and answer", required=("question", "answer"), optional=("image", "images"))
def _question(row: Row, place: Place) -> Sample:
    pictures = _pictures(row, place)
    question, answer = (_text(row[key], f"`{key}`", place) for key in ("question", "answer"))
    parts = _markers(question)
    if PICTURE not in parts:
        parts = (*(PICTURE for _ in pictures), *parts)
    messages = (Message("user", parts), Message("assistant", (answer,)))
    return Sample(messages, pictures, place.source, place.row)


def _text(value: object, name: str, place: Place) -> str:
    if not isinstance(value, str):
        raise place.error(f"{name} is not a text.", given=f"{type(value).__name__} {value!r:.40}", allowed="a string")
    return value


def _markers(text: str) -> tuple[str | Placeholder, ...]:
    parts: list[str | Placeholder] = []
    for i, piece in enumerate(_MARKER.split(text)):
        parts += [PICTURE] if i else []
        parts += [piece] if piece else []
    return tuple(parts)


def _message(turn: object, place: Place) -> Message:
    if not isinstance(turn, Mapping):
        raise place.error("a message is not an object.", given=type(turn).__name__, allowed='{"role", "content"}')
    turn = {key: value for key, value in turn.items() if value is not None}
    if set(turn) != {"role", "content"}:
        raise place.error(
            "a message has other keys than a role and a content.",
            given=", ".join(sorted(map(str, turn))),
            allowed="role, content",
        )
    role, content = _text(turn["role"], "a message's role", place), turn["content"]
    if isinstance(content, str):
        # What an assistant says is text to the letter: only the others can show a picture.
        return Message(role, (content,) if role == "assistant" else _markers(content))
    if not isinstance(content, Sequence):
        raise place.error("a message's content is neither a text nor a list.", given=type(content).__name__)
    return Message(role, tuple(_part(part, place) for part in content))


def _part(part: object, place: Place) -> str | Placeholder:
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else part
    if given == {"type": "image"}:
        return PICTURE
    if isinstance(given, dict) and set(given) == {"type", "text"} and given["type"] == "text":
        return _text(given["text"], "a part's text", place)
    raise place.error(
        "a part of a message is not understood.",
        given=f"{given!r:.80}",
        allowed='{"type": "image"} (its file goes into `images`) or {"type": "text", "text": ...}',
    )


def _pictures(row: Row, place: Place) -> tuple[Picture, ...]:
    if "image" in row and "images" in row:
        raise place.error("both `image` and `images` are given.", allowed="one of the two")
    values = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise place.error("`images` is not a list.", given=type(values).__name__, do="use `image` for one picture")
    return tuple(_picture(value, place) for value in values)


def _picture(value: object, place: Place) -> Picture:
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value, name = (path, None) if content is None else (content, path)
    else:
        name = None
    if isinstance(value, Image.Image | bytes):
        return Picture(value, str(name or f"{type(value).__name__} in the row"), place.source, place.row)
    if not isinstance(value, str) or not value:
        raise place.error(
            "a picture is not understood.",
            given=f"{value!r:.60}",
            allowed="a path, a data URL, {bytes, path}, or a PIL picture",
        )
    if value.startswith("data:"):
        return Picture(_data_url(value, place), value[:40] + "...", place.source, place.row)
    if "://" in value:
        raise place.error("pictures are not downloaded.", given=value, do="download it, and give its path")
    path = place.folder / value
    return Picture(path, str(path), place.source, place.row)


def _data_url(url: str, place: Place) -> bytes:
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise place.error(f"a data URL is broken ({error}).", given=url[:40] + "...") from None
