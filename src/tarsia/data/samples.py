"""A conversation with its pictures, as every format is read into it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from tarsia.core.errors import DataError

ROLES: Final = ("system", "user", "assistant", "tool")
# Modes with more than 8 bits a channel: convert("RGB") clips them to white without a word.
_DEEP: Final = ("I", "F")
UNDECODED: Final = (OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, zlib.error)
"""What PIL's decoders raise for broken files; SyntaxError for a PNG."""


class Placeholder(Enum):
    """Where a picture stands among the parts of a message."""

    PICTURE = "picture"


PICTURE: Final = Placeholder.PICTURE


@dataclass(frozen=True, slots=True)
class Call:
    """An assistant's call of a tool: ``arguments`` is the text of a JSON object, ``id`` may be empty."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: ``role`` is one of ROLES; ``parts`` are texts and ``PICTURE`` in their order.

    ``calls`` and ``thought`` (what is reasoned before the answer) are an assistant's. ``answers`` is the
    id of the call that a tool answers, ``name`` the tool's. ``learnt``: whether labels may cover the turn.
    """

    role: str
    parts: tuple[str | Placeholder, ...]
    calls: tuple[Call, ...] = ()
    thought: str = ""
    answers: str = ""
    name: str = ""
    learnt: bool = True

    @property
    def text(self) -> str:
        """The turn's texts, joined, without its pictures."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def n_pictures(self) -> int:
        """How many pictures stand in the turn."""
        return sum(part is PICTURE for part in self.parts)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is decoded only when it is wanted.

    ``content`` is a file's path, an encoded file's bytes, or a picture in memory; ``name`` is what
    errors call it; ``source`` and ``row`` say which row owns it.
    """

    content: Path | bytes | Image.Image = field(repr=False)
    name: str
    source: str
    row: int

    def load(self, resolution: int | None = None) -> Image.Image:
        """Decode to 8-bit RGB, turned upright by its EXIF orientation, on white where it is transparent.

        One whose longer side has more than ``resolution`` pixels is shrunk to that. Raises DataError, naming row
        and file, where the file is missing, unreadable, cut off, of zero size, larger than PIL's limit for
        decompression bombs, or deeper than 8 bits a channel.
        """
        with self._named():
            picture = self._open()
            self._check(picture)
            return _shrunk(_on_white(ImageOps.exif_transpose(picture)).convert("RGB"), resolution)

    def sides(self, resolution: int | None = None) -> tuple[int, int]:
        """Pixels along the longer and the shorter side of what ``load`` gives; nothing is decoded for it.

        Raises DataError as ``load`` does, but for what only decoding shows.
        """
        with self._named():
            picture = self._open()
            try:
                self._check(picture)
                width, height = _within(picture.size, resolution)
            finally:
                if picture is not self.content:  # a file whose pixels are not read stays open
                    picture.close()
            return max(width, height), min(width, height)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What is wrong with the picture is said of its row and file."""
        try:
            yield
        except FileNotFoundError:
            raise self.error("is missing", "put the file there, or take the row out") from None
        except Image.DecompressionBombError as error:
            raise self.error(f"is too large to be decoded safely ({error})", "scale it down") from None
        except UnidentifiedImageError:
            raise self.error("is not a picture in any format that can be read", "convert it to PNG or JPEG") from None
        except UNDECODED as error:
            raise self.error(
                f"can not be decoded: {str(error) or type(error).__name__}", "replace the file, or take the row out"
            ) from None

    def _open(self) -> Image.Image:
        if isinstance(self.content, Image.Image):
            return self.content
        if isinstance(self.content, bytes):
            return Image.open(io.BytesIO(self.content))
        return Image.open(self.content)

    def _check(self, picture: Image.Image) -> None:
        width, height = picture.size
        if not width or not height:
            raise self.error(f"has no pixels ({width} x {height})", "replace the file, or take the row out")
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > limit:
            raise self.error(f"is too large to be decoded safely ({width} x {height})", "scale it down")
        if picture.mode.partition(";")[0] in _DEEP:
            raise self.error(f"has more than 8 bits a channel (mode {picture.mode})", "convert it to 8 bits")

    def error(self, what: str, do: str) -> DataError:
        """A DataError that names the row, its source and the picture."""
        return DataError(f"A picture of row {self.row} of {self.source} {what}.", given=self.name, do=do)


def _shrunk(picture: Image.Image, resolution: int | None) -> Image.Image:
    """At most ``resolution`` pixels along the longer side, as long for its width as it was; never enlarged."""
    size = _within(picture.size, resolution)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def _within(size: tuple[int, int], resolution: int | None) -> tuple[int, int]:
    """Width and height of a picture that is shown with at most ``resolution`` pixels along its longer side."""
    longer = max(size)
    if resolution is None or longer <= resolution:
        return size
    width, height = (max(1, round(side * resolution / longer)) for side in size)
    return width, height


def _on_white(picture: Image.Image) -> Image.Image:
    """As Transformers' own processors show it; without this, colours that nobody sees would come to light."""
    if not picture.has_transparency_data:
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: a conversation and its pictures, in the order in which their placeholders stand.

    ``tools`` are the texts of JSON objects, each a function as OpenAI's chat format describes it. Raises
    DataError where a role is unknown, nothing is said, somebody else than the assistant calls a tool, or
    placeholders and pictures differ in number.
    """

    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]
    source: str
    row: int
    tools: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.messages:
            raise DataError(f"Row {self.row} of {self.source} has no messages.", do="take the row out")
        for message in self.messages:
            if message.role not in ROLES:
                raise DataError(
                    f"Row {self.row} of {self.source} has a message of an unknown role.",
                    given=repr(message.role),
                    allowed=", ".join(ROLES),
                )
            if message.role != "assistant" and (message.calls or message.thought or not message.learnt):
                raise DataError(
                    f"Row {self.row} of {self.source}: only an assistant calls tools, thinks, or is not learnt from.",
                    given=f"a message of the {message.role}",
                )
        placeholders = sum(message.n_pictures for message in self.messages)
        if placeholders != len(self.pictures):
            more = "more" if placeholders > len(self.pictures) else "fewer"
            raise DataError(
                f"Row {self.row} of {self.source} has {more} picture placeholders than pictures.",
                given=f"{placeholders} placeholders, {len(self.pictures)} pictures",
                allowed="one placeholder for each picture",
                do="correct the row's markers or its list of pictures",
            )
