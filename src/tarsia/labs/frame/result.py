"""What a chapter measured, as a file: numbers, and where they come from."""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tarsia
from tarsia.core.errors import ConfigError
from tarsia.labs.frame.chapter import Chapter, Desk, Found, Verdict


@dataclass(frozen=True, slots=True)
class Result:
    """Found on the day ``at``, with these ``versions``; ``lacking`` are the places that the chapter did without."""

    chapter: str
    found: Found
    lacking: tuple[str, ...]
    at: str
    versions: Mapping[str, str]

    def verdict(self, chapter: Chapter) -> Verdict:
        return chapter.judge(self.found, self.lacking)

    def as_json(self, chapter: Chapter) -> str:
        """The file's text: what was found, and every bound with its number and verdict."""
        bounds = [
            {"what": b.what, "limits": b.limits, "value": _value(self, b.row, b.column), "verdict": verdict}
            for b in chapter.bounds
            for verdict in [b.judge(self.found, self.lacking)]
        ]
        content = {
            "chapter": self.chapter,
            "verdict": self.verdict(chapter),
            "bounds": bounds,
            "rows": self.found.rows,
            "at": self.at,
            "versions": self.versions,
            "bases": self.found.bases,
            "lacking": self.lacking,
            "series": self.found.series,
        }
        return _layout(content)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises ValueError or KeyError where the text is no result."""
        content: dict[str, Any] = json.loads(text)
        found = Found(content["rows"], content["series"], content["bases"])
        return cls(content["chapter"], found, tuple(content["lacking"]), content["at"], content["versions"])


def _value(result: Result, row: str, column: str) -> float | int | str | None:
    return result.found.rows.get(row, {}).get(column)


def _short(value: float) -> float:
    """A point of a picture: six digits are more than it shows."""
    return float(f"{value:.6g}")


def _layout(content: Mapping[str, Any]) -> str:
    """JSON with one line a row, so that a change is a readable difference."""
    lines = []
    for key, value in content.items():
        if isinstance(value, Mapping) and key in ("rows", "series"):
            inner = ",\n".join(f"  {_dump(name)}: {_dump(held)}" for name, held in value.items())
            lines.append(f" {_dump(key)}: {{\n{inner}\n }}" if value else f" {_dump(key)}: {{}}")
        elif key == "bounds":
            inner = ",\n".join(f"  {_dump(held)}" for held in value)
            lines.append(f" {_dump(key)}: [\n{inner}\n ]")
        else:
            lines.append(f" {_dump(key)}: {_dump(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def perform(chapter: Chapter, desk: Desk) -> Result:
    """Run the experiment. A number that is not finite is kept as a word, which no bound accepts."""
    import torch

    found = chapter.measure(desk)
    rows = {name: {column: _plain(v) for column, v in row.items()} for name, row in found.rows.items()}
    lacking = tuple(name for name in chapter.uses if name not in desk.folders)
    versions = {
        "tarsia": tarsia.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    series = {name: [_short(v) for v in values] for name, values in found.series.items()}
    plain = Found(rows, series, found.bases)
    return Result(chapter.name, plain, lacking, datetime.now(UTC).isoformat(timespec="seconds"), versions)


def _plain(value: Any) -> float | int | str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, float | int | str):
        raise TypeError(f"A row holds {value!r}: only float, int and str are shown.")
    return value


def read(path: Path) -> Result:
    """A result's file. Raises ConfigError where it is not there or is none."""
    try:
        return Result.from_json(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(
            "There is no result to draw.", given=str(path), do="run the chapter without --redraw"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "This is no result of a chapter.", given=f"{path}: {error}", do="run the chapter again"
        ) from None


def write(files: Sequence[tuple[Path, bytes]]) -> None:
    """Write each file whole or not at all. Raises ConfigError where the place can not be written."""
    for path, content in files:
        partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError as error:
            if partial.exists():
                partial.unlink()
            raise ConfigError(
                "The page can not be written.", given=f"{path}: {error}", do="give another --out"
            ) from None
