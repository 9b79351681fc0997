"""The demo, from nothing: seconds on this machine, and held-out rows answered right, in percent."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console

from bench.run import Values
from tarsia.labs import demo


def measure() -> Values:
    """The job and what was known, before and with each mix."""
    out = Path("runs/bench-demo")
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    before, mixes = demo.run(out, Console())
    seconds = time.perf_counter() - began
    return {**demo.values(before, mixes), "seconds, all of it": {"before": round(seconds, 1)}}
