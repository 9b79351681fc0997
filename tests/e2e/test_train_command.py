"""``tarsia train`` from a file to an adapter's folder, and what it refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from train import small

import tarsia.cli
from tarsia.cli.train import Going
from tarsia.train.events import Event, Step


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def recipe(world: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**world, "steps": 4, "warmup": 1, "out": str(tmp_path / "out")}), encoding="utf8")
    return path


def train(recipe: Path, *arguments: str) -> int:
    return tarsia.cli.main(["train", str(recipe), *arguments])


def test_events_as_lines(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(recipe, "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "started" and kinds[-1] == "finished"
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
    assert Path(events[-1]["folder"], "adapter_model.safetensors").is_file()


def test_what_is_trained_is_shown_before_the_first_step(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(recipe) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert out.startswith("trains ") and out.splitlines()[0].endswith("in 4 steps")
    shown = {tuple(line[:3]) for line in lines[2:-1]}
    assert shown >= {("full", "projector", "proj"), ("lora", "vision", "q"), ("lora", "language", "v")}
    assert lines[-1][0] == "adapter:"
    assert "step 4/4: loss" in err
    assert "peak learning rates: full 0.001; lora 0.003; lora 0.01" in out


def test_quiet(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # in a process that other tests have grown, a plan of the whole process may be far off, and says so
    assert train(recipe, "--quiet", "--no-plan") == 0
    assert capsys.readouterr() == (f"{tmp_path / 'out' / 'adapter'}\n", "")


def test_an_override_counts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(recipe, "steps=2", "parts.1.rank=1", "--json") == 0
    started = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (started["steps"], started["recipe"]["parts"][1]["rank"]) == (2, 1)


def test_a_second_call_goes_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(recipe, 3, signal.SIGINT, "save_every=2") == 130
    assert train(recipe) == 0
    out, err = capsys.readouterr()
    assert "goes on after step 2" in out and "done already" not in out + err


def test_a_finished_run_says_that_it_is(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(recipe, "--quiet") == 0
    assert "done already" not in "".join(capsys.readouterr())
    assert train(recipe, "--quiet") == 0
    assert "All 4 steps were done already" in capsys.readouterr().err


def stopped(recipe: Path, step: int, number: int, *arguments: str) -> int:
    """Train, and send this process a signal after ``step``."""
    see = Going.see

    def seen(self: Going, event: Event) -> None:
        see(self, event)
        if isinstance(event, Step) and event.step == step:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Going, "see", seen)
        return train(recipe, *arguments)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_says_how_to_go_on(
    recipe: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert stopped(recipe, 1, number, "--quiet") == code
    said = "interrupted after step 1: run the same command to go on (it has no checkpoint yet, and begins anew)\n"
    assert capsys.readouterr() == ("", said)
    assert stopped(recipe, 3, number, "save_every=2", "--quiet") == code
    assert "after step 3: run the same command to go on (its checkpoint is of step 2)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_not_begun_does_not_go_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tarsia.train.loop.fit", interrupted)
    assert train(recipe, "--no-plan") == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_evaluation_during_the_run(recipe: Path, world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(recipe.read_text(encoding="utf8"))
    values["data"]["eval"] = [{"path": world["data"]["train"][0]["path"], "name": "held-out", "limit": 3}]
    recipe.write_text(yaml.safe_dump({**values, "eval_every": 2}), encoding="utf8")
    assert train(recipe, "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [event for event in found if event["event"] == "evaluated"]
    assert [event["step"] for event in found] == [2, 4]
    assert [result["source"] for result in found[0]["results"]["results"]] == ["held-out"]
    assert "rows" not in found[0]["results"]["results"][0]


def test_evaluation_is_shown(recipe: Path, world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(recipe.read_text(encoding="utf8"))
    values["data"]["eval"] = [{"path": world["data"]["train"][0]["path"], "name": "held-out", "limit": 3}]
    recipe.write_text(yaml.safe_dump(values), encoding="utf8")
    assert train(recipe) == 0
    out = capsys.readouterr().out
    assert "after step 4" in out
    assert "held-out" in out and "%" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["stps=3"], ["stps", "did you mean steps?"]),
        (["steps"], ["key=value"]),
        (["parts.1.select=language.*.{qq}"], ["qq", "allowed:"]),
        (["parts.1.select=language.9.{q}"], ["language.9.{q}", "allowed: 0..2"]),
        (["eval_every=2"], ["eval_every 2", "data.eval"]),
        (["model=/no/such/model"], ["/no/such/model"]),
        (["data.train.0.path=/no/such/rows.jsonl"], ["/no/such/rows.jsonl"]),
        (["--quiet", "--json"], ["--json", "--quiet"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refusals(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert train(recipe, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for word in words:
        assert word in err
    assert not (tmp_path / "out" / "adapter").exists()


def test_no_such_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "none.yaml") == 2
    assert "none.yaml" in capsys.readouterr().err


def test_two_sources_to_evaluate_of_one_name(
    recipe: Path, world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(recipe.read_text(encoding="utf8"))
    values["data"]["eval"] = [{"path": world["data"]["train"][0]["path"]}] * 2
    recipe.write_text(yaml.safe_dump(values), encoding="utf8")
    assert train(recipe) == 2
    assert "one name" in capsys.readouterr().err
