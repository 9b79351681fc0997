"""tarsia library import, push and pull, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from library import shelved

from tarsia.adapter import save
from tarsia.cli import main


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TARSIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TARSIA_LIBRARY", str(tmp_path / "near"))
    save(shelved.adapter(), tmp_path / "a")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert main([str(word) for word in ("library", *words)]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_there_and_back(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = root / "far"
    assert "cat@1" in said(capsys, "import", root / "a", "cat")
    assert "cat is cat@1 at" in said(capsys, "push", "cat", "--to", far)
    assert "was there already; 0 B sent" in said(capsys, "push", "cat@1", "--to", far)
    assert said(capsys, "pull", far).startswith("cat@1  ")
    line = json.loads(said(capsys, "pull", far, "--json"))
    assert (line["name"], line["number"]) == ("cat", 1)
    pulled = json.loads(
        said(capsys, "pull", far, "cat", "--library", root / "other", "--name", "dog", "--tag", "new", "--json")
    )
    assert (pulled["name"], pulled["number"], pulled["hash"]) == ("dog", 1, line["hash"]) and "new" in pulled["tags"]
    assert "already" in said(capsys, "pull", far, "cat", "--library", root / "other", "--name", "dog")
    assert any((root / "cache/remotes/contents").iterdir())


def test_an_empty_remote_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "far").mkdir()
    assert said(capsys, "pull", root / "far") == f"nothing there: {root / 'far'}\n"
    assert said(capsys, "pull", root / "far", "--json") == ""
    assert "nothing there" in said(capsys, "pull", root / "nowhere", code=2)


@pytest.mark.parametrize(
    "words, match",
    [
        (("pull", "FAR", "dog"), "no such version"),
        (("pull", "nosuch://x", "dog"), "can not be used"),
        (("pull", "FAR", "a", "b", "--name", "c"), "One name"),
        (("pull", "FAR", "dog", "--cache-limit", "big"), "no size"),
        (("push", "dog", "--to", "FAR"), "no library"),
        (("import", "nowhere", "cat"), "no such adapter"),
    ],
)
def test_refusals(root: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], match: str) -> None:
    err = said(capsys, *(str(root / "far") if word == "FAR" else word for word in words), code=2)
    assert match in err and "Traceback" not in err


def test_peft_without_its_base(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tarsia.json", "probe.safetensors"):
        (root / "a" / name).unlink()
    assert "--base" in said(capsys, "import", root / "a", "cat", code=2)
