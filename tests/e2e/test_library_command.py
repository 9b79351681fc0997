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
from tarsia.cli import shelved
from tarsia.cli.export import where
from tarsia.core.errors import AdapterError
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
    assert "nothing there" in capsys.readouterr().out
    assert library("list", "birds", "--json") == 0 and capsys.readouterr().out == ""


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


def test_paths_are_never_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / ("a-long-name-" * 10) / ("and another " * 10).strip() / "library"
    assert library("add", adapter(tmp_path / "made", 1), "cats", "--why", "x" * 300, "--library", root) == 0
    assert library("show", "cats", "--library", root) == 0
    out = capsys.readouterr().out
    (folder,) = (root / "objects").glob("*/*")
    assert str(folder) in out
    assert "x" * 300 not in out and "…" in out, "what is no path still is"


@pytest.mark.parametrize("given, meant", [("cats@1", True), ("cats", True), ("dog#1a2b", True), ("birds", False)])
def test_a_reference_without_its_prefix_is_told(shelf: Path, given: str, meant: bool) -> None:
    for act in (where, shelved.folder):
        if not meant and act is shelved.folder:
            assert act(given) == Path(given)
            continue
        with pytest.raises(AdapterError, match="no such adapter") as refused:
            act(given)
        assert (f"library:{given}" in str(refused.value)) is meant


def test_a_runs_folder_is_added(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "run" / "adapter", 7)
    (tmp_path / "run" / "log.jsonl").write_text("{}")
    assert library("add", tmp_path / "run", "birds") == 0
    assert capsys.readouterr().out.startswith("birds@1  "), "and nothing of the run is said to be left out"
    assert library("add", "library:birds", "owls") == 0
    held = Library.open(shelf)
    assert held.version("birds").hash == held.version("owls").hash


def test_what_is_put_right_by_adding_again_is_said(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert library("add", tmp_path / "made-1", "cats") == 0
    out = capsys.readouterr().out
    assert "damaged" not in out and "current is cats@2" in out and "rollback cats --to 1" in out
    assert library("add", tmp_path / "made-2", "cats") == 0
    assert "current is" not in capsys.readouterr().out
    held = Library.open(shelf)
    path = held.folder(held.version("cats@1")) / content.TENSORS
    for options in ([], ["--json"]):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1])
        for asked in ([], ["--repair"]):
            assert library("verify", *asked) == 1
            out = capsys.readouterr().out
            assert "add the same adapter again" in out and held.version("cats@1").hash[:12] in out.splitlines()[-1]
        assert library("add", tmp_path / "made-1", "cats", *options) == 0
        out = capsys.readouterr().out
        assert '"mended": true' in out if options else "damaged files were put right" in out
        assert library("verify") == 0
        assert "add the same" not in capsys.readouterr().out


def test_what_a_tag_points_at_is_given_up_as_the_refusal_says(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert library("tag", "cats@2", "trial") == 0 and library("tag", "cats@2", "current") == 2
    assert library("gc", "--retire", "cats@2") == 2
    told = capsys.readouterr().err
    for words in ("rollback cats --to 1", "tag cats trial --remove"):
        assert f"tarsia library {words}" in told
        assert library(*words.split()) == 0
    assert library("gc", "--retire", "cats@2") == 0
    assert library("gc", "--retire", "dogs@1") == 2
    assert "--to" not in capsys.readouterr().err, "there is no other"
