"""``tarsia library`` from adapters' folders to exit codes, without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tarsia.cli
from bench.made import PATHS, adapter
from tarsia.library import Library, content


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """cats@1 (stable), cats@2, dogs@1, put there by the command."""
    monkeypatch.setenv("TARSIA_LIBRARY", str(tmp_path / "library"))
    for seed in (1, 2, 3):
        adapter(tmp_path / f"made-{seed}", seed, rows=100 * seed)
    assert library("add", tmp_path / "made-1", "cats", "--tag", "stable", "--why", "the first", "--who", "eve") == 0
    assert library("add", tmp_path / "made-2", "cats") == 0
    assert library("add", tmp_path / "made-3", "dogs") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["cats@1", "cats@2", "dogs@1"]
    return tmp_path / "library"


def library(*arguments: object) -> int:
    return tarsia.cli.main(["library", *map(str, arguments)])


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_list(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert library("list") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "version", "tags", "hash", "methods", "size", "published", "base"]
    assert [row.split()[:2] for row in rows] == [["cats", "2"], ["dogs", "1"]]
    assert library("list", "c*", "--all", "--json") == 0
    found = lines(capsys)
    assert [(v["name"], v["number"], v["tags"]) for v in found] == [("cats", 1, ["stable"]), ("cats", 2, ["current"])]
    for options, wanted in [(["--tag", "stable"], 1), (["--base", "base-0"], 2), (["--hash", found[0]["hash"][:9]], 1)]:
        assert library("list", *options, "--json") == 0
        assert len(lines(capsys)) == wanted
    assert library("list", "birds") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_show(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert library("show", "cats@stable") == 0
    out = capsys.readouterr().out
    for text in ("cats@1", "by eve", "the first", "language.*.{q,v}", "rows.sha256", "loss.final", "max_forgetting"):
        assert text in out, text
    assert library("show", "cats@stable", "--json") == 0
    (found,) = lines(capsys)
    assert found["card"]["recipe"]["seed"] == 1 and found["card"]["data"]["rows"]["rows"] == 100
    assert found["card"]["base"]["name"] == "base-0" and found["card"]["forgetting"]["passed"] is True
    assert (Path(found["folder"]) / content.TENSORS).is_file()
    path = Path(found["folder"]) / content.OURSELVES
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"steps": 100', b'"steps": 900'))
    assert library("show", "cats@stable") == 2
    assert "not the one that was published" in capsys.readouterr().err


def test_diff(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert library("diff", "cats@1", "cats") == 0
    out = capsys.readouterr().out
    assert "seed" in out and "rows.sha256" in out and PATHS[0] in out and "weight" in out
    assert library("diff", "cats@1", "dogs", "--json") == 0
    (found,) = lines(capsys)
    assert found["entries"]["recipe"] == {"seed": [1, 3]} and found["entries"]["data"]["rows.rows"] == [100, 300]
    assert [d["site"] for d in found["distances"]] == list(PATHS)
    assert all(0.5 < d["relative"] < 3 and abs(d["cosine"]) < 0.9 for d in found["distances"])
    assert library("diff", "cats@1", "cats@stable") == 0
    assert "the same content" in capsys.readouterr().out


def test_tags_and_rollback(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert library("tag", "cats", "stable") == 0
    assert capsys.readouterr().out == "cats@stable: version 2 (was version 1)\n"
    assert library("rollback", "cats@stable", "--why", "too slow", "--json") == 0
    (entry,) = lines(capsys)
    assert (entry["before"], entry["after"], entry["why"]) == (2, 1, "too slow")
    assert library("rollback", "cats") == 0 and library("tag", "cats", "stable", "--remove") == 0
    assert capsys.readouterr().out == "cats@current: version 1 (was version 2)\ncats@stable: nothing (was version 1)\n"
    assert library("rollback", "cats@1") == 2 and library("tag", "birds", "x") == 2
    assert "traceback" not in capsys.readouterr().err.lower()


def test_verify_repair_and_garbage(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert library("verify") == 0
    assert "3 versions, 3 contents" in capsys.readouterr().out
    assert library("rollback", "cats") == 0 and library("gc", "--retire", "cats@2") == 0
    assert "removed 1 content, 1 record, 0 dead stages" in capsys.readouterr().out
    (shelf / "index.sqlite").write_bytes(b"")
    assert library("list") == 2
    assert "verify --repair" in capsys.readouterr().err
    assert library("verify") == 1
    assert "FAULT" in capsys.readouterr().out
    assert library("verify", "--repair") == 0
    assert "repaired:" in capsys.readouterr().out
    path = next((shelf / "objects").rglob(content.TENSORS))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    assert library("verify", "--json") == 1
    fault, counts = lines(capsys)
    assert fault["file"] == str(path) and counts["faults"] == 1
    assert library("gc", "--retire", "cats") == 2


def test_adding_what_is_there_or_belongs_elsewhere(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert library("add", tmp_path / "made-1", "cats") == 0
    assert "cats@1 is there already" in capsys.readouterr().out
    other = adapter(tmp_path / "other", 9, "another-base")
    assert library("add", other, "cats") == 2
    assert "--new-base" in capsys.readouterr().err
    assert library("add", other, "cats", "--new-base", "--json") == 0
    assert lines(capsys)[0]["number"] == 3
    assert library("add", tmp_path / "nowhere", "cats") == 2 and library("list", "--library", tmp_path / "no") == 2


def test_nothing_heavy_is_imported(shelf: Path) -> None:
    text = (
        "import json, sys\nfrom tarsia.cli import main\n"
        "for arguments in json.loads(sys.argv[1]): assert main(['library', *arguments]) == 0, arguments\n"
        "print([name for name in ('torch', 'numpy', 'rich') if name in sys.modules], file=sys.stderr)"
    )
    verbs = [
        ["list"],
        ["list", "--json"],
        ["show", "cats"],
        ["tag", "cats", "x"],
        ["rollback", "cats"],
        ["gc"],
        ["verify"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", text, json.dumps(verbs)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_what_is_printed_is_there(shelf: Path, tmp_path: Path) -> None:
    assert {v.reference for v in Library.open(shelf).search(every=True)} == {"cats@1", "cats@2", "dogs@1"}
