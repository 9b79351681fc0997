"""What pictures of strangers may be: one table, by which they are refused before they are handed on, and again where
they are decoded. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a picture may be. ``pixels`` are counted as its header declares them, before any is decoded; ``stretch`` is
    its longer side against its shorter: processors that give the shorter side a length would make a narrow one huge.
    ``bytes`` are its file's.
    """

    pixels: int = 32_000_000
    stretch: float = 50.0
    bytes: int = 1 << 24


BOUNDS: Final = Bounds()
PICTURES: Final = 32
"""How many pictures a request may show."""
