"""The texts' figures from their assumptions: shapes held to real models, sums to lines, verdicts that can fail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.core.errors import ConfigError
from tarsia.plan import geometry, sums
from tarsia.plan.assumptions import Assumptions, assume, nearest
from tarsia.plan.figure import Figure, Line, Relation, Said, Verdict
from tarsia.plan.geometry import MODELS, Decoder, Tower, cache, constants, lora, quantised
from tarsia.plan.wall import rows
from tarsia.quant.codec import Scheme, encode

COUNTS = {
    "LLaMA-2-7B": 6_738_415_616,
    "LLaMA-2-13B": 13_015_864_320,
    "LLaMA-2-70B": 68_976_648_192,
    "LLaMA-65B": 65_285_660_672,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen2.5-VL-72B": 73_410_777_344,
}
"""As the models' publishers count them."""


def text_fields(d: Decoder) -> dict[str, int]:
    return {
        "hidden_size": d.hidden,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "intermediate_size": d.intermediate,
        "vocab_size": d.vocabulary,
    }


def seen_fields(t: Tower) -> dict[str, int]:
    wide = {"hidden_size": t.hidden, "intermediate_size": t.intermediate, "out_hidden_size": t.out, "depth": t.layers}
    return {**wide, "patch_size": t.patch, "temporal_patch_size": t.frames, "spatial_merge_size": t.merge}


def on_meta(decoder: Decoder, tower: Tower | None = None) -> torch.nn.Module:
    """The model that Transformers makes of these shapes."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        LlamaConfig,
        Qwen2_5_VLConfig,
        Qwen2Config,
    )

    with torch.device("meta"):
        if tower is not None:
            config = Qwen2_5_VLConfig(text_config=text_fields(decoder), vision_config=seen_fields(tower))
            return AutoModelForImageTextToText.from_config(config)
        kind = Qwen2Config if decoder.bias else LlamaConfig
        return AutoModelForCausalLM.from_config(kind(**text_fields(decoder), tie_word_embeddings=False))


def figure(name: str) -> Figure:
    (found,) = (f for f in rows() if f.name == name)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_models_numbers_are_those_that_transformers_builds(name: str) -> None:
    model = MODELS[name]
    built = on_meta(model.decoder, model.tower)
    assert sum(p.numel() for p in built.parameters()) == model.parameters == COUNTS[name]
    blocks = [m for path, m in built.named_modules() if ".layers." in path and isinstance(m, torch.nn.Linear)]
    assert sum(m.weight.numel() for m in blocks) == model.decoder.linear
    assert lora(model.decoder, 3) == 3 * sum(sum(m.weight.shape) for m in blocks)


@pytest.mark.parametrize("change", [{"kv_heads": 8}, {"intermediate": 11009}, {"vocabulary": 32064}, {"bias": True}])
def test_another_shape_is_another_number(change: dict[str, int]) -> None:
    decoder = MODELS["LLaMA-2-7B"].decoder
    other = replace(decoder, **change)
    assert other.parameters != sum(p.numel() for p in on_meta(decoder).parameters())
    assert other.parameters == sum(p.numel() for p in on_meta(other).parameters())


@settings(deadline=None, max_examples=20)
@given(rows_of=st.integers(1, 90), columns=st.integers(1, 700), nested=st.booleans())
def test_bytes_of_4_bits_are_those_of_the_codec(rows_of: int, columns: int, nested: bool) -> None:
    value = encode(torch.ones(rows_of, columns), Scheme(nested=nested))
    held = {name: t.numel() * t.element_size() for name, t in value.tensors.items()}
    size = rows_of * columns
    assert geometry.codes(size) == held.pop("codes")
    assert constants(size, nested) == sum(held.values())


def test_a_cache_is_that_of_a_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    decoder = Decoder(64, 3, 4, 2, 96, 50)
    held = LlamaForCausalLM(LlamaConfig(**text_fields(decoder)))(torch.ones(2, 5, dtype=torch.long)).past_key_values
    found = sum(t.numel() * t.element_size() for layer in held.layers for t in (layer.keys, layer.values))
    assert found == cache(decoder, tokens=10, width=4)


@pytest.mark.parametrize(
    "name, gigabytes",
    [
        ("7B, mixed precision", 112),
        ("7B, float32", 112),
        ("70B, mixed precision", 1120),
        ("14B, weights and Adam in float32", 168),
        ("70B in bfloat16", 140),
        ("7B, 10 checkpoints", 280),
    ],
)
def test_the_texts_sums(name: str, gigabytes: float) -> None:
    assert figure(name).bytes == gigabytes * 10**9
    assert figure(name).verdict is Verdict.HOLDS


def test_gradients_alone_are_not_past_224() -> None:
    held = figure("14B, a step in float32")
    whole = sum(line.bytes for line in held.lines if line.what not in (sums.ACTIVATIONS, sums.PEAK))
    assert whole == 224 * 10**9 < held.bytes
    assert replace(held, lines=held.lines[:4]).verdict is Verdict.FAILS


def test_what_does_not_hold() -> None:
    wrong = {f.name for f in rows() if f.verdict is Verdict.FAILS}
    assert wrong == {
        "65B QLoRA, adapters in float32",
        "65B QLoRA, constants in float32",
        "65B QLoRA, without checkpointing",
        "65B QLoRA, 4 rows of 528 tokens",
        "65B QLoRA, 16 rows a batch",
        "65B, double quantisation",
    }
    assert figure("65B, double quantisation").gigabytes == pytest.approx(0.373046875 * 65 / 8)
    assert figure("65B QLoRA").gigabytes == pytest.approx(45.35, abs=0.01)


def test_65b_under_48_has_every_part() -> None:
    held = {line.what: line.bytes for line in figure("65B QLoRA").lines}
    decoder = MODELS["LLaMA-65B"].decoder
    assert (held[sums.CODES], held[sums.CONSTANTS]) == quantised(decoder, nested=True)
    assert held[sums.CODES] + held[sums.CONSTANTS] == pytest.approx(decoder.linear * 4.126953125 / 8, rel=1e-6)
    assert held[sums.REST] == 2 * (COUNTS["LLaMA-65B"] - decoder.linear)
    assert held[sums.ADAPTERS] == held[sums.GRADIENTS] == 2 * 64 * 80 * (4 * 2 * 8192 + 3 * (8192 + 22016))
    assert held[sums.FIRST] == held[sums.SECOND] == 2 * held[sums.ADAPTERS]
    assert held[sums.ACTIVATIONS] == 80 * 512 * 8192 * 2 + 2 * 512 * 128 * 2


@pytest.mark.parametrize(
    "plant, name",
    [
        (("training", "moments"), "7B, mixed precision"),
        (("training", "master"), "7B, mixed precision"),
        (("training", "gradients"), "7B, float32"),
    ],
)
def test_a_wrong_sum_does_not_hold(monkeypatch: pytest.MonkeyPatch, plant: tuple[str, str], name: str) -> None:
    """Planted: one of the tensors in 8 bits."""
    from tarsia.plan import wall

    real = getattr(sums, plant[0])
    monkeypatch.setattr(wall, plant[0], lambda a, *more: real(replace(a, **{plant[1]: "int8"}), *more))
    assert figure(name).verdict is Verdict.FAILS


def test_what_is_said_is_judged_to_its_digits() -> None:
    made = Figure("f", "", {}, "", (Line("a", "", 1_449_000_000), Line("b", "", 1_000_000_000)))
    said = {
        Said(2): Verdict.HOLDS,
        Said(2.4, decimals=1): Verdict.HOLDS,
        Said(2.5, decimals=1): Verdict.FAILS,
        Said(3): Verdict.FAILS,
        Said(1.45, of=("a",), decimals=2): Verdict.HOLDS,
        Said(2.4, Relation.UNDER): Verdict.FAILS,
        Said(2.4, Relation.OVER): Verdict.HOLDS,
        Said(2.5, Relation.OVER): Verdict.FAILS,
    }
    for one, verdict in said.items():
        assert replace(made, said=(one,)).verdict is verdict, one
        assert replace(made, said=(Said(2), one)).verdict is verdict
    assert made.verdict is Verdict.UNSAID
    assert replace(made, said=(Said(2), Said(1.45, Relation.UNDER, ("a",), 2))).printed == "2 GB, a <= 1.45 GB"
    with pytest.raises(KeyError, match="c"):
        _ = replace(made, said=(Said(2, of=("c",)),)).verdict


def test_every_figure_is_told_whole() -> None:
    made = rows()
    assert len({f.name for f in made}) == len(made)
    for held in made:
        assert held.formula and held.lines and held.assumed and all(line.formula for line in held.lines)
        assert held.text or not held.said
        assert held.bytes == sum(line.bytes for line in held.lines)
        assert held.verdict is Verdict.HOLDS or held.note, "nothing silent"


def test_ones_own_number() -> None:
    made = {f.name: f for f in rows(assume("13B"))}
    assert made["13e9 parameters: trained whole"].bytes == 16 * 13 * 10**9
    assert made["13e9 parameters: QLoRA"].assumed["shapes"] == "LLaMA-2-13B"
    assert all(f.verdict is Verdict.UNSAID for f in made.values())
    named = {f.name: f for f in rows(assume("llama-2-13b", rank=8, patches="float32"))}
    assert named["LLaMA-2-13B: trained whole"].bytes == 16 * COUNTS["LLaMA-2-13B"]
    held = {line.what: line.bytes for line in named["LLaMA-2-13B: QLoRA"].lines}
    assert held[sums.ADAPTERS] == 4 * lora(MODELS["LLaMA-2-13B"].decoder, 8)


def test_a_number_without_shapes_says_so() -> None:
    made = {f.name: f for f in rows(assume("3B", nested=False))}
    assert made["3e9 parameters: in 4 bits"].bytes == 3 * 10**9 * 9 // 16
    assert "name a model" in made["3e9 parameters: in 4 bits"].note
    assert not any("adapters" in name or "QLoRA" in name for name in made)
    with pytest.raises(ConfigError, match="does not say what adapters"):
        sums.qlora(assume("3B"))


@pytest.mark.parametrize(
    "text, shapes",
    [("7B", "LLaMA-2-7B"), ("14b", "Qwen2.5-14B"), ("65B", "LLaMA-65B"), ("70B", "LLaMA-2-70B"), ("350M", None)],
)
def test_a_round_number_takes_the_nearest_shapes(text: str, shapes: str | None) -> None:
    assert assume(text).shapes == shapes
    assert assume(text).parameters == float(text[:-1]) * {"b": 10**9, "m": 10**6}[text[-1].lower()]
    assert nearest(assume(text).parameters) == shapes


@pytest.mark.parametrize("text", ["", "B", "0B", "-7B", "LLaMA-2-7C", "7", "nan B", "1e3B"])
def test_what_is_no_model_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a model of the table nor a number") as caught:
        assume(text)
    assert ("did you mean LLaMA-2-7B" in str(caught.value)) == (text in ("LLaMA-2-7C", "-7B"))


@pytest.mark.parametrize(
    "changed, what",
    [
        ({"weights": "nf4"}, "of no type"),
        ({"moments": None}, "of no type"),
        ({"rank": 0}, "whole number"),
        ({"batch": True}, "whole number"),
        ({"shapes": "GPT-5"}, "No model of this name"),
        ({"ranks": 8}, "no assumption of this name"),
    ],
)
def test_assumptions_that_make_no_sense_are_refused(changed: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        assume("7B", **changed)


def test_less_memory_under_each_assumption_that_saves() -> None:
    base = Assumptions(
        COUNTS["LLaMA-2-7B"], "LLaMA-2-7B", checkpointing=False, batch=4, patches="float32", nested=False
    )
    whole = sum(line.bytes for line in sums.qlora(base))
    for change in ({"checkpointing": True}, {"batch": 1}, {"patches": "bfloat16"}, {"nested": True}, {"rank": 8}):
        assert sum(line.bytes for line in sums.qlora(replace(base, **change))) < whole, change


def test_nothing_is_loaded() -> None:
    code = "import sys, tarsia.plan.wall as w; w.rows(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
