"""Pictures of strangers: their header is read here and nothing of them is decoded; the worker decodes."""

from __future__ import annotations

import binascii
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from PIL import Image

from tarsia.serve.http.errors import Refusal, shown
from tarsia.serve.http.settings import Limits

MEDIA: Final = {"image/png": "PNG", "image/jpeg": "JPEG", "image/jpg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
"""Media types that are taken, and what PIL calls them."""
_MAGIC: Final = re.compile(
    rb"(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<JPEG>\xff\xd8\xff)|(?P<GIF>GIF8[79]a)|(?P<WEBP>RIFF.{4}WEBP)", re.DOTALL
)
"""How files begin: by this alone the worker's decoder tells them apart, and they are looked at here."""

_ALLOWED: Final = "image/png, image/jpeg, image/webp, image/gif"
_DATA: Final = re.compile(r"data:(?P<media>[a-z0-9.+/-]{1,64});base64,", re.IGNORECASE)
_SIDE: Final = 65_535
"""Longest side: beyond it processors cut, whatever the area."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture as it came, and how many pixels it says that it has."""

    raw: bytes
    pixels: int


def of_data(url: str, limits: Limits, where: str) -> Seen:
    """The picture in a data URL. Raises Refusal (400)."""
    head = _DATA.match(url[:100])
    if head is None:
        raise Refusal.invalid(
            "This is no data URL of a picture.", where, given=shown(url[:40]), allowed="data:image/png;base64,..."
        )
    if (len(url) - head.end()) * 3 // 4 > limits.picture + 2:
        raise Refusal.invalid("The picture has too many bytes.", where, allowed=limits.picture)
    try:
        raw = binascii.a2b_base64(url[head.end() :], strict_mode=True)
    except (binascii.Error, ValueError):  # ValueError: letters that are not ASCII
        raise Refusal.invalid("The data URL is not base64, letter by letter.", where) from None
    return checked(raw, head["media"].lower(), limits, where)


def checked(raw: bytes, media: str, limits: Limits, where: str) -> Seen:
    """A picture with its pixels, by its header.

    ``media`` has to be a picture's that is taken; which of them the file is its bytes say, as clients often do not.
    Raises Refusal (400) for what is none, and for what is too large.
    """
    if media not in MEDIA:
        raise Refusal.invalid("Pictures of this type are not taken.", where, given=shown(media), allowed=_ALLOWED)
    if len(raw) > limits.picture:
        raise Refusal.invalid("The picture has too many bytes.", where, given=len(raw), allowed=limits.picture)
    begun = _MAGIC.match(raw)
    if begun is None:
        raise Refusal.invalid("This is no picture.", where, given=media, allowed=_ALLOWED, do="send a picture's file")
    kind = str(begun.lastgroup)
    try:
        width, height, frames = _HEADERS[kind](raw)
    except Image.DecompressionBombError:
        raise Refusal.invalid("The picture has too many pixels.", where, allowed=f"{limits.pixels} in all") from None
    except Exception as error:  # noqa: BLE001 (PIL raises anything for a broken file: SyntaxError, struct.error, ...)
        given = f"{kind}: {type(error).__name__}"
        raise Refusal.invalid("The picture is damaged.", where, given=given, do="send another file") from None
    if not (0 < width <= _SIDE and 0 < height <= _SIDE) or width * height > limits.pixels:
        raise Refusal.invalid(
            "The picture has too many pixels.", where, given=f"{width} x {height}", allowed=f"{limits.pixels} in all"
        )
    if max(width, height) > limits.stretch * min(width, height):
        allowed = f"one side at most {limits.stretch:g} times the other"
        raise Refusal.invalid("The picture is too narrow.", where, given=f"{width} x {height}", allowed=allowed)
    if frames != 1:
        raise Refusal.invalid("The picture moves.", where, allowed="a picture with one frame")
    return Seen(raw, width * height)


def _by_pil(name: str) -> Callable[[bytes], tuple[int, int, int]]:
    def header(raw: bytes) -> tuple[int, int, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the pixels are counted above
            with Image.open(io.BytesIO(raw), formats=(name,)) as picture:
                moving = name != "JPEG" and bool(getattr(picture, "is_animated", False))
                return *picture.size, 2 if moving else 1

    return header


def _webp(raw: bytes) -> tuple[int, int, int]:
    """By hand: PIL sets aside the whole canvas before it says how large it is (RFC 9649, 2.5 to 2.7)."""
    if raw[:4] != b"RIFF" or raw[8:12] != b"WEBP" or len(raw) < 25:
        raise ValueError
    kind, data = raw[12:16], raw[20:30]
    if kind == b"VP8X":
        size = [1 + int.from_bytes(data[at : at + 3], "little") for at in (4, 7)]
        return size[0], size[1], 2 if data[0] & 2 else 1
    if kind == b"VP8L" and data[0] == 0x2F:
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), 1
    if kind == b"VP8 " and data[3:6] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        return width, height, 1
    raise ValueError


_HEADERS: Final = {"PNG": _by_pil("PNG"), "JPEG": _by_pil("JPEG"), "GIF": _by_pil("GIF"), "WEBP": _webp}
