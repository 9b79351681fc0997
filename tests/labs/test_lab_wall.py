"""The chapter on the memory wall fails where a formula is wrong, and where a model holds more than it says."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from tarsia.labs import held
from tarsia.labs.chapters import wall
from tarsia.labs.frame.chapter import Desk, Found
from tarsia.plan import geometry, sums
from tarsia.plan.geometry import MODELS, Decoder

EXACT = "formulas that count, most apart"
STEP = "a QLoRA's step, most apart, %"


def failed(rows):
    """What fails of the bounds whose rows are there."""
    if any(name.startswith(("numbers", "whole", "kept", "4 bits", "step")) for name in rows):
        rows = rows | wall.worst(rows)
    judged = [bound for bound in wall.CHAPTER.bounds if bound.row in rows]
    assert judged
    return [bound.what for bound in judged if bound.judge(Found(rows)) == "FAIL"]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path, {}, lambda share, what: None)


@pytest.fixture
def few(monkeypatch):
    """One model of the table, two jobs, and a step small enough for a test."""
    monkeypatch.setattr(held, "MODELS", MappingProxyType({"LLaMA-2-7B": MODELS["LLaMA-2-7B"]}))
    monkeypatch.setattr(held, "JOBS", 2)
    monkeypatch.setattr(held, "STEPPED", Decoder(128, 4, 4, 2, 512, 2000))


def test_the_texts_figures_hold_but_one():
    rows = wall.told()
    assert failed(rows) == []
    assert rows["verdicts: figures as printed"] == {"judged": 11, "hold": 10}
    assert rows["figure: 65B, double quantisation"]["verdict"] == "does not hold"


def test_every_figure_and_line_is_in_the_picture():
    drawn = [name for _, _, names in wall.PANELS.values() for name in names]
    assert sorted(drawn) == sorted(figure.name for figure in wall.figures())
    kinds = [what for lines in wall.KINDS.values() for what in lines]
    assert {line.what for figure in wall.figures() for line in figure.lines} <= {*kinds, "constants nested"}


@pytest.mark.parametrize(
    "changed, what",
    [
        ({"float32": 2}, ["GB, 7B in mixed precision", "GB, 7B in float32", "GB, 14B: weights and Adam"]),
        ({"bfloat16": 1}, ["GB, 7B in mixed precision", "GB, 70B in bfloat16", "GB, 65B QLoRA"]),
    ],
)
def test_wrong_bytes_of_a_type_fail(monkeypatch, changed, what):
    """Planted: a formula with other bytes a number."""
    monkeypatch.setattr(sums, "BYTES", {**geometry.BYTES, **changed})
    assert [name for name in failed(wall.told()) if name in what] == what


def test_half_a_bit_that_is_all_saved_fails(monkeypatch):
    monkeypatch.setattr(sums, "NESTED", 0.0)
    assert failed(wall.told()) == ["GB saved by double quantisation"]


def test_constants_in_float32_that_cost_nothing_fail(monkeypatch):
    monkeypatch.setattr(sums, "quantised", lambda decoder, nested: geometry.quantised(decoder, True))
    assert failed(wall.told()) == ["... constants in float32"]


def test_formulas_are_what_is_held(few, desk):
    rows = held.counted(desk) | held.whole() | held.activations() | held.four_bits()
    assert failed(rows) == []
    assert wall.worst(rows)["exact: formulas that count"] == {"number": 17, "most apart": 0}
    assert all(row["formula"] > 0 for row in rows.values())
    assert not any(held.OTHERS in name for name in rows)


def test_another_shape_fails(few, desk, monkeypatch):
    """Planted: the table has the hidden size of another LLaMA."""
    model = MODELS["LLaMA-2-7B"]
    wrong = replace(model, decoder=replace(model.decoder, intermediate=11264))
    real = held.on_meta
    monkeypatch.setattr(held, "MODELS", {"LLaMA-2-7B": wrong})
    monkeypatch.setattr(held, "on_meta", lambda decoder, tower: real(model.decoder, tower))
    assert failed(held.counted(desk)) == [EXACT]


def test_an_optimiser_that_keeps_a_third_number_fails(monkeypatch):
    """Planted: AMSGrad, which keeps the largest second moment, too."""
    real = held.adamw

    def more(*args):
        made = real(*args)
        for group in made.param_groups:
            group["amsgrad"] = True
        return made

    monkeypatch.setattr(held, "adamw", more)
    rows = held.whole()
    assert failed(rows) == [EXACT]
    assert rows[f"whole: float32, {held.OTHERS}"]["apart"] == rows["whole: float32, second moment"]["measured"]


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("inside", lambda d, batch, length, width, **how: geometry.inside(d, batch, length, width, **how) - 2),
        ("top", lambda d, tokens, width, full: geometry.top(d, tokens, width, True)),
    ],
)
def test_a_wrong_sum_of_activations_fails(monkeypatch, name, wrong):
    monkeypatch.setattr(held, name, wrong)
    assert failed(held.activations()) == [EXACT]


def test_a_model_that_keeps_more_fails(monkeypatch):
    """Planted: an MLP whose output is kept once more."""
    real = held.llama

    def more(decoder, dtype):
        model = real(decoder, dtype)
        model.model.layers[0].mlp.register_forward_hook(lambda m, i, out: out * torch.ones_like(out))
        return model

    monkeypatch.setattr(held, "llama", more)
    assert failed(held.activations()) == [EXACT]


def test_constants_that_are_forgotten_fail(monkeypatch):
    monkeypatch.setattr(held, "quantised", lambda decoder, nested: (geometry.quantised(decoder, nested)[0], 0))
    assert failed(held.four_bits()) == [EXACT]


@pytest.mark.parametrize("checkpointing, accumulation", [(True, 1), (False, 2)])
def test_a_step_is_its_sum(few, checkpointing, accumulation):
    rows = held.stepped("small", checkpointing, accumulation)
    apart = rows["step: small"]["apart, %"]
    assert abs(apart) < 1.5 and rows["step: small"]["formula"] > 5e6


def test_a_step_that_leaves_its_gradients_out_fails(few, monkeypatch):
    real = sums.patched
    monkeypatch.setattr(
        sums, "patched", lambda a: tuple(replace(x, bytes=0) if x.what == sums.GRADIENTS else x for x in real(a))
    )
    rows = held.stepped("small", True, 2)
    assert rows["step: small"]["apart, %"] > 1.5


@pytest.mark.parametrize("name, vocabulary, accumulation", [("turns", 2000, 1), ("loss", 2000, 1), ("passing", 100, 2)])
def test_a_moment_that_is_forgotten_fails(monkeypatch, name, vocabulary, accumulation):
    """Planted: one part of the highest moment is 0."""
    monkeypatch.setattr(held, "STEPPED", Decoder(128, 4, 4, 2, 512, vocabulary))
    monkeypatch.setattr(sums, name, lambda *_: 0)
    assert STEP in failed(held.stepped("small", True, accumulation))


def test_moments_follow_their_parameters_type():
    assert held.moments() == {"adamw: a moment of a bfloat16 parameter": {"bytes": 2}}


def test_files_are_their_numbers(few, desk, monkeypatch):
    rows = {name.replace("2", "10"): row for name, row in held.ten(desk).items()}
    assert failed(rows) == []
    real = held.save

    def twice(adapter, folder):
        real(adapter, folder)
        (folder / "more").write_bytes(bytes(100_000))

    monkeypatch.setattr(held, "save", twice)
    rows = {name.replace("2", "10"): row for name, row in held.ten(desk).items()}
    assert failed(rows) == ["ten adapters' files, % more"]
