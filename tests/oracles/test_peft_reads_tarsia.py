"""What Tarsia saves loads in PEFT with equal outputs, on every family."""

import json
import re

import pytest
from families import FAMILIES
from oracles.beside_peft import LIMIT, MOVED, in_peft, learnt, logits, move, saved

from tarsia.adapter import Adapter, Host, save
from tarsia.core.attach import Part, attach
from tarsia.methods.full import FullConfig
from tarsia.methods.lora import LoRAConfig
from tarsia.methods.rslora import RsLoRAConfig

SIZE = 0.02
# These projectors have a bare tensor on the model itself, which is no module of PEFT's: the rest of them.
BARE = {
    "llava_next": "@*.multi_modal_projector.*",
    "llava_onevision": "@*.multi_modal_projector.*",
    "blip_2": "@*qformer*; @*language_projection*",
}


def everywhere(name):
    language = RsLoRAConfig(rank=4, ranks={"*.0.*": 1}, alphas={"*.1.*": 5.0})
    return (
        Part("lora", "vision", LoRAConfig(rank=2, alpha=3.0, ranks={"*1*": 3})),
        Part("full", BARE.get(name, "projector"), FullConfig()),
        Part("rslora", "language", language),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_everywhere(name, tmp_path):
    inputs, base, adapted, _ = saved(FAMILIES[name], everywhere(name), tmp_path / "a", size=SIZE)
    assert (adapted - base).abs().max() >= MOVED
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (logits(in_peft(FAMILIES[name], tmp_path / "a"), inputs) - adapted).abs().max() <= LIMIT


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_full_alone(name, tmp_path):
    """PEFT has no adapter without LoRA: its dummy target stands in."""
    parts = [Part("full", f"vision; language.*; {BARE.get(name, 'projector')}", FullConfig())]
    inputs, base, adapted, _ = saved(FAMILIES[name], parts, tmp_path / "a", size=SIZE)
    assert (adapted - base).abs().max() >= MOVED
    assert (logits(in_peft(FAMILIES[name], tmp_path / "a"), inputs) - adapted).abs().max() <= LIMIT


@pytest.mark.parametrize("name", ["llava", "qwen3_vl_moe", "blip_2"])  # how a file is written knows no family
def test_one_rank(name, tmp_path):
    """Where ranks and scales are equal no pattern is written, so readers of r and lora_alpha alone agree."""
    part = Part("rslora", "language", RsLoRAConfig(rank=3))
    inputs, base, adapted, _ = saved(FAMILIES[name], [part], tmp_path / "a", size=0.05)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["lora_alpha"] / 3 == pytest.approx(16 / 3**0.5, rel=1e-15)
    assert (adapted - base).abs().max() >= MOVED
    assert (logits(in_peft(FAMILIES[name], tmp_path / "a"), inputs) - adapted).abs().max() <= LIMIT


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma3"])  # whose projector has no linear
def test_every_family_lora_in_the_projector(name, tmp_path):
    parts = [Part("lora", "projector", LoRAConfig(rank=2)), Part("lora", "language.0..1.q", LoRAConfig(rank=3))]
    inputs, base, adapted, _ = saved(FAMILIES[name], parts, tmp_path / "a", size=0.2)
    assert (adapted - base).abs().max() >= MOVED
    assert (logits(in_peft(FAMILIES[name], tmp_path / "a"), inputs) - adapted).abs().max() <= LIMIT


def test_the_oracle_sees_a_wrong_scale(tmp_path):
    """Planted: a scale that is 2 % off in what PEFT reads."""
    inputs, _, adapted, _ = saved(FAMILIES["llava"], everywhere("llava"), tmp_path / "a", size=SIZE)
    path = tmp_path / "a/adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_alpha"] *= 1.02
    path.write_text(json.dumps(config))
    assert (logits(in_peft(FAMILIES["llava"], tmp_path / "a"), inputs) - adapted).abs().max() > 10 * LIMIT


def test_the_oracle_sees_a_transposed_key(tmp_path):
    """Planted: two sites of one shape have exchanged their updates."""
    from safetensors.torch import load_file, save_file

    part = Part("lora", "language", LoRAConfig(rank=3))
    inputs, _, adapted, _ = saved(FAMILIES["llava"], [part], tmp_path / "a", size=0.05)
    path = tmp_path / "a/adapter_model.safetensors"
    swap = {"0.self_attn.k_proj": "0.self_attn.v_proj", "0.self_attn.v_proj": "0.self_attn.k_proj"}
    pattern = re.compile("|".join(map(re.escape, swap)))
    save_file({pattern.sub(lambda m: swap[m[0]], k): v for k, v in load_file(path).items()}, path)
    assert (logits(in_peft(FAMILIES["llava"], tmp_path / "a"), inputs) - adapted).abs().max() > 10 * LIMIT


# What PEFT has no place for is a folder that it refuses by name.


def refused(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "TARSIA"
    with pytest.raises(Exception, match="TARSIA"):
        in_peft(FAMILIES["llava"], folder)
    return config["why_not_peft"]


def test_half_a_module_is_refused(tmp_path):
    """Gemma-3's projector is a bare tensor beside a norm: alone it is no module of PEFT's."""
    part = Part("full", "@*mm_input_projection_weight", FullConfig())
    saved(FAMILIES["gemma3"], [part], tmp_path / "a", size=SIZE)
    assert "mm_soft_emb_norm" in refused(tmp_path / "a")[0]


@pytest.mark.parametrize("name", BARE)
def test_a_bare_tensor_of_the_model_is_refused(name, tmp_path):
    saved(FAMILIES[name], [Part("full", "projector", FullConfig())], tmp_path / "a")
    assert re.search("image_newline|query_tokens", refused(tmp_path / "a")[0])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_an_embedding_that_is_the_head_too_is_refused(name, tmp_path):
    """PEFT would replace the embedding and leave the head."""
    tied = {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": True}
    host = Host.of(FAMILIES[name].build(**tied)[0])
    part = Part("full", "@*embed_tokens", FullConfig())
    attach(host.model, host.sites, [part])
    move(learnt(host), SIZE)
    save(Adapter.of(host, "default", [part]), tmp_path / "a")
    assert "lm_head" in refused(tmp_path / "a")[0]


def test_the_bare_projector_is_saved_with_its_whole_module(tmp_path):
    saved(FAMILIES["gemma3"], [Part("full", "projector", FullConfig())], tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.multi_modal_projector"]


def test_experts_are_saved_whole(tmp_path):
    """3-D expert tensors: both of a module together are a module to save, one alone is not."""
    family = FAMILIES["qwen3_vl_moe"]
    both = [Part("full", "@*.0.mlp.experts*", FullConfig())]
    inputs, base, adapted, _ = saved(family, both, tmp_path / "both", size=0.1)
    assert (adapted - base).abs().max() >= MOVED
    assert (logits(in_peft(family, tmp_path / "both"), inputs) - adapted).abs().max() <= LIMIT
    saved(family, [Part("full", "@*.0.mlp.experts.down_proj", FullConfig())], tmp_path / "one")
    assert "gate_up_proj" in refused(tmp_path / "one")[0]
