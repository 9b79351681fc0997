"""Files of pictures as strangers send them: looked at before they are decoded, and refused in a sentence."""

from __future__ import annotations

import hashlib
import io
from typing import Final

from PIL import Image

from tarsia.core.errors import DataError, ServeError
from tarsia.data import Picture
from tarsia.serve.bounds import Bounds

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
"""What is decoded. Other formats' decoders are not even asked whether a file is theirs."""
_SCANS: Final = 256
# A JPEG may go over all its pixels once more for some ten bytes: after this marker, which its data never have.
_SCAN: Final = b"\xff\xda"


class _File(Picture):
    """A file's bytes, in one of FORMATS; errors name it by its number."""

    def _open(self) -> Image.Image:
        assert isinstance(self.content, bytes)
        return Image.open(io.BytesIO(self.content), formats=FORMATS)

    def error(self, what: str, do: str) -> DataError:
        return DataError(f"Picture {self.row} {what}.", do="send another file")


def digest(content: bytes) -> bytes:
    """What tells one file from another."""
    return hashlib.sha256(content).digest()


def decoded(content: bytes, number: int, bounds: Bounds, resolution: int | None) -> Image.Image:
    """The file as the data layer decodes it (``data.Picture.load``): upright, 8-bit RGB, the first of its frames.

    ``number``, from 1, is what errors call it. Raises ServeError (invalid) for whatever is wrong with it.
    """
    if len(content) > bounds.bytes:
        raise _refused(f"Picture {number} is too large a file.", f"{len(content)} bytes", f"{bounds.bytes} bytes")
    if content.startswith(b"\xff\xd8") and (scans := content.count(_SCAN)) > _SCANS:
        raise _refused(f"Picture {number} is drawn over too often.", f"{scans} scans", f"{_SCANS} scans")
    file = _File(content, f"picture {number}", "the request", number)
    try:
        longer, shorter = file.sides()
        if longer * shorter > bounds.pixels:
            raise _refused(f"Picture {number} is too large.", f"{longer} x {shorter} pixels", f"{bounds.pixels} pixels")
        if longer > bounds.stretch * shorter:
            given = f"{longer} x {shorter} pixels"
            raise _refused(
                f"Picture {number} is too narrow.", given, f"one side at most {bounds.stretch:g} times the other"
            )
        return file.load(resolution)
    except DataError as error:
        raise ServeError("invalid", error.what, allowed=", ".join(FORMATS), do=error.do) from None
    except ServeError:
        raise
    except Exception as error:  # noqa: BLE001 - what a decoder raises for a stranger's bytes is not to be foreseen
        raise _refused(f"Picture {number} can not be decoded.", type(error).__name__, ", ".join(FORMATS)) from None


def _refused(what: str, given: str, allowed: str) -> ServeError:
    return ServeError("invalid", what, given=given, allowed=allowed, do="send another file")
