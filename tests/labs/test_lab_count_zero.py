"""The chapters on numbers and on B = 0 fail where the patch has other numbers, or another start."""

from __future__ import annotations

import math

import pytest
import torch

from tarsia.labs.chapters import count, starts, zero
from tarsia.labs.frame.chapter import Desk, Found
from tarsia.methods.lora import LoRA, LoRAConfig


def failed(module, rows):
    """What fails of the bounds whose rows are there."""
    judged = [bound for bound in module.CHAPTER.bounds if bound.row in rows]
    assert judged
    return [bound.what for bound in judged if bound.judge(Found(rows)) == "FAIL"]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path, {}, lambda share, what: None)


@pytest.fixture
def few(monkeypatch):
    """Enough to tell right from wrong."""
    monkeypatch.setattr(starts, "QUESTIONS", 40)
    monkeypatch.setattr(zero, "SHAPES", zero.SHAPES[:2])
    monkeypatch.setattr(zero, "STEPS", 5)
    monkeypatch.setattr(zero, "SIZES", (0.01,))


def test_one_layer_is_counted(desk):
    rows = count.one_layer(desk)
    assert failed(count, rows) == []
    assert rows["layer: full"]["frozen"] == 0
    assert rows["layer: LoRA, rank 16"]["MB in all"] == pytest.approx(4 * (2**24 + 4 * 2**17) / 1e6, abs=0.06)
    assert rows["base: float32"]["bytes a number, full"] == 16


def test_another_rank_fails(desk, monkeypatch):
    monkeypatch.setattr(count, "LoRAConfig", lambda rank, alpha: LoRAConfig(2 * rank, alpha))
    wrong = failed(count, count.one_layer(desk))
    assert wrong[:3] == ["numbers of A and B", "factor of the numbers", "factor of AdamW's moments"]


def test_an_optimiser_that_keeps_a_third_number_fails(desk, monkeypatch):
    """Planted: each trained number of LoRA has a further state."""
    real = count.state

    def more(optimiser):
        held = real(optimiser)
        few = all(value.numel() < 2**20 for value in held.values())
        return {**held, **{f"{name}/more": value for name, value in held.items() if few and value.ndim}}

    monkeypatch.setattr(count, "state", more)
    assert failed(count, count.one_layer(desk)) == ["factor of AdamW's moments"]


def test_a_layer_by_rank():
    counts = count.by_rank()
    assert counts == {rank: 2 * 4096 * rank for rank in count.RANKS}
    assert counts[2048] == 4096**2


def test_models_are_counted(desk):
    rows, series = count.real(desk)
    assert failed(count, rows) == []
    assert rows["whole: LLaVA-1.5-7B"]["in the patches"] == 32 * 16 * (4 * 8192 + 3 * (4096 + 11008))
    assert [len(values) for values in series.values()] == [7, 7, 7]


def test_narrow_keys_that_are_taken_for_wide_fail(desk, monkeypatch):
    """Planted: a patch of a key has the numbers of a square layer."""
    real = LoRA.create.__func__

    def create(cls, site, config, base, generator):
        patch = real(cls, site, config, base, generator)
        if site.shape == (512, 3584):
            patch.B = torch.nn.Parameter(torch.zeros(3584, config.rank))
        return patch

    monkeypatch.setattr(LoRA, "create", classmethod(create))
    assert failed(count, count.real(desk)[0]) == ["smallest factor of 7 billion: a k of Qwen2.5-VL"]


@pytest.mark.slow
def test_zero_holds(desk, few):
    rows = zero.measure(desk).rows
    assert set(failed(zero, rows)) <= {"loss of the last steps, infrared, times"}, "5 steps are few"
    assert rows["digits: B = 0"]["mean of the last 10"] < 0.1 < rows["digits: two Gaussians"]["mean of the last 10"]


def test_squared_norms_without_the_product():
    generator = torch.Generator().manual_seed(3)
    b, a = zero.gaussian((5, 2), 2, generator), zero.gaussian((2, 7), 2, generator)
    zero_draws = torch.stack([(b @ a).square().sum()])
    torch.testing.assert_close(((b.t() @ b) * (a @ a.t())).sum()[None], zero_draws)


def test_another_variance_fails(desk, few, monkeypatch):
    real = zero.gaussian
    monkeypatch.setattr(zero, "gaussian", lambda shape, rank, generator: math.sqrt(1.2) * real(shape, rank, generator))
    assert "squared norms from d k / r, standard errors" in failed(zero, zero.norms(desk))


def test_a_start_that_is_not_zero_fails(desk, few, monkeypatch):
    real = LoRA.create.__func__

    def create(cls, *args):
        patch = real(cls, *args)
        torch.nn.init.constant_(patch.B, 1e-3)
        return patch

    monkeypatch.setattr(LoRA, "create", classmethod(create))
    host = zero.open_base("mini-1")
    assert failed(zero, zero.effect(host, desk)[0]) == ["change at step 0 with B = 0"]
