"""What can be told of a picture before a model sees it."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from tarsia.core.errors import DataError
from tarsia.data.lint import near
from tarsia.data.samples import Picture

_SAMPLED: Final = 64  # a picture is judged flat on so many pixels a side
FLAT: Final = 0.995
"""Share of pixels of one colour from which on a picture is called empty."""
_SAME: Final = 8  # levels of 255 that count as the same colour


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself before it is decoded: zeros and "" where it can not even be opened."""

    width: int = 0
    height: int = 0
    mode: str = ""
    frames: int = 1
    transparent: bool = False
    bomb: bool = False
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """A picture's facts. ``refusal`` is why it can not be used ("a.png is missing"); then the rest is empty.

    ``content`` is a digest of size and decoded pixels, ``phash`` and ``thumbnail`` as in ``near``, ``flat`` the
    share 0..1 of pixels that have the commonest colour.
    """

    header: Header
    refusal: str = ""
    width: int = 0
    height: int = 0
    content: bytes = b""
    phash: int = 0
    thumbnail: bytes = b""
    flat: float = 0.0

    @property
    def empty(self) -> bool:
        """Whether there is almost nothing but one colour."""
        return self.flat >= FLAT


def key(picture: Picture) -> object:
    """What two pictures share that need to be looked at only once."""
    if isinstance(picture.content, bytes):
        return hashlib.blake2b(picture.content, digest_size=16).digest()
    if isinstance(picture.content, Path):
        return picture.content
    return object()  # like no other: the id of a picture in memory is given to another one once it is gone


def look(picture: Picture, resolution: int | None = None) -> tuple[Look, Image.Image | DataError]:
    """Look at a picture as it is at this resolution; the second is its decoded pixels, or why there are none."""
    header = _header(picture)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on a file; what matters of them is in the header
            shown = picture.load(resolution)
    except DataError as error:
        why = error.what.removeprefix(f"A picture of row {picture.row} of {picture.source} ").removesuffix(".")
        return Look(header, f"{picture.name} {why}"), error
    digest = hashlib.blake2b(f"{shown.width}x{shown.height}".encode(), digest_size=16)
    digest.update(shown.tobytes())
    return Look(
        header,
        "",
        shown.width,
        shown.height,
        digest.digest(),
        near.phash(shown),
        near.thumbnail(shown).tobytes(),
        flatness(shown),
    ), shown


def _header(picture: Picture) -> Header:
    content = picture.content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(content, Image.Image):
                return _told(content)
            with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as opened:
                return _told(opened)
    except FileNotFoundError:
        return Header(missing=True)
    except Image.DecompressionBombError:
        return Header(bomb=True)
    except (OSError, ValueError, SyntaxError, EOFError):
        return Header()  # look() says why, in the words of Picture.load


def _told(opened: Image.Image) -> Header:
    alpha = opened.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in opened.info
    bomb = opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or float("inf"))
    frames = int(getattr(opened, "n_frames", 1))
    return Header(opened.width, opened.height, opened.mode, frames, alpha and not bomb and _hides(opened), bomb)


def _hides(opened: Image.Image) -> bool:
    """Whether any pixel is see-through: its colour shows only once the alpha channel is dropped."""
    low, _ = opened.convert("RGBA").getchannel("A").getextrema()
    return isinstance(low, int | float) and low < 128


def flatness(picture: Image.Image) -> float:
    """Share 0..1 of pixels within 8 levels of the median colour, on at most 64 x 64 of them."""
    size = min(picture.width, _SAMPLED), min(picture.height, _SAMPLED)
    pixels = np.asarray(picture.resize(size, Image.Resampling.NEAREST), dtype=np.int16).reshape(-1, 3)
    return float((np.abs(pixels - np.median(pixels, axis=0)) <= _SAME).all(axis=1).mean())
