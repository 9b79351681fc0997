"""The case that measures plans on a GPU, as far as it goes without one."""

from __future__ import annotations

import pytest
import torch

from bench.cases import plan_cuda
from bench.grid.large import base, recipe
from tarsia.adapter.four_bits import choose
from tarsia.quant.tensor import Weight4

TEXT = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}


def test_where_there_is_no_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        plan_cuda.measure()


def test_random_weights_are_in_the_form_that_the_recipe_says(tmp_path):
    from tarsia.train import Recipe

    base(tmp_path, TEXT, TOWER)
    chosen = Recipe.load(recipe(tmp_path, tokens=700))
    host = plan_cuda.random_host(chosen, torch.device("cpu"))
    packed = {name for name, value in host.model.named_parameters() if isinstance(value, Weight4)}
    assert packed == choose(chosen.four_bits.form, host.model, host.sites).names
    assert len(packed) > 7
    assert not any(value.is_meta for value in (*host.model.parameters(), *host.model.buffers()))
    one = next(value for value in host.model.parameters() if isinstance(value, Weight4))
    assert 0 < float(one.dense().abs().max()) < 0.1


def test_the_large_step_runs(tmp_path):
    row = plan_cuda.large(tmp_path, "cpu", text=TEXT, tower=TOWER)
    assert row["planned in s"] > 0
    assert set(row) == {"planned in s", "planned GB"}
