"""Every recipe in recipes/ is one that runs: read, resolved, its parts attached, and trained for two steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from train import small

from tarsia.adapter import open_base
from tarsia.base import resolve
from tarsia.core.errors import ConfigError
from tarsia.core.method import find
from tarsia.core.select import select
from tarsia.labs.demo import GENERAL, TASK
from tarsia.train import Finished, Recipe, fit

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
WRITTEN = {f"demo-out/data/{name}{held}.parquet" for name in (*TASK, *GENERAL) for held in ("", "-held-out")}
"""Files that the demo writes."""


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return small.world(tmp_path_factory.mktemp("recipes"))


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"belt", "task-only", "vision-lora", "projector-only"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_rows_are_those_that_the_demo_writes(path):
    recipe = Recipe.load(path)
    assert {source.path for source in (*recipe.data.train, *recipe.data.eval)} <= WRITTEN
    assert recipe.out == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_trains(path, values, tmp_path):
    """Two steps on a tiny base, with its own parts and the same number of sources."""
    recipe = Recipe.load(path)
    sources = [
        f"data.train.{i}.path={small.rows(tmp_path / f'rows-{i}.jsonl', 4, (1,))}"
        for i in range(len(recipe.data.train))
    ]
    short = [
        "steps=2",
        "epochs=null",
        "warmup=0",
        "threads=1",
        "device=cpu",
        f"model={values['model']}",
        f"out={tmp_path / 'out'}",
    ]
    if recipe.features is not None:
        short.append(f"features.path={tmp_path / 'features'}")
    events = list(fit(Recipe.load(path, [*sources, *short])))
    assert isinstance(events[-1], Finished)
    assert {line.method for line in events[0].coverage} == {part.method for part in recipe.parts}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_selections_fit_the_embedded_base(path):
    recipe = Recipe.load(path)
    try:
        resolve(recipe.model)
    except ConfigError:
        pytest.skip(f"{recipe.model} is not in this checkout")
    host = open_base(recipe.model)
    for part in recipe.parts:
        method = find(part.method)
        assert select(part.select, host.sites, method.kinds, method.roles)


def test_replay_is_a_tenth():
    shares = {source.title: source.weight for source in Recipe.load(FOLDER / "belt.yaml").data.train}
    assert sum(shares[name] for name in GENERAL) == pytest.approx(0.1)
    assert sum(shares.values()) == pytest.approx(1)
