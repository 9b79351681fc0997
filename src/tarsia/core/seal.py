"""A text that holds its own digest, so that a changed byte anywhere in it is seen.

The seal is the SHA-256 of the text with 64 zeros where the seal stands. It guards against damage and edits, not
against somebody who means harm: anybody can compute it.
"""

from __future__ import annotations

import hashlib
from typing import Final

BLANK: Final = "0" * 64
"""What stands for the seal while it is computed."""


def sealed(text: str) -> str:
    """The text with its seal in place of its last ``BLANK``."""
    before, _, after = text.rpartition(BLANK)
    return f"{before}{hashlib.sha256(text.encode()).hexdigest()}{after}"


def intact(raw: bytes, seal: object) -> bool:
    """Whether these bytes, which hold ``seal``, are those that it was put into."""
    if not isinstance(seal, str) or len(seal) != len(BLANK):
        return False
    before, _, after = raw.rpartition(seal.encode())
    return hashlib.sha256(before + BLANK.encode() + after).hexdigest() == seal
