"""The GPU's kernels of serving without a GPU: what they compute in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What Python says to ``command``, on one thread."""
    pytest.importorskip("triton", minversion="3.7", reason="the GPU's kernels are written in Triton")
    without = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", ROOT)))
    there = {**without, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=there, cwd=ROOT, check=False)


def test_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    command = "-m", "pytest", str(HERE / "triton_serving.py"), "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"
    ran = process(*command, TRITON_INTERPRET="1")
    assert not ran.returncode, ran.stdout[-6000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) >= 14, ran.stdout[-2000:]
    assert "skipped" not in ran.stdout


def test_every_kernel_compiles_for_two_generations_of_gpus(tmp_path: Path) -> None:
    ran = process(str(HERE / "triton_serving_compiled.py"), TRITON_CACHE_DIR=str(tmp_path))
    assert not ran.returncode, ran.stderr[-4000:]
    made = json.loads(ran.stdout)
    assert len(made) == 10 and all(made.values()), made
