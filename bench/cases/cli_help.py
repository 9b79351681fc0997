"""How long ``tarsia --help`` takes, beside an interpreter that does nothing (the limit) and one that imports torch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping

from bench.run import spread

RUNS = 15
COMMANDS = {
    "tarsia --help": ["-m", "tarsia", "--help"],
    "python -c pass": ["-c", "pass"],
    "python -c 'import torch'": ["-c", "import torch"],
}


def measure() -> Mapping[str, Mapping[str, float | int | str]]:
    """Wall time of each command, all of them in turn so that a busy moment touches every row."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - began)
    return {name: spread(values) for name, values in times.items()}
