"""``tarsia lab``: what there is, one chapter, all of them, and exit codes that tell a claim that fails."""

from __future__ import annotations

from types import MappingProxyType

import pytest
from labs.chapters_world import ROWS, toy

import tarsia.cli
from tarsia.labs import chapters

WRONG = {**ROWS, "sum: one and one": {"is": 3.0, "said": "two"}}


@pytest.fixture
def shelf(monkeypatch):
    """A lab of chapters of one's own."""
    monkeypatch.delenv("TARSIA_DATA", raising=False)
    monkeypatch.delenv("TARSIA_SMOL", raising=False)

    def put(*some):
        monkeypatch.setattr(chapters, "CHAPTERS", MappingProxyType({c.name: c for c in some}))

    return put


def lab(*arguments):
    return tarsia.cli.main(["lab", *map(str, arguments)])


def test_without_a_name_it_lists_every_chapter(capsys):
    assert lab() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert {"levels", "bits"} <= set(chapters.CHAPTERS)
    for chapter in chapters.CHAPTERS.values():
        assert chapter.name in out and chapter.question.split()[-1] in out


def test_a_claim_that_holds_and_one_that_fails(shelf, tmp_path, capsys):
    shelf(toy(), toy(WRONG, name="wrong"))
    assert lab("toy", "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "PASS toy: One and one is 2." in out and "toy  50% counting" in err
    assert "not measured: what needs data" in out
    assert lab("wrong", "--out", tmp_path) == 1
    assert "FAIL wrong: One and one is 2." in capsys.readouterr().out
    assert "**FAIL**" in (tmp_path / "wrong.md").read_text(encoding="utf8")
    assert lab("all", "--out", tmp_path) == 1
    listed = (tmp_path / "README.md").read_text(encoding="utf8")
    assert "[toy](toy.md)" in listed and "| FAIL |" in listed and "| PASS |" in listed


def test_all_says_what_it_skips(shelf, tmp_path, capsys):
    shelf(toy(), toy(name="rich", needs=("smol",)))
    assert lab("all", "--out", tmp_path) == 0
    assert "SKIPPED rich: needs smol" in capsys.readouterr().out
    assert not (tmp_path / "rich.md").exists()
    assert lab("rich", "--out", tmp_path) == 2
    assert "needs SmolLM2-135M" in capsys.readouterr().err


def test_redrawing_measures_nothing(shelf, tmp_path, capsys):
    shelf(toy())
    assert lab("toy", "--out", tmp_path) == 0
    page = (tmp_path / "toy.md").read_bytes()
    (tmp_path / "toy.md").unlink()
    shelf(toy(measure=None))
    assert lab("toy", "--out", tmp_path, "--redraw") == 0
    assert (tmp_path / "toy.md").read_bytes() == page
    assert lab("toy", "--out", tmp_path / "empty", "--redraw") == 2
    assert "no result to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["tyo"], ["given:   tyo", "did you mean toy?"]),
        (["toy", "--with", "data"], ["--with data", "NAME=FOLDER"]),
        (["toy", "--with", "house=/"], ["given:   house", "smol, data"]),
        (["toy", "--with", "data=/nowhere"], ["does not hold photographs", "/nowhere"]),
    ],
)
def test_mistakes_are_refused_in_words(shelf, tmp_path, capsys, arguments, words):
    shelf(toy())
    assert lab(*arguments, "--out", tmp_path) == 2
    err = capsys.readouterr().err
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []
