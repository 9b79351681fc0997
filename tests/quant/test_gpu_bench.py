"""What the measurement on a GPU reckons with, and that it leaves nothing behind where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import gpu_quant, gpu_time, run
from tarsia.quant import codec
from tarsia.quant.gpu.plan import Tiles


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_quant.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("skipped")
    assert not list(tmp_path.iterdir())


def test_bytes_of_a_weight_are_those_that_are_stored() -> None:
    value = codec.encode(torch.randn(256, 128), codec.Scheme())
    stored = sum(tensor.numel() * tensor.element_size() for tensor in value.tensors.values())
    assert gpu_quant.packed_bytes(256, 128) == stored - 4  # but for the offset, one number


def test_the_limit_is_the_larger_of_bytes_and_operations() -> None:
    assert gpu_time.least(100, 10, bandwidth=10, rate=10) == 10
    assert gpu_time.least(10, 100, bandwidth=10, rate=10) == 10
    moved = gpu_quant.packed_bytes(4096, 4096) + 2 * 8192
    assert gpu_quant.product_limit(1, 4096, 4096, bandwidth=3e12, rate=8e14) == pytest.approx(moved / 3e12)
    many = gpu_quant.product_limit(4096, 4096, 4096, bandwidth=3e12, rate=8e14)
    assert many == pytest.approx(2 * 4096**3 / 8e14)


def test_ratios_are_within_a_round() -> None:
    times = {"ours": [1e-6, 4e-6, 2e-6], "dense": [2e-6, 8e-6, 6e-6]}
    row = gpu_time.summary(times, 1e-6)
    assert row == {"us": 2.0, "limit us": 1.0, "of limit": 0.5, "dense us": 6.0, "dense / ours": 2.0}
    assert list(gpu_time.turns(["a", "b"], 0)) == ["a", "b"] and list(gpu_time.turns(["a", "b"], 1)) == ["b", "a"]


def test_the_best_of_other_tiles_stands_beside_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Tiles(64, 2, 16, 4, warps=4, stages=3)
    others = gpu_quant.candidates(plan, (32, 64), (2,), (3,))
    assert plan not in others and len(others) == 2 * 3 * 2 - 1
    assert {tiles.splits for tiles in others} == {2, 4, 8}
    took = {plan: 3e-6, others[5]: 2e-6}
    monkeypatch.setattr(
        gpu_quant, "race", lambda calls, rounds: {name: [took.get(c[0](), 9e-6)] for name, c in calls.items()}
    )
    row = gpu_quant.best(plan, others, lambda tiles: [lambda: tiles])
    assert row["us"] == 3 and row["best us"] == 2 and row["plan / best"] == 1.5
    assert row["best"].startswith(f"{others[5].rows} rows, 2 blocks, {others[5].splits} splits")


def test_a_line_of_results_names_the_commit_that_it_is_told(tmp_path: Path) -> None:
    run.record("quant_gpu", {"right": {"bits that differ": 0}}, tmp_path, "abc1234")
    line = json.loads((tmp_path / "quant_gpu.jsonl").read_text(encoding="utf8"))
    assert line["commit"] == "abc1234" and line["values"]["right"]["bits that differ"] == 0


def test_bitsandbytes_is_given_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the peer that is measured beside")
    for name, value in (("DEVICE", "cpu"), ("ROTATED", 1)):
        monkeypatch.setattr(gpu_quant, name, value)
    weight = gpu_quant.weights(64, 128)[0]
    theirs = functional.dequantize_4bit(weight.codes, gpu_quant.theirs(weight))
    assert torch.equal(theirs, codec.decode(weight.value(torch.bfloat16))) and theirs.unique().numel() > 16
