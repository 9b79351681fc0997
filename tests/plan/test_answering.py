"""Answering, scoring and folding without numbers, held to what they really take."""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench.grid.measure import _everything, borrowed
from bench.grid.rows import Rows
from bench.grid.worlds import World, build, speak
from tarsia.core.attach import merge
from tarsia.evaluate.choose import chances
from tarsia.evaluate.generate import say
from tarsia.plan import answering
from tarsia.plan.answering import PROMPT, TOKEN, evaluating, folding, generating
from tarsia.plan.ledger import Category, live
from tarsia.plan.rehearse import Outline, Rehearsal
from tarsia.quant import tiles
from tarsia.train.memory import live as watching
from tarsia.train.recipe import Recipe
from tarsia.train.run import prepare

FAMILIES = ("llava", "qwen2_5_vl", "idefics3")
LONG, BATCH, NEAR = 40, 4, 0.02


def _written(folder: Path, family: str, **changes: Any) -> Recipe:
    build(World(family, 1500, 128, 256, 2, 4, 4, 192, 3, 3, 112, False), folder / "base")
    rows = Rows(count=6, pictures=(1,), resolution=112, question=20, answer=3, uneven=0.3)
    values = {
        "model": str(folder / "base"),
        "parts": [{"method": "lora", "select": "language", "rank": 4, "lr": 1e-4}],
        "data": {"train": [{"path": str(rows.write(folder / "rows", 0))}]},
        "steps": 1,
        "precision": "float32",
        "threads": 1,
        "device": "cpu",
        "out": str(folder / "out"),
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf8")
    return Recipe.load(folder / "recipe.yaml")


@pytest.fixture(autouse=True)
def world() -> None:
    speak()
    torch.set_num_threads(1)
    tiles._local.__dict__.clear()


def _peak(found: Rehearsal, *phases: str) -> int:
    line = live(found.blocks, found.end)
    marks = [*((m.moment, m.phase) for m in found.marks), (found.end, "")]
    inside = [line[a:b] for (a, name), (b, _) in pairwise(marks) if name in phases]
    return max(max(part, default=0) for part in inside)


def _really(recipe: Recipe, done: Any) -> dict[str, int]:
    """The most bytes by phase while ``done`` is called with a run, its weights and patches among them."""
    host = recipe.open()
    run = prepare(recipe, host, 1)
    model = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _stored(host.model)}
    gc.collect()  # what an earlier test left in cycles would go during this one
    standing = _everything()
    watcher = watching(standing)
    with watcher as seen, borrowed(seen):
        standing.clear()
        run.model.register_forward_pre_hook(lambda *_: seen.mark(TOKEN if PROMPT in _named(seen) else PROMPT))
        done(run)
    return {name: sum(model.values()) + peak for name, peak in {**seen.peaks, "": seen.peak}.items()}


def _named(seen: Any) -> list[Any]:
    """The marks up to now."""
    return [name for _, name in seen._signs]


def _stored(model: torch.nn.Module) -> list[torch.Tensor]:
    from tarsia.quant.tensor import Weight4

    found: list[torch.Tensor] = []
    for tensor in (*model.parameters(), *model.buffers()):
        found += [*tensor.value.tensors.values(), tensor.levels] if isinstance(tensor, Weight4) else [tensor]
    return found


def _long(run: Any, rows: Any) -> None:
    """Answers of full length."""
    answers = say(run.host, rows, LONG, BATCH)
    assert all(answer.cut for answer in answers)


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16"}, {"four_bits": {"kind": "nf4"}}])
@pytest.mark.parametrize("family", FAMILIES)
def test_generating(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = _written(tmp_path, family, **changes)
    told = generating(recipe, Outline.of(recipe.model), LONG, BATCH)
    (rows, *_) = answering._largest(answering._samples(recipe)[0], BATCH)
    tiles._local.__dict__.clear()
    real = _really(recipe, lambda run: _long(run, rows))
    off = {phase: _peak(told, phase) / real[phase] - 1 for phase in (PROMPT, TOKEN)}
    assert all(abs(share) < NEAR for share in off.values()), off


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluating(family: str, tmp_path: Path) -> None:
    recipe = _written(tmp_path, family)
    told = evaluating(recipe, Outline.of(recipe.model), LONG, BATCH)
    samples, choice = answering._samples(recipe)
    (rows, *_) = answering._largest(samples, BATCH)
    real = _really(recipe, lambda run: chances(run.host, rows, choice, BATCH))
    off = _peak(told, answering.SCORE) / real[""] - 1
    assert abs(off) < NEAR


@pytest.mark.parametrize("family", FAMILIES)
def test_folding(family: str, tmp_path: Path) -> None:
    recipe = _written(tmp_path, family)
    told = folding(recipe, Outline.of(recipe.model))
    real = _really(recipe, lambda run: merge(run.model))
    off = _peak(told, answering.FOLD) / real[""] - 1
    assert abs(off) < NEAR


def test_the_cache_grows_with_the_answer(tmp_path: Path) -> None:
    recipe = _written(tmp_path, "llava")
    outline = Outline.of(recipe.model)
    few, many = (generating(recipe, outline, count, BATCH) for count in (100, 1100))
    grown = sum(b.size for b in many.blocks if b.category is Category.CACHE) - sum(
        b.size for b in few.blocks if b.category is Category.CACHE
    )
    # keys and values of 2 layers, 128 numbers wide, for 4 rows, in float32; and a layer's old ones while it grows
    assert grown >= 1000 * 2 * 2 * 128 * 4 * BATCH
