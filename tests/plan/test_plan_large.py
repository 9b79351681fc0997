"""A model of 70 billion parameters is planned in little memory: no weight, no mask and no position is ever there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
from bench.grid.large import base, recipe
from tarsia.train.recipe import Recipe
folder = Path(sys.argv[1])
base(folder)
chosen = Recipe.load(recipe(folder, checkpointing=True))
from tarsia.plan import plan
found = plan(chosen)
lines = (line.split() for line in open("/proc/self/status"))
held = {words[0]: int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:"}
print(json.dumps({"held": held["VmHWM:"], "files": sum(1 for _ in (folder / "base").glob("*.safetensors")),
                  "categories": {str(k): v for k, v in found.categories.items()}, "step": found.step.peak}))
"""


@pytest.mark.slow
def test_70b_is_planned_below_2_gb(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["files"] == 0
    assert found["held"] < 2e9
    # 80 layers of 2 h^2 (1 + 1/8) + 3 h i numbers, half a byte each, and a scale of a byte for 64 of them
    numbers = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28_672) + 24 * 12 * 1024**2
    assert abs(found["categories"]["quantised"] / (numbers * (1 / 2 + 1 / 64)) - 1) < 0.01
    assert found["step"] < 48e9
