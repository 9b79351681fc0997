"""Each chapter can fail: a planted mistake is a FAIL of the bound that it should be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tarsia.labs import speakers
from tarsia.labs.chapters import bits, gradient, levels, rounding
from tarsia.labs.frame.chapter import Desk, Found
from tarsia.quant import codec
from tarsia.quant.levels import levels as table

DESK = Desk(Path("."), {}, lambda share, what: None)


def failed(module, rows):
    """What fails of the bounds whose rows are there; with none of them there is nothing to fail."""
    judged = [bound for bound in module.CHAPTER.bounds if bound.row in rows]
    assert judged
    return [bound.what for bound in judged if bound.judge(Found(rows)) == "FAIL"]


LOSS = "mini-1: loss that FP4 adds over INT4's"


@pytest.fixture
def few(monkeypatch):
    """Enough numbers to tell right from wrong."""
    monkeypatch.setattr(levels, "NUMBERS", 2**15)
    monkeypatch.setattr(levels, "BLOCKS", (64, 256))
    monkeypatch.setattr(bits, "SIZES", (1, 64, 4096, 16384, 16385, 2**22))
    monkeypatch.setattr(gradient, "STEPS", 500)
    monkeypatch.setattr(rounding, "NUMBERS", 2**16)


def test_levels_hold(few):
    assert failed(levels, levels.measure(DESK).rows) == []


@pytest.mark.parametrize(
    "place, change, what",
    [
        (3, lambda v: v + 2**-25, ["levels equal to the bit"]),
        (7, lambda v: v + 1e-3, ["levels equal to the bit", "levels at zero", "levels above zero"]),
        (6, lambda v: -v, ["levels equal to the bit", "levels below zero", "levels above zero"]),
    ],
)
def test_a_wrong_level_fails(few, monkeypatch, place, change, what):
    def planted(kind):
        wrong = table(kind).clone()
        if kind == "nf4":
            wrong[place] = change(wrong[place])
        return wrong

    monkeypatch.setattr(levels, "levels", planted)
    assert failed(levels, levels.measure(DESK).rows)[: len(what)] == what


def test_levels_that_are_used_alike_would_fail(few, monkeypatch):
    """Were NF4 what it is said to be, the chapter would say that its claim is wrong."""
    monkeypatch.setattr(levels, "occupancy", lambda *_: torch.full((16,), 1 / 16, dtype=torch.float64))
    assert failed(levels, levels.measure(DESK).rows) == ["entropy of a code, bits", "most used over least used"]


def test_bits_hold(few):
    assert failed(bits, bits.measure(DESK).rows) == []


@pytest.mark.parametrize(
    "changed, what",
    [
        ({"block": 128}, ["bits, float32 scales", "bits, nested scales", "bits saved", "GB saved at 65 billion"]),
        ({"nested": False}, ["bits, nested scales", "bits saved", "GB saved at 65 billion"]),
    ],
)
def test_other_blocks_fail(few, monkeypatch, changed, what):
    monkeypatch.setattr(bits, "encode", lambda w, scheme: codec.encode(w, dataclasses.replace(scheme, **changed)))
    assert failed(bits, bits._parts() | bits._saved()) == what


def test_a_file_that_keeps_more_fails(few, monkeypatch):
    parts = bits.to_tensors
    monkeypatch.setattr(bits, "to_tensors", lambda *a: {**parts(*a), "w.more": torch.zeros(1024)})
    assert failed(bits, bits._files()) == ["a weight's bytes in a file besides"]


def test_gradients_hold(few):
    assert failed(gradient, gradient.to_the_input() | gradient.vanishing()) == []
    assert failed(gradient, gradient.to_the_pixels()[0]) == []


def test_training_through_4_bits_holds(few):
    assert failed(gradient, gradient.through_adapters()[0]) == []
    assert failed(gradient, gradient.rounded_weights(DESK)[0]) == []


def test_the_gradient_of_other_numbers_fails(monkeypatch):
    """As if the way back multiplied with a weight that was decoded otherwise."""
    decode = gradient.decode
    monkeypatch.setattr(gradient, "decode", lambda value, dtype=None: 1.001 * decode(value, dtype))
    assert failed(gradient, gradient.to_the_input()) == ["gradient at the input against the dense product"]


def test_a_slope_that_is_cut_fails(monkeypatch):
    linear = codec.linear
    monkeypatch.setattr(gradient.codec, "linear", lambda x, value: linear(x.detach() + 0 * x, value))
    assert failed(gradient, gradient.to_the_input()) == [
        "gradient at the input against the dense product",
        "against finite differences",
    ]


def test_adapters_that_hardly_learn_fail(few, monkeypatch):
    monkeypatch.setattr(gradient, "STEPS", 20)
    assert failed(gradient, gradient.through_adapters()[0]) == ["loss of A and B over the best"]


def test_rounding_without_levels_fails(monkeypatch):
    """Were every number stored as it is, every nudge would be seen."""
    monkeypatch.setattr(gradient, "decode", lambda value: value)
    monkeypatch.setattr(gradient, "encode", lambda weight, scheme: weight)
    assert failed(gradient, gradient.vanishing()) == ["numbers without a gradient, %"]


def test_an_estimator_that_lets_nothing_pass_fails(few, monkeypatch):
    ways = {name: (gradient.true_slope, *rest) for name, (_, *rest) in gradient.WAYS.items()}
    monkeypatch.setattr(gradient, "WAYS", ways)
    assert failed(gradient, gradient.rounded_weights(DESK)[0]) == ["with the estimator, times lower"]


def test_errors_of_numbers_hold(few):
    assert failed(rounding, rounding.of_numbers()) == []


@pytest.mark.parametrize("kinds", [("nf4", "fp4", "int4"), ("nf4", "int4", "int4"), ("nf4", "int4", "nf4")])
def test_types_that_are_mixed_up_fail(few, monkeypatch, kinds):
    monkeypatch.setattr(
        rounding, "SCHEMES", {n: codec.Scheme(k, False) for n, k in zip(rounding.SCHEMES, kinds, strict=True)}
    )
    assert failed(rounding, rounding.of_numbers()) == ["normal numbers: FP4's error over INT4's"]


def test_scales_that_are_lost_fail(few, monkeypatch):
    """Double quantisation that keeps no scale but the mean."""
    back = rounding.back

    def planted(weight, scheme, shift=0):
        if not scheme.nested:
            return back(weight, scheme, shift)
        value = codec.encode(weight, dataclasses.replace(scheme, nested=False))
        return codec.decode(value.having({"scales": value.scales.mean().expand_as(value.scales)}))

    monkeypatch.setattr(rounding, "back", planted)
    assert failed(rounding, rounding.of_numbers()) == ["normal numbers: nesting adds, %"]


def test_no_rounding_at_all_fails(few, monkeypatch):
    monkeypatch.setattr(rounding, "back", lambda weight, scheme, shift=0: weight)
    assert failed(rounding, rounding.of_numbers()) == [
        "normal numbers: FP4's error over INT4's",
        "normal numbers: nesting adds, %",
    ]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """mini-1 with few rows to answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speakers, "ROWS", {"digits": 4, "words": 12})
        return speakers.small(tmp_path_factory.mktemp("rows"))


def modelled(spoken):
    rows, series = rounding.of_model(spoken, DESK, 0, 1)
    return rows | rounding.orders("mini-1", series)


def test_a_model_is_rounded_and_is_afterwards_what_it_was(spoken, monkeypatch):
    monkeypatch.setattr(rounding, "DRAWS", {"mini-1": 2})
    before = spoken.speak()
    rows = modelled(spoken)
    assert torch.equal(spoken.speak(), before)
    assert set(failed(rounding, rows)) <= {LOSS}  # so few answers can not tell
    assert rows["mini-1: NF4"]["weights, dB"] == pytest.approx(20.7, abs=0.1)
    assert rows["mini-1: NF4"]["least"] < rows["mini-1: NF4"]["KL"] < rows["mini-1: NF4"]["most"]
    assert rows["before: mini-1"] == {"blocks of 32 with at most 16 values, %": 0}


def test_a_greater_error_that_does_harm_fails(spoken, monkeypatch):
    """The claim is that FP4's greater error does less harm than INT4's; were it otherwise, it would be said."""
    back = rounding.back

    def planted(weight, scheme, shift=0):
        noise = 0.5 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        return back(weight, scheme, shift) + (noise if scheme.kind == "fp4" else 0)

    monkeypatch.setattr(rounding, "DRAWS", {"mini-1": 1})
    monkeypatch.setattr(rounding, "back", planted)
    assert failed(rounding, modelled(spoken)) == [LOSS]


@pytest.mark.parametrize(
    "kl, loss, what",
    [
        (0.9, 0.8, []),
        (1.1, 0.8, ["SmolLM2: FP4's KL over INT4's"]),
        (0.9, 1.1, ["SmolLM2: loss that FP4 adds over INT4's"]),
    ],
)
def test_the_order_of_the_large_model_can_fail(kl, loss, what):
    found = {"weights": (0.8, 1.0, 1.3), "outputs": (0.8, 1.0, 0.9), "KL": (0.5, 1.0, kl), "loss": (0.4, 1.0, loss)}
    kinds = ("NF4", "INT4", "FP4")
    series = {f"SmolLM2 {k} {what}": [v] for what, values in found.items() for k, v in zip(kinds, values, strict=True)}
    rows = rounding.orders("SmolLM2", series)
    assert failed(rounding, rows) == what
    assert rows["order: SmolLM2, FP4 over INT4"]["less KL in"] == int(kl < 1)


def test_dither_leaves_no_grid_and_little_change(spoken):
    layer = torch.arange(64.0).view(2, 32).div(4).round()  # of 9 values a block
    (weight,) = speakers.dithered(dataclasses.replace(spoken, weights=[layer])).weights
    assert rounding._few([layer]) == 100 and rounding._few([weight]) == 0
    assert (weight - layer).abs().max() <= 0.5 * 8 / 15
