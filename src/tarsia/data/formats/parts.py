"""Texts and pictures as rows spell them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from tarsia.data.formats.registry import Place, Row, shown
from tarsia.data.samples import PICTURE, Message, Picture, Placeholder

# A marker takes one newline with it: "<image>\nWhat is this?" and "What is this?\n<image>" are how the
# field spells a picture beside a text, and chat templates put their own separator there.
_MARKER: Final = re.compile(r"<image>\n|\n<image>\Z|<image>")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def read_text(value: object, name: str, place: Place) -> str:
    """``value`` if it is a text that can be encoded. Raises DataError."""
    if not isinstance(value, str):
        raise place.error(f"{name} is not a text.", given=shown(value), allowed="a string")
    if _SURROGATE.search(value):
        raise place.error(f"{name} holds half of a character.", given=shown(value), do="write it in whole UTF-8")
    return value


def read_list(value: object, name: str, place: Place) -> Sequence[object]:
    """``value`` if it is a list. Raises DataError."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise place.error(f"{name} is not a list.", given=shown(value))
    return value


def split_markers(text: str) -> tuple[str | Placeholder, ...]:
    """The text's parts, a PICTURE where it says <image>."""
    parts: list[str | Placeholder] = []
    for i, piece in enumerate(_MARKER.split(text)):
        parts += [PICTURE] if i else []
        parts += [piece] if piece else []
    return tuple(parts)


def pictures_first(messages: Sequence[Message], count: int) -> tuple[Message, ...]:
    """The messages with ``count`` pictures put before what the user says first."""
    at = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if at is None or not count:
        return tuple(messages)
    first = Message("user", (*(PICTURE for _ in range(count)), *messages[at].parts), name=messages[at].name)
    return (*messages[:at], first, *messages[at + 1 :])


def read_pictures(row: Row, place: Place) -> tuple[Picture, ...]:
    """The pictures of the columns ``images`` or ``image``; either may hold one or a list. Raises DataError."""
    if "image" in row and "images" in row:
        raise place.error("both `image` and `images` are given.", allowed="one of the two")
    if "images" in row:
        values = read_list(row["images"], "`images`", place) if row["images"] else ()
    else:
        value = row.get("image", ())
        values = value if isinstance(value, list | tuple) else (value,)
    return tuple(read_picture(value, place) for value in values)


def read_picture(value: object, place: Place) -> Picture:
    """One picture: a path, a data URL, {bytes, path}, bytes or a PIL picture. Raises DataError."""
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
            given=shown(value),
            allowed="a path, a data URL, {bytes, path}, or a PIL picture",
        )
    if value.startswith("data:"):
        return Picture(_data_url(value, place), value[:40] + "...", place.source, place.row)
    if value.startswith("file://"):
        value = unquote_to_bytes(urlsplit(value).path).decode(errors="replace")
    if "://" in value:
        raise place.error("pictures are not downloaded.", given=value, do="download it, and give its path")
    if place.folder is None and not Path(value).is_absolute():
        raise place.error(
            "a picture is named by its path, and rows of the hub have no folder that it could start from.",
            given=value,
            do="download the data set with its pictures, and give the path of its file or folder",
        )
    path = (place.folder or Path()) / value
    return Picture(path, str(path), place.source, place.row)


def _data_url(url: str, place: Place) -> bytes:
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise place.error(f"a data URL is broken ({error}).", given=url[:40] + "...") from None
