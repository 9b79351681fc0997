"""Which steps a plan rests on, in which state they are gone through, and what a plan leaves as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train import small

from tarsia.plan import foretell, plan, rehearse
from tarsia.plan.ledger import Category, Ledger
from tarsia.train.recipe import Recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small.world(tmp_path_factory.mktemp("world"))


def of_lengths(world: dict[str, Any], folder: Path, counts: list[int], **changes: Any) -> Recipe:
    """A recipe whose step n has a row of ``counts[n]`` words, and that trains much of the base."""
    probe = _recipe(world, _rows(folder, range(len(counts))), len(counts), **changes)
    with rehearse.rehearsing(probe, rehearse.Outline.of(probe.model), Ledger()) as (run, _):
        order = [run.mixture.row(n)[1] for n in range(len(counts))]
    told = [0] * len(counts)
    for step, row in enumerate(order):
        told[row] = counts[step]
    return _recipe(world, _rows(folder, told), len(counts), **changes)


def _rows(folder: Path, counts: Any) -> Path:
    path = folder / "rows.jsonl"
    lines = [{"question": "what is this? " * (n + 1), "answer": "a cat"} for n in counts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    return path


def _recipe(world: dict[str, Any], rows: Path, steps: int, **changes: Any) -> Recipe:
    values = {key: world[key] for key in ("model",)}
    part = {"method": "full", "select": "language", "lr": 1e-4}
    data = {"train": [{"path": str(rows)}]}
    given = {"parts": [part], "data": data, "batch": 1, "steps": steps, "precision": "float32", "device": "cpu"}
    return Recipe.of({**values, **given, "out": str(rows.parent / "out"), **changes})


def rehearsed(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that a plan of ``recipe`` goes through, in their order."""
    seen: list[int] = []
    step = rehearse.loop.one_step

    def noted(run: Any) -> Any:
        seen.append(run.step)
        return step(run)

    monkeypatch.setattr(rehearse.loop, "one_step", noted)
    plan(recipe)
    return seen


@pytest.mark.parametrize(
    "counts, through",
    [
        ([4, 1, 9, 2, 6], [2]),
        ([9, 1, 8, 2, 3], [0, 2]),  # the first is the largest of all: so is the largest of those after it
        ([3, 3], [1]),
    ],
)
def test_the_largest_step_has_states_beside_it(
    counts: list[int], through: list[int], world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = of_lengths(world, tmp_path, counts)
    assert rehearsed(recipe, monkeypatch)[: len(through)] == through
    # a full patch's states are its numbers twice, and AdamW counts its steps
    found = plan(recipe).categories
    assert found[Category.STATES] - 2 * found[Category.PATCHES] in range(1, 1000)


def test_a_first_step_that_is_not_gone_through_changes_nothing(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = of_lengths(world, tmp_path, [3, 3])
    without = plan(recipe)
    given = foretell.survey
    monkeypatch.setattr(foretell, "survey", lambda *args: replace(given(*args), steps=(0, 1)))
    through = plan(recipe)
    assert (through.step.peak, through.categories) == (without.step.peak, without.categories)
    assert through.phases == without.phases


def test_a_run_of_one_step_has_no_states(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rehearsed(of_lengths(world, tmp_path, [3]), monkeypatch) == [0]


def test_threads_are_the_recipes(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    prepare = rehearse.prepare

    def noted(recipe: Recipe, host: Any, threads: int) -> Any:
        seen.append((threads, torch.get_num_threads()))
        return prepare(recipe, host, threads)

    monkeypatch.setattr(rehearse, "prepare", noted)
    before = torch.get_num_threads()
    plan(of_lengths(world, tmp_path, [1], threads=before + 1))
    assert seen[-1] == (before + 1, before + 1) and torch.get_num_threads() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_is_left_of_a_plan_that_ends_in_the_middle(
    error: type[BaseException], world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise error

    recipe = of_lengths(world, tmp_path, [1], checkpointing=True)
    monkeypatch.setattr(rehearse.loop, "backward", breaks)
    before = left()
    with pytest.raises(error):
        plan(recipe)
    assert left() == before


def left() -> tuple[Any, ...]:
    """What a plan changes while it goes on."""
    from tarsia.train import memory

    state = torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    modes: Any = torch._C
    return (*state, list(memory._listeners), modes._len_torch_dispatch_stack(), torch.get_num_threads())
