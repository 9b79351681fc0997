"""A plan of a run whose optimiser's states come and go, and of a base that is in 4 bits already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from train import small

from tarsia.adapter.host import QuantisedAlready
from tarsia.plan import plan
from tarsia.plan.ledger import Category

BUDGET = 100_000
LORA = [{"method": "lora", "select": "language", "lr": 1e-3, "rank": 2}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    values = small.world(tmp_path_factory.mktemp("world"))
    return {**values, "parts": [{"method": "full", "select": "language", "lr": 1e-3}], "steps": 3, "warmup": 1}


@pytest.mark.parametrize("bits", [32, 8])
def test_states_are_within_their_budget_and_nowhere_else(bits: int, world: dict[str, Any], tmp_path: Path) -> None:
    budget = BUDGET * bits // 32
    values = {**world, "out": str(tmp_path / "out"), "optimiser": {"bits": bits, "paged": True, "budget": budget}}
    planned = plan(small.recipe(values))
    assert list(tmp_path.iterdir()) == []
    assert 0 < planned.categories[Category.STATES] <= budget < planned.work.paged


def test_a_plan_touches_nothing_in_the_pages_folder(world: dict[str, Any], tmp_path: Path) -> None:
    left = tmp_path / "states-1-0.pages"
    left.write_text("of a run that was killed")
    plan(small.recipe({**world, "optimiser": {"bits": 32, "paged": True, "path": str(tmp_path)}}))
    assert [path.name for path in tmp_path.iterdir()] == [left.name]


def test_a_base_in_4_bits_is_not_rounded_again(world: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world["model"], base)
    config = json.loads((base / "config.json").read_text())
    held = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": held}))
    recipe = small.recipe({**world, "parts": LORA, "model": str(base), "four_bits": {"kind": "nf4"}})
    for refuses in (recipe.open, lambda: plan(recipe)):
        with pytest.raises(QuantisedAlready, match="quantised already"):
            refuses()
