"""mini-1 adapted to blood cells (BCCD), replay 0 and 10 % of photographs: held-out rows answered right, in percent.

Needs TARSIA_DATA; trains from nothing in runs/bench-blood and leaves the picture there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from bench.run import Values
from tarsia.labs import blood


def measure() -> Values:
    """By source, before and with each mix."""
    out = Path("runs/bench-blood")
    blood.data()
    shutil.rmtree(out, ignore_errors=True)
    return blood.values(*blood.run(out, Console()))
