"""A rehearsal says what a run takes: held, phase by phase, to what torch's allocator handed out in a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench.grid.measure import live_bytes
from bench.grid.rows import Rows
from bench.grid.worlds import FAMILIES, World, build, speak
from tarsia.plan import workspace
from tarsia.plan.ghost import Op
from tarsia.plan.ledger import Ledger, live
from tarsia.plan.rehearse import Outline, ending, rehearsing, steps
from tarsia.quant import tiles
from tarsia.train.recipe import Recipe

NEAR = 0.02
PHASES = {"prepare": "preparing", "forward": "forward", "backward": "backward", "update": "update", "save": "saving"}
STEPS = 2

LORA = {"method": "lora", "select": "language", "rank": 8, "lr": 1e-4}
FULL = {"method": "full", "select": "vision", "lr": 1e-4}
FOUR = {"four_bits": {"kind": "nf4", "nested": True}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llava", {}),
    "half": ("llava_next", {"precision": "bfloat16"}),
    "4 bits": ("smolvlm", FOUR),
    "4 bits, half": ("qwen2_5_vl", {**FOUR, "precision": "bfloat16"}),
    "checkpointing": ("internvl", {"checkpointing": True}),
    "accumulation": ("gemma3", {"batch": 1, "accumulate": 3, "batching": "grouped"}),
    "packed": ("llava_onevision", {"batching": "packed", "precision": "bfloat16"}),
    "features": ("idefics3", {"features": {}}),
    "experts": ("qwen3_vl_moe", {"parts": [{**LORA, "dropout": 0.1}]}),
    "full": ("qwen2_vl", {"parts": [FULL]}),
    "prefix": ("mllama", {"parts": [{"method": "prefix", "select": "language", "length": 16, "lr": 1e-4}]}),
    "loftq": ("qwen3_vl", {**FOUR, "parts": [{**LORA, "method": "loftq"}]}),
}


def _written(folder: Path, family: str, changes: dict[str, Any]) -> Path:
    world = World(family, 1500, 128, 256, 2, 4, 2, 192, 3, 3, 112, False)
    build(world, folder / "base")
    pictures = (1, 1) if family == "mllama" else (1, 2, 0)
    rows = Rows(count=6, pictures=pictures, resolution=112, question=8, answer=6, uneven=0.5)
    values = {
        "model": str(folder / "base"),
        "parts": [LORA],
        "data": {"train": [{"path": str(rows.write(folder / "rows", 0))}]},
        "steps": STEPS,
        "batch": 2,
        "precision": "float32",
        "threads": 1,
        "device": "cpu",
        "out": str(folder / "out"),
        **changes,
    }
    if "features" in values:
        values["features"] = {"path": str(folder / "features"), "limit": "1GB"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf8")
    return folder


def _measured(folder: Path) -> dict[str, int]:
    """The most bytes in each phase, of this run alone: other tests' tensors are in memory too."""
    # a buffer that an earlier run left would not be taken again
    tiles._local.__dict__.clear()
    found = live_bytes(folder)
    alien = found["open"] - found["held"]["weights"] - found["held"]["quantised"]
    return {phase: found["peaks"][name] - alien for phase, name in PHASES.items()}


def _rehearsed(folder: Path) -> dict[str, int]:
    recipe = Recipe.load(folder / "recipe.yaml", [f"out={folder / 'planned'}"])
    ledger = Ledger()
    with rehearsing(recipe, Outline.of(recipe.model), ledger) as (run, _):
        steps(run, ledger, range(STEPS))
        ending(run, ledger)
        blocks, end = ledger.settled(), ledger.now
    line = live(blocks, end)
    peaks: dict[str, int] = {}
    marks = [mark for mark in ledger.marks if mark.moment < end]
    first = next(mark.moment for mark in marks if mark.phase == "forward")
    for mark, until in zip(marks, [*(m.moment for m in marks[1:]), end], strict=True):
        # the first step's rows are read before anything says that it has begun
        phase = "prepare" if mark.phase == "step" and mark.moment < first else mark.phase
        peaks[phase] = max(peaks.get(phase, 0), *line[mark.moment : until], 0)
    return {phase: peaks[phase] for phase in PHASES}


def _off(folder: Path) -> dict[str, float]:
    measured, told = _measured(folder), _rehearsed(folder)
    return {phase: told[phase] / measured[phase] - 1 for phase in PHASES}


@pytest.fixture(autouse=True)
def world() -> None:
    speak()
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_takes(name: str, tmp_path: Path) -> None:
    off = _off(_written(tmp_path, *RUNS[name]))
    print({phase: round(100 * share, 2) for phase, share in off.items()})
    assert all(abs(share) < NEAR for share in off.values()), off


def test_what_states_in_pages_take(tmp_path: Path) -> None:
    changes = {"parts": [FULL], "optimiser": {"bits": 32, "paged": True, "budget": 1_000_000}}
    off = _off(_written(tmp_path, "qwen2_vl", changes))
    assert all(abs(share) < NEAR for share in off.values()), off


def test_every_family_of_the_grid_is_tried() -> None:
    assert {family for family, _ in RUNS.values()} == set(FAMILIES)


def test_what_operations_take_inside_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(op: Op) -> int:
        return 0

    monkeypatch.setattr(workspace, "taken", nothing)
    monkeypatch.setattr(workspace, "tiled", lambda op: False)
    off = _off(_written(tmp_path, *RUNS["4 bits, half"]))
    assert off["forward"] < -NEAR
