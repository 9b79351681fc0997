"""A process that uses Tarsia has one OpenMP runtime: two would spin against each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

USES = """
import ctypes, sys
import torch, tarsia.adapter, tarsia.train.run, tarsia.train.lean, tarsia.evaluate, tarsia.data, tarsia.cli
from tarsia.cli import machine
for path in sys.argv[1:]:
    ctypes.CDLL(path)
(torch.randn(200, 200, requires_grad=True) @ torch.randn(200, 200)).sum().backward()
maps = machine.loaded_libraries()
print(len(set(machine.OPENMP.findall(maps))), machine.openmp(maps).state)
"""


def runtimes(*libraries: Path) -> list[str]:
    """How many OpenMP runtimes a fresh process has that uses Tarsia and loads these libraries, and the finding."""
    command = [sys.executable, "-c", USES, *map(str, libraries)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]


BUNDLED = [
    *sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")),
    *sorted(Path(torch.__file__).parents[1].glob("torch.libs/libgomp*.so*")),
]


@pytest.mark.skipif(not BUNDLED, reason="this torch brings no libgomp")
def test_one_openmp_runtime_and_a_second_is_seen(tmp_path: Path) -> None:
    assert runtimes() == ["1", "ok"]
    second = tmp_path / "libgomp.so.1"
    shutil.copy(BUNDLED[0], second)
    assert runtimes(second) == ["2", "warn"]
