"""Each finding of the doctor can be ok, and can be not."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from surface import source

import tarsia.cli
from tarsia.cli import machine
from tarsia.cli.machine import Finding, State

INTEL = ("Xeon", frozenset({"avx2", "avx512_bf16"}))
LIBRARY = "7f00-7f01 r-xp 00000000 08:01 1 /site/{}\n"


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((source.ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    least = dict(re.fullmatch(r"([\w-]+)(?:>=(.+))?", line).groups() for line in project["dependencies"])
    pins = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (source.ROOT / "constraints.txt").read_text(encoding="utf8"), re.MULTILINE)
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    expected = {name: (version or "0", pins[name]) for name, version in least.items()}
    assert {name.lower(): versions for name, versions in machine.PACKAGES.items()} == expected


@pytest.mark.parametrize(
    "have, state", [("2.13.0", "ok"), ("2.13.0+cpu", "ok"), ("2.12.1", "warn"), ("2.9.1", "fail"), (None, "fail")]
)
def test_packages(have: str | None, state: str) -> None:
    (finding,) = machine.packages({"torch": ("2.11", "2.13.0")}, {"torch": have})
    assert finding.state == state
    assert (finding.do is None) == (state == "ok")


@pytest.mark.parametrize(
    "finding, state, word",
    [
        (machine.python((3, 11, 2)), "ok", "3.11.2"),
        (machine.python((3, 10, 9)), "fail", "3.10.9"),
        (machine.processor(INTEL), "ok", "avx512_bf16"),
        (machine.processor(("Old", frozenset({"sse2"}))), "warn", "avx2"),
        (machine.processor(("Apple", frozenset())), "ok", "unknown"),
        (machine.bf16((True, 0.6)), "ok", "native, and used"),
        (machine.bf16((False, 5.5)), "ok", "float32 is used; on the processor a product takes 5.50"),
        (machine.bf16(None), "fail", "torch"),
        (machine.threads(2, 2), "ok", "2 cores"),
        (machine.threads(2, 8), "warn", "8 threads"),
        (machine.threads(2, None), "fail", "torch"),
        (machine.openmp(None), "ok", "not tell"),
        (machine.openmp(""), "ok", "no runtime"),
        (machine.openmp(LIBRARY.format("libgomp-a1.so.1") * 2), "ok", "libgomp"),
        (machine.openmp(LIBRARY.format("libgomp-a1.so.1") + LIBRARY.format("libiomp5.so")), "warn", "2 runtimes"),
        (machine.openmp(LIBRARY.format("libomp.so.5") + LIBRARY.format("sk/libgomp.so.1.0.0")), "warn", "2 runtimes"),
        (machine.memory(8 * 2**30), "ok", "8.0 GiB"),
        (machine.memory(2**30), "warn", "1.0 GiB"),
        (machine.memory(None), "ok", "not tell"),
        (machine.disk(Path("/x"), 9 * 2**30), "ok", "9.0 GiB"),
        (machine.disk(Path("/x"), 2**30), "warn", "1.0 GiB"),
        (machine.disk(Path("/x"), 2**20), "fail", "/x"),
    ],
)
def test_findings(finding: Finding, state: str, word: str) -> None:
    assert finding.state == state
    assert word in finding.text
    assert (finding.do is None) == (state == "ok")


def test_openmp_of_another_name_is_not_counted() -> None:
    assert "no runtime" in machine.openmp(LIBRARY.format("libgomposer.so") + LIBRARY.format("libcompute.so")).text


@pytest.mark.parametrize(
    "script, word", [(None, "no no-such-cc"), ("echo broken >&2; exit 3", "broken"), ("exit 0", "cc")]
)
def test_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, word: str) -> None:
    name = "no-such-cc"
    if script is not None:
        path = tmp_path / "cc"
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf8")
        path.chmod(0o755)
        name = str(path)
    monkeypatch.setenv("CC", name)
    finding = machine.compiler()
    assert finding.state == ("ok" if script == "exit 0" else "warn")
    assert word in finding.text


def test_base_is_named_by_its_digest(tmp_path: Path) -> None:
    assert machine.base(tmp_path).state is State.FAIL
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "card.json").write_text(json.dumps({"sha256": hashlib.sha256(b"abd").hexdigest()}))
    assert machine.base(tmp_path).state is State.FAIL
    (tmp_path / "card.json").write_text(json.dumps({"sha256": hashlib.sha256(b"abc").hexdigest()}))
    finding = machine.base(tmp_path)
    assert finding.state is State.OK
    assert "ba7816bf8f01cfea" in finding.text


def test_this_machine_is_examined() -> None:
    found = {finding.name: finding for finding in machine.examine()}
    assert {"python", "torch", "processor", "bf16", "threads", "openmp", "memory", "disk", "cuda"} <= set(found)
    assert all(finding.do for finding in found.values() if finding.state is not State.OK)


@pytest.mark.parametrize("state, code", [(State.OK, 0), (State.WARN, 0), (State.FAIL, 1)])
def test_exit_code_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: State, code: int
) -> None:
    def examine() -> Iterator[Finding]:
        yield Finding("this", state, "text", None if state is State.OK else "advice")
        yield Finding("that", State.OK, "text")

    monkeypatch.setattr(machine, "examine", examine)
    assert tarsia.cli.main(["doctor", "--json"]) == code
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line["state"]) for line in lines] == [("this", state), ("that", "ok")]
    assert tarsia.cli.main(["doctor"]) == code
    assert ("to do: advice" in capsys.readouterr().out) == (state is not State.OK)


@pytest.mark.parametrize("native, word", [(True, "native, and used"), (False, "float32 is used")])
def test_bf16_is_what_training_will_choose(monkeypatch: pytest.MonkeyPatch, native: bool, word: str) -> None:
    monkeypatch.setattr("tarsia.adapter.native_bf16", lambda: native)
    here = machine.bf16_here()
    assert here is not None and here[1] > 0
    assert word in machine.bf16(here).text
