"""Run cases and append what they measured: ``python -m bench.run [CASE ...]`` (all of them without a name).

A case is a file in ``bench/cases`` with a docstring that says what is measured and how, and
``measure()``, which returns rows of named values. A line of ``bench/results/CASE.jsonl`` is never changed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import tarsia
from tarsia.base import NAMES
from tarsia.cli import machine

CASES = Path(__file__).parent / "cases"
RESULTS = Path(__file__).parent / "results"
PACKAGE = Path(tarsia.__file__).parent

Values = Mapping[str, Mapping[str, float | int | str]]


def spread(times: Sequence[float]) -> dict[str, float | int]:
    """Seconds of repeated runs as the columns of one row."""
    return {"median s": round(median(times), 4), "least s": round(min(times), 4), "runs": len(times)}


def commit() -> str:
    """The commit that is measured, with a + where files differ from it."""
    git = ["git", "-C", str(CASES)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    return name.strip() + ("+" if changed else "")


def base() -> dict[str, str]:
    """The embedded models of this installation: the SHA-256 of the weights of each, as its card has it."""
    weights = {name: PACKAGE / "base" / name / "model.safetensors" for name in NAMES}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in weights.items() if file.is_file()}


def record(case: str, values: Values, results: Path = RESULTS, measured: str | None = None) -> None:
    """Append one line: what was measured, of which commit, when, on what, with which versions and base.

    ``measured`` names the commit where the sources are a copy without their history.
    """
    line = {
        "case": case,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": measured or commit(),
        "processor": machine.cpu_flags()[0],
        "cores": machine.cores(),
        "python": sys.version.split()[0],
        "versions": machine.installed(machine.PACKAGES),
        "base": base(),
        "values": values,
    }
    results.mkdir(exist_ok=True)
    with (results / f"{case}.jsonl").open("a", encoding="utf8") as file:
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def main(names: Sequence[str]) -> int:
    """Run the named cases, or all; 2 where a name is not one."""
    known = sorted(path.stem for path in CASES.glob("*.py"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"There is no case {', '.join(unknown)}; there are {', '.join(known)}.", file=sys.stderr)
        return 2
    for name in names or known:
        values = importlib.import_module(f"bench.cases.{name}").measure()
        record(name, values)
        print(name, json.dumps(values))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
