"""``tarsia plan``: what is printed, what is drawn, what a run keeps beside its plan, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from train import small

import tarsia.cli
import tarsia.plan
from tarsia.cli import plan as command
from tarsia.core.errors import TrainingError
from tarsia.plan import calibrate, picture
from tarsia.plan.calibrate import Found
from tarsia.train import disk


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def recipe(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TARSIA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**world, "steps": 3, "warmup": 1, "out": str(tmp_path / "out")}), encoding="utf8")
    return path


def plan(*arguments: object) -> int:
    return tarsia.cli.main(["plan", *map(str, arguments)])


def test_phases_and_categories_are_shown(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(recipe) == 0
    out = capsys.readouterr().out
    words = {line.split()[0] for line in out.splitlines() if line}
    assert words >= {"load", "prepare", "forward", "backward", "update", "save"}
    assert words >= {"weights", "patches", "states", "activations"}
    assert "All " in out and "rows that the run draws were read" in out
    assert "--calibrate" in out
    assert out.splitlines()[-1].startswith("The whole process: ")
    assert not (recipe.parent / "out").exists()  # a plan leaves nothing behind


def test_json_and_the_picture(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.png"
    assert plan(recipe, "batch=2", "--json", "--picture", target) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["live"] == max(found["phases"].values())
    assert sum(found["categories"].values()) == found["step"]
    with Image.open(target) as shown:
        assert shown.width > 800 and len(shown.convert("RGB").getcolors(1 << 24) or ()) > 8


@pytest.mark.parametrize("work, phase", [("evaluate", "score"), ("generate", "token"), ("fold", "fold")])
def test_what_comes_after_training(work: str, phase: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(recipe, "--for", work, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["phases"][phase] > found["phases"]["prepare"] > 0
    assert found["live"] == max(found["phases"].values())


def test_whether_it_fits_is_said_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(recipe) == 0
    assert "it fits" in capsys.readouterr().out.splitlines()[0]


def test_more_rows_take_more(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = []
    for batch in (1, 4):
        assert plan(recipe, f"batch={batch}", "--json") == 0
        peaks.append(json.loads(capsys.readouterr().out)["step"])
    assert peaks[1] > 1.5 * peaks[0]


def test_a_card_tells_the_time(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(recipe, "--card", "RTX 4090") == 0
    assert "Time: " in (out := capsys.readouterr().out) and "RTX 4090" in out
    assert "reserved" in out and "context" in out  # a plan of the card's memory too


def test_a_run_is_kept_beside_its_plan(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--history") == 0
    assert "No run was kept yet" in capsys.readouterr().out
    assert tarsia.cli.main(["train", str(recipe)]) == 0
    assert "planned: " in capsys.readouterr().err
    assert plan("--history", "--json") == 0
    (entry,) = map(json.loads, capsys.readouterr().out.splitlines())
    pairs = {pair["name"]: pair for pair in entry["pairs"]}
    assert abs(pairs["peak of a step"]["off"]) < 0.02
    for name in {"weights", "patches", "states", "gradients"} & pairs.keys():
        assert pairs[name]["planned"] == pytest.approx(pairs[name]["measured"], rel=0.01), name
    assert plan("--history") == 0
    assert "median" in capsys.readouterr().out


def test_a_run_that_makes_no_step_is_not_kept_again(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert tarsia.cli.main(["train", str(recipe), "--quiet"]) == 0
    capsys.readouterr()
    assert plan("--history", "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_defect_of_the_plan_is_said_and_the_run_goes_on(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(_: object) -> None:
        raise ZeroDivisionError("nothing\nto divide by")

    monkeypatch.setattr(tarsia.plan, "plan", defect)
    assert tarsia.cli.main(["train", str(recipe), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == ["not planned: a defect of the plan, please report: ZeroDivisionError: nothing"]
    assert Path(out.strip()).is_dir()


@pytest.mark.parametrize("step", ["write_synced", "replace"])
def test_nothing_is_left_of_a_picture_that_failed(
    step: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path, *_: object) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((disk, step, refuses) if step == "write_synced" else (os, step, refuses)))
    monkeypatch.setattr(picture, "picture", lambda _: b"a picture")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(TrainingError, match="disk is full"):
        command._draw(None, tmp_path / "pictures" / "plan.png")  # type: ignore[arg-type]
    assert list((tmp_path / "pictures").iterdir()) == []


def test_no_plan(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tarsia.cli.main(["train", str(recipe), "--no-plan"]) == 0
    assert "planned" not in capsys.readouterr().err
    assert plan("--history") == 0
    assert "No run was kept yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), ["nothing to plan", "tarsia plan recipes/belt.yaml"]),
        (("missing.yaml",), ["missing.yaml"]),
        (("RECIPE", "--card", "RTX 9999"), ["RTX 9999", "RTX 4090"]),
        (("RECIPE", "model=nowhere"), ["nowhere"]),
        (("RECIPE", "--picture", "/proc/plan.png"), ["picture"]),
        (("RECIPE", "--picture", "plan.jpg"), ["plan.jpg", "*.png", "--picture plan.png"]),
        (("--wall", "xyz"), ["xyz"]),
        (("RECIPE", "--history"), ["--history alone"]),
        (("RECIPE", "--wall"), ["--wall alone"]),
        (("--wall", "--history"), ["--history alone"]),
    ],
)
def test_refusals(arguments: tuple[str, ...], words: list[str], recipe: Path, capsys: Any) -> None:
    assert plan(*(str(recipe) if word == "RECIPE" else word for word in arguments)) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert "Traceback" not in err


def test_the_wall(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--wall", "13B", "--json") == 0
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert figures and all(sum(line["bytes"] for line in figure["lines"]) == figure["bytes"] for figure in figures)
    assert plan("--wall") == 0
    assert "112" in capsys.readouterr().out


def test_a_calibration_is_of_the_recipes_threads(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def measured(**_: object) -> Found:
        seen.append(torch.get_num_threads())
        return Found(SimpleNamespace(spread=0.02), "It can not be kept: no room.")  # type: ignore[arg-type]

    monkeypatch.setattr(calibrate, "calibrate", measured)
    monkeypatch.setattr(calibrate, "kept", lambda: seen.append(torch.get_num_threads()))
    wanted = torch.get_num_threads() + 1
    assert plan(recipe, f"threads={wanted}", "--calibrate") == 0
    assert seen == [wanted, wanted] and torch.get_num_threads() == wanted - 1
    assert "can not be kept: no room" in capsys.readouterr().err
