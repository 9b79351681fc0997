"""The folded base says what the live adapter says on its base, in every family; every method that folds does."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES
from merge.fold_world import saved, trained
from safetensors.torch import load_file

from tarsia.core.attach import Part
from tarsia.core.method import METHODS
from tarsia.merge.fold import RECORD, fold

OPTIONS = {"lora": {"rank": 4}, "vera": {"rank": 16}, "oft": {"block": 8}, "dora": {"rank": 4}}
SELECT = {"ia3": "language.*.{v,down}", "bitfit": "language.*.{q,v}; vision"}
QUICK = {"llava"}
FLOAT = {"mllama"}
METHODS_THAT_FOLD = sorted(name for name, method in METHODS.items() if method.folds and not method.corrects)


def relative(folded):
    return folded.proof.difference / folded.proof.peak


@pytest.mark.parametrize(
    "name", [name if name in FLOAT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_in_float32_the_fold_is_the_adapter(name, tmp_path):
    base = saved(tmp_path / "base", name)
    adapter = trained(base, name=name)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    folded = fold(str(base), adapter, tmp_path / "out")
    assert relative(folded) <= 1e-5
    assert folded.proof.agreement == 1
    assert folded.proof.moved > 0.05 * folded.proof.peak, "the adapter does nothing, so nothing is shown"
    assert folded.proof.pictures
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert json.loads((tmp_path / "out" / RECORD).read_text())["proof"]["agreement"] == 1


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_in_16_bits_it_differs_by_rounding_alone(name, tmp_path):
    base = saved(tmp_path / "base", name, torch.bfloat16)
    folded = fold(str(base), trained(base, name=name), tmp_path / "out")
    assert folded.proof.difference <= folded.proof.allowed < 0.1 * folded.proof.moved
    mine, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS_THAT_FOLD)
def test_every_method_that_folds(method, tmp_path):
    base = saved(tmp_path / "base", "qwen2_vl")
    select = SELECT.get(method, "language.*.{q,v,down}")
    part = Part(method, select, METHODS[method].configure(OPTIONS.get(method, {})))
    folded = fold(str(base), trained(base, (part,), "qwen2_vl"), tmp_path / "out")
    assert relative(folded) <= 1e-5 and folded.proof.moved > 0.01 * folded.proof.peak


def test_all_methods_that_fold_side_by_side(tmp_path):
    """Each at layers of its own, of three: what one of them does wrong shows in the outputs of all."""
    base = saved(tmp_path / "base", "qwen2_vl")
    places = [f"language.{layer}.{role}" for role in ("v", "q", "k", "up", "gate", "o") for layer in range(3)]
    places = [place for place in places if place.endswith((".v", ".q", ".k", ".up"))]
    chosen = {"ia3": "language.*.down", "bitfit": "vision", "full": "projector"}
    parts = [
        Part(method, chosen.get(method) or places.pop(), METHODS[method].configure(OPTIONS.get(method, {})))
        for method in METHODS_THAT_FOLD
    ]
    adapter = trained(base, parts, "qwen2_vl")
    assert {held.method for held in adapter.patches.values()} == set(METHODS_THAT_FOLD)
    folded = fold(str(base), adapter, tmp_path / "out")
    assert relative(folded) <= 1e-5 and folded.proof.moved > 0.05 * folded.proof.peak
