"""The kernel is found, checked and loaded; every way in which it can not be is planted, and said."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tarsia.cli import machine
from tarsia.core.errors import ConfigError
from tarsia.quant import build, loader, native, ops
from tarsia.quant.levels import levels

CC = build.compiler()
LIBRARY = build.FOUR_BITS.path
needs_cc = pytest.mark.skipif(CC is None, reason="there is no C compiler")
needs_kernel = pytest.mark.skipif(CC is None and not LIBRARY.exists(), reason="no C compiler and no compiled kernel")

NAMES = ("quantise", "dequantise", "rows")
STUB = "int tarsia4_abi(void) {{ return {abi}; }} int tarsia4_supported(int isa) {{ return {here}; }} {rest}"


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def stub(
    folder: Path, abi: int = native.INTERFACE.abi, here: str = "1", names: tuple[str, ...] = NAMES, code: int = 0
) -> Path:
    """A library that answers, and does nothing."""
    rest = " ".join(f"int tarsia4_{name}(void) {{ return {code}; }}" for name in names)
    source, library = folder / "stub.c", folder / LIBRARY.name
    source.write_text(STUB.format(abi=abi, here=here, rest=rest), encoding="utf8")
    subprocess.run([*CC, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


def copy(folder: Path) -> build.Library:
    """The same sources in another folder."""
    shutil.copytree(LIBRARY.parent, folder, ignore=shutil.ignore_patterns("*.so", ".build-*"))
    return build.FOUR_BITS.at(folder)


@needs_kernel
def test_the_kernel_of_these_sources_runs() -> None:
    assert build.FOUR_BITS.fresh(), "python -m tarsia.quant.build"
    kernel, status = native._find(LIBRARY, "")
    assert kernel is not None and status.do is None
    there = [name for name in native.INTERFACE.best_first if name in status.text]
    assert kernel.name == there[0]
    if build.machine() == "x86_64" and "avx2" in machine.cpu_flags()[1]:
        assert {"avx2", "portable"} <= set(there), "the dispatcher does not know what was compiled"
    if build.machine() == "aarch64":
        assert kernel.name == "neon"


@needs_kernel
def test_each_that_runs_here_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "portable")
    kernel = native.library()
    assert kernel is not None and kernel.name == "portable"
    assert native.VARIABLE in native.status().text


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(native.VARIABLE, "reference")
    assert native.library() is None
    assert "reference" in native.status().text and native.status().do is None
    assert not caplog.records  # it was asked for


@pytest.mark.parametrize("name", ["fast", "neon" if build.machine() == "x86_64" else "avx2"])
def test_what_can_not_be_forced_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(native.VARIABLE, name)
    with pytest.raises(ConfigError, match=native.VARIABLE) as caught:
        native.library()
    allowed = str(caught.value.allowed).split(", ")
    assert caught.value.given == name and {"portable", "reference"} <= set(allowed)
    for choice in allowed:  # what is offered can be had
        native._find(LIBRARY, choice)
    text, do = native.status().text, str(native.status().do)
    assert text.startswith(f"none: {native.VARIABLE} ") and text.endswith(f": {name}") and "." not in text
    assert do == f"set {native.VARIABLE} to one of {caught.value.allowed}, or unset it"
    with pytest.raises(ConfigError):
        ops.quantise4(torch.ones(64), levels("nf4"), 64)


def missing(folder: Path) -> Path:
    return folder / LIBRARY.name


def no_library(folder: Path) -> Path:
    (folder / LIBRARY.name).write_text("not a library", encoding="utf8")
    return folder / LIBRARY.name


def cut_short(folder: Path) -> Path:
    (folder / LIBRARY.name).write_bytes(stub(folder).read_bytes()[:200])
    return folder / LIBRARY.name


def wrong_processor(folder: Path) -> Path:
    path = stub(folder)
    image = bytearray(path.read_bytes())
    image[18:20] = (183 if build.machine() != "aarch64" else 62).to_bytes(2, "little")  # e_machine of ELF
    path.write_bytes(image)
    return path


def another_library(folder: Path) -> Path:
    return stub(folder, names=("quantise",))


def wrong_interface(folder: Path) -> Path:
    return stub(folder, abi=native.INTERFACE.abi + 1)


def nothing_runs(folder: Path) -> Path:
    return stub(folder, here="0", code=-2)


PLANTED = {
    missing: "no kernel is compiled",
    no_library: "does not load",
    cut_short: "does not load",
    wrong_processor: "does not load",
    another_library: "another library",
    wrong_interface: "binary interface 2",
    nothing_runs: "no instruction set",
}


@needs_cc
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_without_a_kernel_the_reference_runs_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, plant
) -> None:
    w = torch.randn(7, 100)
    expected = ops.quantise4(w, levels("nf4"), 64)
    native.library.cache_clear()
    planted = replace(native.INTERFACE, library=build.FOUR_BITS.at(plant(tmp_path).parent))
    monkeypatch.setattr(native, "INTERFACE", planted)
    with caplog.at_level(logging.WARNING):
        found = [ops.quantise4(w, levels("nf4"), 64) for _ in range(3)]
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, expected, strict=True))
    (record,) = caplog.records
    assert PLANTED[plant] in record.getMessage() and "reference" in record.getMessage()
    status = native.status()
    assert PLANTED[plant] in status.text and "tarsia.quant.build" in str(status.do)
    finding = machine.kernel(*machine.kernel_here())
    assert finding.state is machine.State.WARN and finding.do == status.do and finding.text == status.text
    monkeypatch.setenv(native.VARIABLE, "portable")
    native.library.cache_clear()
    with pytest.raises(ConfigError, match=native.VARIABLE):
        native.library()


@needs_kernel
def test_doctor_is_content_with_the_kernel() -> None:
    finding = machine.kernel(*machine.kernel_here())
    assert finding.state is machine.State.OK and finding.do is None
    assert machine.kernel(None, "install torch").state is machine.State.FAIL


@pytest.mark.parametrize("forced", ["foo", "neon" if platform.machine() == "x86_64" else "avx512"])
def test_doctor_fails_where_nothing_in_4_bits_would_run(monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    monkeypatch.setenv(native.VARIABLE, forced)
    finding = machine.kernel(*machine.kernel_here())
    assert finding.state is machine.State.FAIL
    assert forced in finding.text and native.VARIABLE in str(finding.do)


@pytest.mark.parametrize("do, state", [(None, "ok"), ("pip install triton", "warn")])
def test_doctor_speaks_of_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, do: str | None, state: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(machine.gpu_kernel()) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("tarsia.quant.cuda.status", lambda: native.Status("what runs", do))
    (finding,) = machine.gpu_kernel()
    assert (finding.state, finding.text, finding.do) == (state, "what runs", do)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without optimising."""
    monkeypatch.setattr(build, "COMMON", tuple("-O0" if flag == "-O3" else flag for flag in build.COMMON))


@needs_cc
@pytest.mark.usefixtures("quickly")
def test_a_library_of_other_sources_is_said(tmp_path: Path) -> None:
    copied = copy(tmp_path / "kernels")
    library = build.compile_library(copied, copied.path, build.machine(), CC)
    assert copied.fresh() and native._find(library, "")[1].do is None
    with (tmp_path / "kernels" / "portable.c").open("a", encoding="utf8") as source:
        source.write("/* changed */\n")
    assert not copied.fresh()
    kernel, status = native._find(library, "")
    assert kernel is not None and "other sources" in status.text and status.do


@needs_cc
def test_an_instruction_that_ends_the_process_is_not_forced(tmp_path: Path) -> None:
    path = stub(tmp_path, here="isa == 0", names=("dequantise", "rows"))
    source = path.with_suffix(".c")
    source.write_text((tmp_path / "stub.c").read_text() + "int tarsia4_quantise(void) { __builtin_trap(); }")
    subprocess.run([*CC, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    with pytest.raises(ConfigError, match="does not run here"):
        native._find(path, "avx512_bf16")
    assert native._find(stub(tmp_path, here="isa == 0"), "avx512_bf16")[0] is not None


def test_threads_are_those_of_torchs_runtime() -> None:
    address, words = loader.threads(loader.maps())
    if not machine.OPENMP.search(loader.maps()):
        pytest.skip("torch has loaded no OpenMP runtime here")
    assert address and "torch's" in words


@pytest.mark.parametrize("maps", ["", "7f00-7f01 r-xp 00000000 08:01 1 /nowhere/libgomp.so.1\n"])
def test_no_second_runtime_is_loaded(maps: str) -> None:
    address, words = loader.threads(maps)
    assert address == 0 and "one thread" in words


TWO = """
import torch
from tarsia.cli import machine
from tarsia.quant import loader, native, ops
from tarsia.quant.levels import levels
w = torch.randn(512, 1024)
x = torch.randn(3, 1024)
found = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    codes, scales = ops.quantise4(w, levels("nf4"), 64)
    weight = (codes, scales, None, None, levels("nf4"), 64, 512, 1024)
    found.append((codes, scales, ops.dequantise4(*weight, torch.bfloat16), ops.linear4(x, *weight, None)))
assert all(torch.equal(a, b) for a, b in zip(*found))
print(native.library().name, len(set(machine.OPENMP.findall(loader.maps()))))
"""


@needs_kernel
def test_two_threads_give_the_same_bits_and_one_runtime() -> None:
    done = subprocess.run([sys.executable, "-c", TWO], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, runtimes = done.stdout.split()
    assert name in native.SETS and int(runtimes) <= 1


@needs_cc
@pytest.mark.usefixtures("quickly")
def test_what_does_not_compile_is_said_in_the_compilers_words(tmp_path: Path) -> None:
    copied = copy(tmp_path / "kernels")
    (tmp_path / "kernels" / "portable.c").write_text("nonsense", encoding="utf8")
    with pytest.raises(build.BuildError, match="nonsense"):
        build.compile_library(copied, tmp_path / "out.so", build.machine(), CC)
    assert not list(tmp_path.glob("*.so"))


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build.main() == 1
    assert "no-such-compiler" in capsys.readouterr().err


@needs_cc
def test_building_in_place_prints_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def compiled(library: build.Library, target: Path, *_: object) -> Path:
        return target

    monkeypatch.setattr(build, "compile_library", compiled)
    assert build.main() == 0
    assert capsys.readouterr().out.splitlines() == [str(library.path) for library in build.LIBRARIES]


def test_another_machine_has_its_own_sources() -> None:
    sources = build.FOUR_BITS.sources
    assert {path.name for path in sources("aarch64")} >= {"neon.c", "portable.c", "tarsia4.c"}
    assert "neon.c" not in {path.name for path in sources("x86_64")}
    assert {path.name for path in sources("riscv64")} == set(build.FOUR_BITS.everywhere)
