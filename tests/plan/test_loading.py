"""Where weights lie once a base is open: in the allocator's memory or in their files, foretold and looked up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES

from tarsia.adapter import open_base
from tarsia.adapter.four_bits import FourBits
from tarsia.adapter.host import anatomy_in
from tarsia.plan.ghost import Ghost
from tarsia.plan.ledger import Category, Ledger, live
from tarsia.plan.loading import rounding
from tarsia.plan.rehearse import Outline, ghost_host
from tarsia.quant.rounding import lost, rounded
from tarsia.quant.tensor import Weight4
from tarsia.train.memory import live as watched
from tarsia.train.recipe import Recipe

NAMES = ("llava", "qwen2_5_vl", "qwen3_vl_moe", "mllama", "smolvlm")


def _saved(name: str, folder: Path, **overrides: Any) -> Path:
    model, _ = FAMILIES[name].build(**overrides)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _recipe(folder: Path, precision: str, kind: str | None) -> Recipe:
    values: dict[str, Any] = {
        "model": str(folder),
        "parts": [{"method": "lora", "select": "language", "lr": 1e-4}],
        "data": {"train": [{"path": "rows.jsonl"}]},
        "steps": 1,
        "precision": precision,
        "device": "cpu",
        "out": "out",
    }
    return Recipe.of(values | ({} if kind is None else {"four_bits": {"kind": kind}}))


def _where(model: torch.nn.Module) -> dict[str, bool]:
    """Whether each of a model's weights lies outside the allocator's memory, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: not t.untyped_storage().resizable() for name, t in named if not isinstance(t, Weight4)}


@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_where_weights_lie(name: str, precision: str, kind: str | None, tmp_path: Path) -> None:
    folder = _saved(name, tmp_path)
    form = None if kind is None else FourBits(kind=kind)
    real = open_base(str(folder), dtype=precision, processor=False, four_bits=form).model  # type: ignore[arg-type]
    ledger = Ledger()
    with Ghost(ledger) as ghost, ledger.during("load"):
        outline = Outline(str(folder), folder, anatomy_in(folder), None)
        unreal = ghost_host(_recipe(folder, precision, kind), outline, ghost).model
    named = [*unreal.named_parameters(), *unreal.named_buffers()]
    told = {n: block.outside for n, t in named if not isinstance(t, Weight4) and (block := ledger.block(t))}
    found = _where(real)
    assert {n: found[n] for n in told} == told
    assert any(told.values()) == (precision == "bfloat16")
    held = [t for t in (*real.parameters(), *real.buffers()) if not isinstance(t, Weight4)]
    size = sum({t.untyped_storage()._cdata: t.nbytes for t in held}.values())
    assert abs(size - sum(b.size for b in ledger.blocks if b.category is Category.WEIGHTS)) < 4096
    # nothing of what building took is left in it
    assert max(live(ledger.blocks, ledger.now)) < sum(b.size for b in ledger.blocks if b.died > ledger.now) + 4_000_000


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_takes(nested: bool, dtype: torch.dtype) -> None:
    for rows in (40, 3000):
        weight = torch.randn(rows, 1000).to(dtype)
        with watched() as seen:
            value = rounded(weight, FourBits(nested=nested).scheme)
            lost(weight, value)
        held = sum(t.nbytes for t in value.tensors.values())
        assert seen.peak - held <= rounding(Weight4(value)) * 1.25
