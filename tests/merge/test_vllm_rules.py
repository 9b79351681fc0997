"""vLLM's rules: every one is broken by a folder of its own, and a folder that breaks none is served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from families import FAMILIES

from tarsia.adapter import Host
from tarsia.core.errors import AdapterError, MergeError
from tarsia.core.site import Component, Kind
from tarsia.merge import vllm
from tarsia.merge.served import FAMILIES as SERVED
from tarsia.merge.served import spot, spot_of
from tarsia.merge.vllm import RANKS, RULES, Folder, judge

Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
BASE = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 96}}
FIELDS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
SHAPES = {f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": (32, 4)}


def folder(base: Mapping[str, Any] | None = BASE, tensors: Mapping[str, Any] = SHAPES, **fields: Any) -> Folder:
    held = {key: value for key, value in {**FIELDS, **fields}.items() if value is not ...}
    return Folder(held, tensors, base)


def named(path: str, rank: int = 4) -> dict[str, tuple[int, ...]]:
    return {f"base_model.model.{path}.lora_A.weight": (rank, 32), f"base_model.model.{path}.lora_B.weight": (32, rank)}


def broken(held: Folder) -> set[str]:
    return {one.rule for one in judge(held).broken}


BREAKS: list[tuple[str, Folder]] = [
    ("type", folder(peft_type="IA3")),
    ("type", folder(peft_type=...)),
    ("fields", folder(target_modules=...)),
    ("fields", folder(lora_alpha=None)),
    ("rank", folder(rank_pattern={"q_proj": 0})),
    ("rank", folder(r=4.5)),
    ("max rank", folder(r=513)),
    ("max rank", folder(rank_pattern={"q_proj": 1024})),
    ("whole modules", folder(modules_to_save=["multi_modal_projector"])),
    ("dora", folder(use_dora=True)),
    ("bias", folder(bias="all")),
    ("bias", folder(lora_bias=True)),
    ("start", folder(init_lora_weights="pissa")),
    ("start", folder(init_lora_weights="loftq")),
    ("variants", folder(use_qalora=True)),
    ("variants", folder(alora_invocation_tokens=[1, 2])),
    ("variants", folder(layer_replication=[[0, 1]])),
    ("names", folder(tensors={**SHAPES, f"{Q}.lora_magnitude_vector": (32,)})),
    ("names", folder(tensors={**SHAPES, "base_model.model.model.multi_modal_projector.linear_1.weight": (32, 24)})),
    ("some", folder(tensors={})),
    ("shapes", folder(r=5)),
    ("shapes", folder(tensors={f"{Q}.lora_A.weight": (4, 32)})),
    ("shapes", folder(tensors={f"{Q}.lora_A.weight": (32, 4), f"{Q}.lora_B.weight": (4, 32)})),
    ("family", folder({"model_type": "mllama"})),
    ("family", folder({"model_type": "llava_onevision"})),
    ("family", folder({"model_type": "gpt2"})),
    ("modules", folder(tensors=named("model.language_model.layers.0.self_attn.qkv"))),
    # Transformers' own name of the tower, under which vLLM has no module: it would be left out without a word
    ("modules", folder(tensors=named("model.vision_tower.encoder.layers.0.self_attn.q_proj"))),
    ("modules", folder({**BASE, "model_type": "gemma3"}, named("model.multi_modal_projector.linear"))),
    ("modules", folder({**BASE, "text_config": {"model_type": "mistral"}}, named("lm_head"))),
    ("modules", folder({**BASE, "text_config": {"model_type": "llama", "vocab_size": 300_000}}, named("lm_head"))),
]


@pytest.mark.parametrize("rule, held", BREAKS)
def test_each_rule_is_broken_by_its_folder(rule: str, held: Folder) -> None:
    assert rule in broken(held)
    found = next(one for one in judge(held).broken if one.rule == rule)
    assert found.given
    assert found.source
    with pytest.raises(MergeError, match=rule):
        vllm.refuse(judge(held), "a folder")


def test_every_rule_has_such_a_folder() -> None:
    assert {rule for rule, _ in BREAKS} == set(RULES)


@pytest.mark.parametrize(
    "held",
    [
        folder(),
        folder(None),
        folder(use_rslora=True, init_lora_weights="gaussian", modules_to_save=None),
        folder(r=2, rank_pattern={"language_model.layers.0.self_attn.q_proj": 4}),
        folder(tensors=named("lm_head")),
        folder(tensors=named("model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj")),
    ],
)
def test_a_plain_one_breaks_none(held: Folder) -> None:
    assert judge(held).broken == ()
    vllm.refuse(judge(held), "a folder")


def test_what_the_server_is_started_with() -> None:
    assert judge(folder()).options == ("--enable-lora",)
    assert "--max-lora-rank 32" in judge(folder(r=17, tensors=named("lm_head", 17))).options
    assert "--max-lora-rank 512" in judge(folder(r=400, tensors=named("lm_head", 400))).options
    tower = named("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1")
    assert "--enable-tower-connector-lora" in judge(folder(tensors=tower)).options
    assert judge(folder(None)).unchecked
    assert not judge(folder()).unchecked


def test_ranks_are_vllms() -> None:
    assert RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)


def test_files_that_are_none_are_refused(tmp_path: Any) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterError, match="pickles"):
        vllm.read(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_entry_and_its_language_layers_their_names(name: str) -> None:
    """All linear layers in the blocks of the language model, where the family has LoRA at all."""
    config = FAMILIES[name].config().to_dict()
    served = SERVED[config["model_type"]]
    sites = [s for s in Host.of(FAMILIES[name].build()[0]).sites if s.kind is Kind.WEIGHT]
    spots = {site: spot(config, site.path) for site in sites}
    if served.why:
        assert not any(spots.values())
        return
    blocks = [s for s in sites if s.component is Component.LANGUAGE and s.layer is not None]
    assert blocks
    for site in blocks:
        found = spots[site]
        assert found is not None, site.path
        assert not found.tower
    for site, found in spots.items():
        if found is not None:
            assert found.tower == (site.component is not Component.LANGUAGE)
            assert spot_of(config, found.written) == found
            assert found.module.rpartition(".")[2] == site.path.rpartition(".")[2]
