"""One line of JSON for every request: who, what it took, how it ended; nothing of what was said or shown."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TextIO

_LONGEST: Final = 200


@dataclass(eq=False)
class Journal:
    """Writes lines to ``stream``. What is in them is ASCII without control characters, so nobody forges another."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def write(self, what: str, facts: Mapping[str, Any]) -> None:
        """One line: when, ``what``, and ``facts`` (texts are cut after 200 characters)."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"at": at, "what": what, **{name: _short(value) for name, value in facts.items()}})
        self.stream.write(line + "\n")
        self.stream.flush()


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
    return round(value, 6) if isinstance(value, float) else value


def user_digest(user: str | None) -> str | None:
    """What stands in the log for OpenAI's ``user``: the beginning of its SHA-256."""
    return None if user is None else hashlib.sha256(user.encode("utf8", "surrogatepass")).hexdigest()[:16]


def where(error: BaseException) -> str:
    """The kind of an error and where it was raised; its text may hold what a client said."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = "" if frame is None else f" at {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
    return f"{type(error).__name__}{place}"
