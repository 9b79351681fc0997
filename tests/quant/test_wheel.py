"""A wheel in a bare environment has the kernel, and one that was built without a compiler says that it has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tarsia.quant import build

ROOT = Path(__file__).parents[2]
NATIVE = {str(library.path.relative_to(build.PACKAGE.parent)) for library in build.LIBRARIES}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling, which makes wheels, is not installed"),
]


def call(*command: str | Path, **variables: str) -> str:
    """What the command printed, run where no source lies; fails with what it said."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TARSIA_KERNEL")} | variables
    done = subprocess.run([*map(str, command)], cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def pip(*arguments: str | Path, **variables: str) -> str:
    return call(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **variables)


def wheel(folder: Path, **variables: str) -> tuple[Path, str]:
    said = pip("wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, **variables)
    (made,) = folder.glob("*.whl")
    return made, said


def installed(made: Path, folder: Path) -> Path:
    """The Python of a new environment that has this wheel, and everything else from the environment of the tests."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--no-deps", made)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf8")
    return python


PARTS = tuple(f"src/tarsia/{part}" for part in ("quant/", "core/", "merge/kernels/", "serve/kernels/", "__init__"))

RUN = """
import torch
from pathlib import Path
import tarsia
from tarsia.quant import build, native, ops
from tarsia.quant.levels import levels
codes, scales = ops.quantise4(torch.randn(128, 128), levels("nf4"), 64)
ops.linear4(torch.randn(3, 128), codes, scales, None, None, levels("nf4"), 64, 128, 128, None)
kernel = native.library()
print("ran", kernel.name if kernel else "reference", Path(tarsia.__file__).parent)
"""


def ran(python: Path) -> tuple[str, Path]:
    """Which kernel ran in this environment, and where its package lies."""
    (line,) = [line for line in call(python, "-c", RUN).splitlines() if line.startswith("ran ")]
    _, kernel, folder = line.split(" ", 2)
    return kernel, Path(folder)


def doctor(python: Path) -> dict[str, str]:
    lines = call(python, "-c", "import tarsia.cli; tarsia.cli.main(['doctor', '--json'])").splitlines()
    findings = [json.loads(line) for line in lines if line.startswith("{")]
    return next(finding for finding in findings if finding["name"] == "4-bit kernel")


@pytest.mark.skipif(build.compiler() is None, reason="there is no C compiler")
def test_a_wheel_has_the_kernel_active(tmp_path: Path) -> None:
    made, _ = wheel(tmp_path / "dist")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert made.name.endswith(f"-py3-none-{platform}.whl")
    assert set(zipfile.ZipFile(made).namelist()) >= NATIVE
    python = installed(made, tmp_path / "venv")
    kernel, folder = ran(python)
    assert folder.is_relative_to(tmp_path), "the wheel's own package is to be tested"
    assert kernel != "reference"
    finding = doctor(python)
    assert finding["state"] == "ok" and finding["text"].startswith(kernel)


def test_without_a_compiler_the_wheel_is_for_every_machine_and_says_so(tmp_path: Path) -> None:
    made, said = wheel(tmp_path / "dist", CC="no-such-compiler")
    assert made.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith(".so")]
    assert "no-such-compiler" in said and "Without the kernels" in said
    python = installed(made, tmp_path / "venv")
    kernel, folder = ran(python)
    assert folder.is_relative_to(tmp_path) and kernel == "reference"
    assert doctor(python)["state"] == "warn"


def test_an_editable_install_builds_the_kernel_among_its_sources(tmp_path: Path) -> None:
    if build.compiler() is None:
        pytest.skip("there is no C compiler")
    copy = tmp_path / "copy"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, tracked)):
        if name.startswith(PARTS) or "/" not in name:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf8")
    pip("--python", python, "install", "--no-deps", "--no-build-isolation", "-e", copy)
    kernel, folder = ran(python)
    assert folder == copy / "src" / "tarsia" and kernel != "reference"
    assert all((copy / "src" / name).is_file() for name in NATIVE)
