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

def tell():
    (torch.randn(200, 200, requires_grad=True) @ torch.randn(200, 200)).sum().backward()
    maps = machine.loaded_libraries()
    print(len(set(machine.OPENMP.findall(maps))), machine.openmp(maps).state)

tell()
ctypes.CDLL(sys.argv[1])
tell()
"""


BUNDLED = [
    *sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")),
    *sorted(Path(torch.__file__).parents[1].glob("torch.libs/libgomp*.so*")),
]


@pytest.mark.skipif(not BUNDLED, reason="this torch brings no libgomp")
def test_one_openmp_runtime_and_a_second_is_seen(tmp_path: Path) -> None:
    """A fresh process that uses Tarsia, before and after it loads another runtime: how many, and what is found."""
    second = tmp_path / "libgomp.so.1"
    shutil.copy(BUNDLED[0], second)
    done = subprocess.run([sys.executable, "-c", USES, second], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["1 ok", "2 warn"]
