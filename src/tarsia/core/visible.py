"""Text from elsewhere as it can stand on a terminal: what would act there is written as its code."""

from __future__ import annotations

import re
from typing import Final

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters of ASCII and Latin 1, ends of lines, and what turns the direction of others' text around."""


def visible(text: str) -> str:
    r"""The text with each such character as its code: ``\x1b``."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
