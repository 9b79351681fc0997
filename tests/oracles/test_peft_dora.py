"""DoRA's files, both ways: PEFT gives the same outputs from ours, and ours from PEFT's."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import safetensors.torch
import torch
from families import FAMILIES
from oracles.beside_peft import LIMIT, MOVED, SOME, here, in_peft, logits, move, saved

from tarsia.adapter import Host, load, put, save
from tarsia.core.attach import Part
from tarsia.core.errors import AdapterError
from tarsia.methods.lora import LoRAConfig

CONFIG = LoRAConfig(rank=4, alpha=6.0, ranks={"*.0.*": 2})
PARTS = (Part("dora", "language", CONFIG), Part("dora", "vision", LoRAConfig(rank=2)))


@pytest.mark.parametrize("name", SOME)
def test_peft_reads_ours(name, tmp_path):
    inputs, base, adapted, _ = saved(FAMILIES[name], PARTS, tmp_path / "a")
    assert (adapted - base).abs().max() >= MOVED
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == ("LORA", True)
    assert (logits(in_peft(FAMILIES[name], tmp_path / "a"), inputs) - adapted).abs().max() <= LIMIT
    assert torch.equal(logits(here(FAMILIES[name], tmp_path / "a"), inputs), adapted)


def pefts(family, folder, **options):
    """PEFT's own, moved and saved."""
    settings = {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "v_proj"]} | options
    model = peft.get_peft_model(family.build()[0], peft.LoraConfig(**settings)).eval()
    move([p for p in model.parameters() if p.requires_grad], 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("name", SOME)
def test_ours_reads_pefts(name, options, tmp_path):
    family, inputs = FAMILIES[name], FAMILIES[name].batch((1, 2))
    theirs = pefts(family, tmp_path / "a", **options)
    host = Host.of(family.build()[0])
    base = logits(host.model, inputs)
    adapter = load(tmp_path / "a", host)
    assert {patched.method for patched in adapter.patches.values()} == {"dora"}
    put(host, adapter, "theirs")
    given = logits(host.model, inputs)
    assert (given - base).abs().max() >= MOVED
    assert (given - logits(theirs, inputs)).abs().max() <= LIMIT
    save(adapter, tmp_path / "b")
    assert (logits(in_peft(family, tmp_path / "b"), inputs) - given).abs().max() <= LIMIT


def test_both_spellings_of_the_magnitude_are_read(tmp_path):
    family, inputs = FAMILIES["llava"], FAMILIES["llava"].batch((1, 2))
    theirs = pefts(family, tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    (old,) = {key.endswith("lora_magnitude_vector") for key in tensors if "magnitude" in key}
    other = {
        (f"{key}.weight" if old else key.removesuffix(".weight")) if "magnitude" in key else key: value
        for key, value in tensors.items()
    }
    assert any("lora_magnitude_vector.weight" in key for key in other) is old
    safetensors.torch.save_file(other, path)
    assert (logits(here(family, tmp_path / "a"), inputs) - logits(theirs, inputs)).abs().max() <= LIMIT


def test_lora_beside_dora_is_no_folder_of_pefts(tmp_path):
    parts = (Part("dora", "language.0.{q,v}", CONFIG), Part("lora", "language.1.{q,v}", LoRAConfig(rank=2)))
    inputs, _, adapted, _ = saved(FAMILIES["llava"], parts, tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == "TARSIA"
    assert any("at all updates of an adapter or at none" in why for why in config["why_not_peft"])
    assert torch.equal(logits(here(FAMILIES["llava"], tmp_path / "a"), inputs), adapted)


def damaged(tmp_path, change, fields=None):
    pefts(FAMILIES["llava"], tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b/adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    if fields:
        config = json.loads((tmp_path / "b/adapter_config.json").read_text()) | fields
        (tmp_path / "b/adapter_config.json").write_text(json.dumps(config))
    return load(tmp_path / "b", Host.of(FAMILIES["llava"].build()[0]))


def without(tensors):
    key = next(key for key in tensors if "magnitude" in key)
    return {name: value for name, value in tensors.items() if name != key}


def shorter(tensors):
    key = next(key for key in tensors if "magnitude" in key)
    return tensors | {key: tensors[key][:-1].clone()}


@pytest.mark.parametrize(
    "change, fields, says",
    [
        (without, None, "whether the update"),
        (dict, {"use_dora": False}, "whether the update"),
        (shorter, None, "another shape"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, fields, says, tmp_path):
    with pytest.raises(AdapterError, match=says):
        damaged(tmp_path, change, fields)


def test_one_that_was_never_trained_is_refused(tmp_path):
    model = peft.get_peft_model(
        FAMILIES["llava"].build()[0], peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="changes nothing"):
        load(tmp_path / "a", Host.of(FAMILIES["llava"].build()[0]))


def test_a_changed_use_dora_is_seen(tmp_path):
    saved(FAMILIES["llava"], PARTS, tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.raises(AdapterError, match="use_dora"):
        load(tmp_path / "a")
