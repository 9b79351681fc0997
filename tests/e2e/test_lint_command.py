"""``tarsia lint`` from a recipe's file to its exit code, without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from train import small

import tarsia.cli
from tarsia.cli.lint import sources
from tarsia.train.recipe import Recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe whose base has no weights any more."""
    folder = tmp_path_factory.mktemp("world")
    values = small.world(folder)
    for weights in (folder / "base").glob("*.safetensors"):
        weights.unlink()
    values["data"]["train"] = [
        {"path": str(small.rows(folder / "task.jsonl", 20)), "weight": 0.8},
        values["data"]["train"][1],
    ]
    values["data"]["eval"] = [{"path": str(small.rows(folder / "held.jsonl", 20, (0,)))}]
    lines = (folder / "held.jsonl").read_text().splitlines()
    held = [{**json.loads(line), "question": f"which of these is {i}?"} for i, line in enumerate(lines)]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return values


@pytest.fixture
def recipe(world: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(world), encoding="utf8")
    return path


def lint(recipe: Path, *arguments: str) -> int:
    return tarsia.cli.main(["lint", str(recipe), *arguments])


def test_findings_as_lines(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = lint(recipe, "--json")
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0 and all(f["severity"] != "error" for f in findings), findings
    assert all(set(f) == {"code", "severity", "source", "what", "count", "rows", "like", "do"} for f in findings)
    assert "few-rows" in {f["code"] for f in findings}


def test_the_mask_and_the_sources_are_printed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(recipe, "--rows", "4") == 0
    out = capsys.readouterr().out
    assert "task:0" in out and "[picture 1: 16 tokens]" in out and "<|im_end|>" in out
    assert "Only 4 of 20 rows were looked at" in out and "--rows 0" in out


def test_warnings_count_where_asked(recipe: Path) -> None:
    assert lint(recipe, "steps=100000", "--json") == 0  # walked too often is a warning
    assert lint(recipe, "steps=100000", "--json", "--strict") == 1


def test_an_error_is_exit_1_and_names_its_row(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small.rows(tmp_path / "broken.jsonl", 24)
    next(tmp_path.glob("broken-0-*.png")).unlink()
    page = tmp_path / "page.html"
    assert lint(recipe, f"data.train.0.path={path}", "--page", str(page)) == 1
    out = capsys.readouterr().out
    assert "error missing-picture  broken" in out and "broken:0" in out and "1 error," in out
    assert "missing-picture" in page.read_text()


def test_a_selection_is_held_against_the_sites(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(recipe, "parts.1.select=vision.9.q", "--json") == 1
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "no-site" in {f["code"] for f in findings}


@pytest.mark.parametrize("wrong", ["stepz=3", "data.train.0.path=gone.jsonl", "model=no-such-model", "--rows=-1"])
def test_a_recipe_that_can_not_be_read_is_refused(recipe: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(recipe, wrong) == 2
    assert capsys.readouterr().err.startswith("tarsia: ")


def test_rows_drawn_follow_the_weights(world: dict[str, Any]) -> None:
    task, talk, held = sources(Recipe.of(world))
    assert (task.drawn, talk.drawn, held.trained) == (pytest.approx(25.6), pytest.approx(6.4), False)  # of 8 * 2 * 2
    twice = {**world["data"], "eval": [world["data"]["train"][0] | {"name": "task"}]}
    del twice["eval"][0]["weight"]
    assert [s.name for s in sources(Recipe.of({**world, "data": twice}))] == ["task", "talk", "task (eval)"]


def test_recipes_of_the_demo_are_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tarsia.labs import sources as made

    shutil.copytree(Path(__file__).parents[2] / "recipes", tmp_path / "recipes")
    for name, maker in {"materials": made.materials, "bins": made.bins, **made.WORLD}.items():
        made.write(tmp_path / f"demo-out/data/{name}.parquet", maker(30, "train"))
        made.write(tmp_path / f"demo-out/data/{name}-held-out.parquet", maker(20, "held-out"))
    monkeypatch.chdir(tmp_path)
    for recipe in sorted((tmp_path / "recipes").glob("*.yaml")):
        assert lint(recipe, "--json") == 0, recipe.name


def test_a_terminal_is_shown_the_two_ends_of_a_long_row(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "long.jsonl"
    question = "begun " + "word " * 3000 + "asked"
    rows.write_text(json.dumps({"question": question, "answer": "a cat"}) + "\n")
    page = tmp_path / "page.html"
    lint(recipe, f"data.train.0.path={rows}", "--page", str(page))
    out = capsys.readouterr().out
    assert "more tokens …" in out and "begun" in out and "asked" in out and "a cat" in out
    assert 20 < out.count("word") < 500
    assert page.read_text().count("word") >= 3000


def test_what_is_shown_and_left_out_of_a_row_adds_up() -> None:
    from tarsia.data.lint.view import Run, What, ends

    row = (Run(What.PICTURE, False, "[picture 1: 900 tokens]", 900), Run(What.TEXT, False, "ab" * 50, 50))
    assert ends(row, 51) == (row, 0, ())
    head, left, tail = ends((*row, Run(What.TEXT, True, "yes", 1)), 20)
    assert [run.tokens for run in (*head, *tail)] == [900, 9, 9, 1] and left == 32
    assert tail[-1].text == "yes" and len(head[1].text) == len(tail[0].text) == 18
