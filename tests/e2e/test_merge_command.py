"""``tarsia merge``: what is told before, what is written and proved, what is left of each task, what is refused."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from e2e.made_adapters import saved
from PIL import Image
from train import small

import tarsia.cli
from tarsia.adapter import FourBits, Host, load, open_base, resolution_of, save
from tarsia.cli import merge as verb
from tarsia.cli import merging
from tarsia.merge.delta import deltas


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def host(folder: Path) -> Host:
    return open_base(str(small.base(folder / "base")))


@pytest.fixture(scope="module")
def parents(folder: Path, host: Host) -> list[str]:
    parts = (
        [("lora", "language.*.{q,v}", {"rank": 2})],
        [("rslora", "language.*.{q,up}", {"rank": 3}), ("lora", "vision.*.q", {"rank": 2})],
    )
    return [str(saved(host, folder / name, p, seed=i)) for i, (name, p) in enumerate(zip("ab", parts, strict=True))]


@pytest.fixture(scope="module")
def task(folder: Path) -> Path:
    return small.rows(folder / "task.jsonl", 4)


def merge(*arguments: object) -> int:
    return tarsia.cli.main(["merge", *map(str, arguments)])


def test_it_is_written_proved_and_told_of(
    parents: list[str], host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert merge(*parents, "--out", out, "--method", "task_arithmetic", "--weights", "1,-0.5", "--scale", 0.5) == 0
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {out.stat().st_mode & 0o666}
    told = capsys.readouterr().out
    assert "lost to signs" in told
    assert "proved on a parent's probe" in told
    found = load(out)
    assert found.probe is not None
    assert found.card["merged"]["way"] == "task_arithmetic"
    assert found.card["names"] == ["a", "b"]
    one, two = (deltas(load(parent), host) for parent in parents)
    for path, delta in deltas(found, host).items():
        wanted = sum(0.5 * w * d[path].weight() for w, d in ((1, one), (-0.5, two)) if path in d)
        assert torch.allclose(delta.weight(), torch.as_tensor(wanted), atol=1e-6)


def test_one_adapter_at_weight_1_is_itself(parents: list[str], tmp_path: Path) -> None:
    assert merge(parents[1], "--out", tmp_path / "out", "--method", "ties", "--weights", "1") == 0
    before, after = load(parents[1]), load(tmp_path / "out")
    for path, patched in before.patches.items():
        assert after.patches[path].method == patched.method
        assert all(torch.equal(after.patches[path].tensors[k], v) for k, v in patched.tensors.items())


def test_tasks_are_measured_with_base_parent_and_result(
    parents: list[str], task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    arguments = [*parents, "--out", tmp_path / "out", "--rows", f"a={task}", "--rows", task, "--limit", 3]
    assert merge(*arguments, "--max-new-tokens", 4, "--metric", "contains", "--report", page, "--json") == 0
    said = capsys.readouterr()
    assert "no rows for b" in said.err
    told = json.loads(said.out)
    first, second = told["tasks"]
    assert first["task"] == "a"
    assert first["rows"] == 3
    assert first["parent"] is not None
    assert second["parent"] is None
    assert told["interference"]["whole"]["pairs"][0]["sites"] == 3
    assert told["coverage"]["language"] == {"merged": 9, "parents": [6, 6]}
    assert "proved on the rows" in told["proof"]
    text = page.read_text()
    assert "Tasks" in text
    assert "weight of b" in text
    assert "<script" not in text
    with Image.open(page.with_suffix(".png")) as shown:
        assert shown.width > 800
        assert len(shown.convert("RGB").getcolors(1 << 24) or ()) > 8


def test_what_is_kept_can_fail_it(
    parents: list[str], task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = (merging.Task("a", 4, 0.1, 0.8, 0.4), merging.Task("b", 4, 0.1, 0.8, 0.8))
    monkeypatch.setattr(merging, "_tasks", lambda job: tasks)
    arguments = [*parents, "--rows", f"a={task}", "--json"]
    assert merge(*arguments, "--out", tmp_path / "one", "--min-kept", 0.6) == 1
    assert "a keeps 50.0%" in capsys.readouterr().err
    assert merge(*arguments, "--out", tmp_path / "two", "--min-kept", 0.5) == 0
    capsys.readouterr()
    for number, parent in enumerate((None, 0.0)):
        unknown = (merging.Task("a", 4, 0.1, parent, 0.4),)
        monkeypatch.setattr(merging, "_tasks", lambda job, unknown=unknown: unknown)
        assert merge(*arguments, "--out", tmp_path / f"un{number}", "--min-kept", 0.1) == 1
        assert ("nothing kept was measured", "has nothing right")[number] in capsys.readouterr().err


@pytest.mark.parametrize("named", ["aa={}", "{}"], ids=["misspelt", "no name"])
def test_a_share_of_nobody_s_task_is_refused(
    named: str, parents: list[str], task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = named.format(task)
    assert merge(*parents, "--out", tmp_path / "out", "--rows", rows, "--min-kept", 0.9) == 2
    told = capsys.readouterr().err
    assert "allowed: a, b" in told
    assert ("did you mean a" in told) == (named != "{}")
    assert not (tmp_path / "out").exists()


def test_the_scale_is_the_best_of_the_grid(
    parents: list[str], task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*parents, "--tune", task, "--grid", "0.25,0.5,2", "--limit", 2, "--max-new-tokens", 2, "--json"]
    assert merge(*arguments, "--out", tmp_path / "out") == 0
    told = json.loads(capsys.readouterr().out)
    assert [line[0] for line in told["tried"]] == [0.25, 0.5, 2.0]
    right = max(told["tried"], key=lambda line: (line[1], -line[2]))
    assert told["scale"] == right[0]
    found = load(tmp_path / "out")
    assert found.card["merged"]["scale"] == right[0]
    assert found.card["tuned"]["tried"] == told["tried"]


@pytest.mark.parametrize(
    "peak, ends", [(0.7, (0.2, 1.5)), (2.0, (0.2, 2.94)), (0.1, (0.073, 1.5)), (99.0, (0.2, 11.294))]
)
def test_scales_beyond_the_grid_are_tried_where_its_last_is_best(
    peak: float, ends: tuple[float, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merging, "_at", lambda job, scale: (0.0, abs(scale - peak)))
    job: Any = SimpleNamespace(args=SimpleNamespace(grid=None))
    scale, tried = merging._tuned(job)
    assert scale == min((line[0] for line in tried), key=lambda s: abs(s - peak))
    assert (tried[0][0], tried[-1][0]) == pytest.approx(ends)
    assert ("a better one may lie beyond" in capsys.readouterr().err) == (peak == 99.0)


def test_a_recipe_says_the_same_and_what_is_given_wins(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {
        "adapters": parents,
        "method": "ties",
        "weights": [1, 0.5],
        "density": 0.4,
        "rank": 3,
        "components": {"vision": 0.5},
        "out": str(tmp_path / "out"),
    }
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(yaml.safe_dump(values))
    assert merge("--recipe", recipe, "--json", "--scale", 0.7) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["options"]["density"] == 0.4
    assert told["weights"] == [1.0, 0.5]
    assert told["scale"] == 0.7
    assert any(told["errors"].values())
    assert load(tmp_path / "out").card["merged"]["components"] == {"vision": 0.5}
    recipe.write_text(yaml.safe_dump({**values, "ways": 1}))
    assert merge("--recipe", recipe) == 2
    told = capsys.readouterr().err
    assert str(recipe) in told
    assert "did you mean" in told
    recipe.write_text(yaml.safe_dump({**values, "rank": "high"}))
    assert merge("--recipe", recipe) == 2
    assert "rank" in capsys.readouterr().err


def test_the_ways_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert merge("--list") == 0
    told = capsys.readouterr().out
    assert "arXiv:2306.01708" in told
    assert "Which one?" in told
    assert "knots_ties" in told
    assert merge("--list", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ties"]["combine"] == "ties"


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ((), "needs adapters"),
        (("{a}", "{b}"), "--out"),
        (("{a}", "{b}", "--out", "{out}", "--method", "tie"), "did you mean ties"),
        (("{a}", "{b}", "--out", "{out}", "--density", 0.5), "no option 'density'"),
        (("{a}", "{b}", "--out", "{out}", "--weights", "1"), "one weight for each"),
        (("{a}", "{b}", "--out", "{out}", "--weights", "1,x"), "0.5,0.5"),
        (("{a}", "{b}", "--out", "{out}", "--component", "eyes=1"), "vision=0.5"),
        (("{a}", "{b}", "--out", "{out}", "--option", "density"), "NAME=VALUE"),
        (("{a}", "{b}", "--out", "{out}", "--grid", "1"), "--tune"),
        (("{a}", "{b}", "--out", "{out}", "--min-kept", "1"), "--rows"),
        (("{a}", "{b}", "--out", "{a}"), "there already"),
        (("{a}", "{a}", "--out", "{out}"), "one name"),
        (("{a}", "--out", "{out}", "--report", "{out}.html"), "nothing between"),
        (("{a}", "{out}", "--out", "{out}"), "no such adapter"),
        (("{a}", "{b}", "--out", "{out}", "--scale", "0"), "Nothing would be left"),
        (("{a}", "{b}", "--out", "{out}", "--weights=-1,1"), "--method task_arithmetic"),
        (("{a}", "{b}", "--out", "{out}", "--weights", "-1,1"), "--method task_arithmetic"),
        (("{a}", "{b}", "--out", "{out}", "--weights", "-.5,1e0", "--method", "ties"), "vote for itself"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: Any, wanted: str, parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [str(text).format(a=parents[0], b=parents[1], out=out) for text in arguments]
    assert merge(*given) == 2
    assert wanted in capsys.readouterr().err
    assert not out.exists()


def test_a_result_that_is_not_what_was_merged_fails(
    parents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is read again is another adapter than the one that was probed."""
    true = merging.load
    read = [str(parent) for parent in parents]
    monkeypatch.setattr(
        merging, "load", lambda folder, *host: true(folder if str(folder) in read else parents[0], *host)
    )
    assert merge(*parents, "--out", tmp_path / "out", "--method", "task_arithmetic") == 2
    assert "not those of the day" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mean_of_adapters_that_share_nothing_says_what_each_counts(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = saved(host, tmp_path / "one", [("lora", "language.*.q", {"rank": 2})])
    two = saved(host, tmp_path / "two", [("lora", "vision.*.q", {"rank": 2})])
    assert merge(one, two, "--out", tmp_path / "mean") == 0
    told = capsys.readouterr().err
    assert "one 0.5, two 0.5" in told
    assert "--method task_arithmetic keeps them whole" in told
    assert merge(one, two, "--out", tmp_path / "sum", "--method", "task_arithmetic") == 0
    assert "counts as its share" not in capsys.readouterr().err


def test_adapters_of_two_forms_of_a_base_are_refused_by_name(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = load(parents[0])
    assert one.fingerprint is not None
    mark = replace(one.fingerprint, quantisation=FourBits("nf4").mark({"language.0.q"}))
    save(replace(one, fingerprint=mark, probe=None), tmp_path / "coarse")
    assert merge(tmp_path / "coarse", parents[1], "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "different forms" in told
    assert "the files' own numbers" in told
    assert "allow" not in told.replace("allowed:", "")


def test_the_resolution_of_training_is_kept_and_two_are_refused(
    parents: list[str], host: Host, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sized(folder: str, size: int) -> Path:
        save(replace(load(folder), card={"recipe": {"resolution": size}}), tmp_path / f"{Path(folder).name}{size}")
        return tmp_path / f"{Path(folder).name}{size}"

    one, two, other = sized(parents[0], 16), sized(parents[1], 16), sized(parents[1], 24)
    out = tmp_path / "out"
    assert merge(one, two, "--out", out) == 0
    capsys.readouterr()
    asked = ["eval", host.name, "--adapter", str(out), "--data", str(task), "--limit", "1", "--max-new-tokens", "1"]
    assert tarsia.cli.main(asked) == 0
    assert "at most 16 pixels" in capsys.readouterr().err
    assert merge(one, other, "--out", tmp_path / "no") == 2
    assert "different sizes" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert merge(one, other, "--out", tmp_path / "yes", "--resolution", 24) == 0
    assert resolution_of(tmp_path / "yes") == (24,)
    assert "trained at resolution 16" in capsys.readouterr().err


def test_what_is_not_proved_yet_has_no_name(
    parents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the proof: nothing is there, and nothing was there while it ran."""
    out, there = tmp_path / "out", []

    def stopped(*given: object) -> None:
        there.append(out.exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "prove", stopped)
    parser = argparse.ArgumentParser()
    verb.options(parser)
    with pytest.raises(KeyboardInterrupt):
        verb.run(parser.parse_args([*parents, "--out", str(out)]))
    assert there == [False]
    assert not list(tmp_path.iterdir())


def test_a_parent_that_names_no_base_is_told_of(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(replace(load(parents[1]), fingerprint=None), tmp_path / "silent")
    assert merge(parents[0], tmp_path / "silent", "--out", tmp_path / "out") == 0
    assert "silent does not say which base" in capsys.readouterr().err
    assert [one["fingerprint"] is None for one in load(tmp_path / "out").card["merged"]["parents"]] == [False, True]


def test_the_size_of_whole_weights_is_told_before_and_a_rank_advised(
    parents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(*parents, "--out", tmp_path / "out", "--method", "ties") == 0
    made = load(tmp_path / "out")
    whole = [one for one in made.patches.values() if one.method == "full"]
    told = capsys.readouterr().err
    held = sum(one.tensors["weight"].nbytes for one in whole)
    assert f"up to {held / 1024:.1f} KiB at {len(whole)} sites" in told
    assert "--rank 5" in told
    for number, quiet in enumerate((("--rank", "5", "--method", "ties"), ("--method", "core_ties"), ())):
        assert merge(*parents, "--out", tmp_path / str(number), *quiet) == 0
        assert "whole weights" not in capsys.readouterr().err
        assert all(one.method != "full" for one in load(tmp_path / str(number)).patches.values())
    monkeypatch.setattr(merging, "merge", lambda *_, **__: pytest.fail("computed before it was told"))
    with pytest.raises(pytest.fail.Exception):
        merge(*parents, "--out", tmp_path / "late", "--method", "ties")
    assert "--rank 5" in capsys.readouterr().err
