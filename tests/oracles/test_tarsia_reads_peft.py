"""What PEFT saves loads here with equal outputs, on every family."""

import peft
import pytest
from families import FAMILIES
from oracles.beside_peft import LIMIT, MOVED, batch, here, logits, move
from torch import nn

from tarsia.adapter import Host, load
from tarsia.core.errors import AdapterError
from tarsia.core.site import Component, Kind


def modules_of(family, *components):
    """Names of linear layers that live, and of the modules that hold the projector's parameters."""
    host = Host.of(family.build()[0])
    modules = dict(host.model.named_modules())
    linear = [
        site.path
        for site in host.sites
        if site.component in components
        and site.kind is Kind.WEIGHT
        and not site.dead
        and isinstance(modules.get(site.path), nn.Linear)
    ]
    projector = sorted({site.module for site in host.sites if site.component is Component.PROJECTOR} - {"", "model"})
    outermost = [name for name in projector if not any(name.startswith(f"{other}.") for other in projector)]
    return linear, outermost


def made_by_peft(family, folder, size=0.02, **options):
    """A random adapter that PEFT made and saved; returns inputs, the base's logits and PEFT's."""
    inputs = batch(family)
    base = logits(family.build()[0], inputs)
    model = peft.get_peft_model(family.build()[0], peft.LoraConfig(**options)).eval()
    move((p for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name), size)
    model.save_pretrained(folder)
    return inputs, base, logits(model, inputs)


def check(family, folder, size=0.02, **options):
    inputs, base, theirs = made_by_peft(family, folder, size, **options)
    assert (theirs - base).abs().max() >= MOVED
    assert (logits(here(family, folder), inputs) - theirs).abs().max() <= LIMIT


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, tmp_path):
    linear, projector = modules_of(FAMILIES[name], Component.VISION, Component.LANGUAGE)
    check(
        FAMILIES[name],
        tmp_path,
        r=4,
        lora_alpha=6,
        target_modules=linear,
        modules_to_save=projector,
        rank_pattern={linear[0]: 2, linear[-1].rpartition(".")[2]: 3},
        alpha_pattern={linear[0]: 5, "layers.1.self_attn.q_proj": 9},
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_rslora_by_suffix(name, tmp_path):
    linear, _ = modules_of(FAMILIES[name], Component.LANGUAGE)
    suffixes = sorted({path.rpartition(".")[2] for path in linear} - {"lm_head"})
    check(FAMILIES[name], tmp_path, r=4, lora_alpha=6, use_rslora=True, target_modules=suffixes)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl_moe", "blip_2"])  # test_foreign_fields.py holds the rest to PEFT
def test_by_regex(name, tmp_path):
    linear, _ = modules_of(FAMILIES[name], Component.VISION, Component.LANGUAGE)
    leaf = sorted({path.rpartition(".")[2] for path in linear})[0]
    check(FAMILIES[name], tmp_path, 0.1, r=2, lora_alpha=4, target_modules=rf".*\.{leaf}")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_all_linear(name, tmp_path):
    check(FAMILIES[name], tmp_path, r=2, lora_alpha=4, target_modules="all-linear")


def test_layers_and_exclusions(tmp_path):
    check(
        FAMILIES["llava"],
        tmp_path,
        0.1,
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        exclude_modules=["layers.2.self_attn.v_proj"],
    )


def test_nested_modules_to_save_are_refused(tmp_path):
    """ "model" also names model.language_model: PEFT wraps both and saves what it then can not load itself."""
    made_by_peft(FAMILIES["llava"], tmp_path, r=2, target_modules=["lm_head"], modules_to_save=["model"])
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(FAMILIES["llava"].build()[0], tmp_path)
    with pytest.raises(AdapterError, match="one inside the other"):
        load(tmp_path, Host.of(FAMILIES["llava"].build()[0]))


@pytest.mark.parametrize("ensure", [False, True])
def test_an_embedding_that_is_the_head_too_is_refused(ensure, tmp_path):
    """PEFT replaces the embedding and leaves the head, or says with a flag that is not known here that it does not."""
    tied = {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": True}
    model = FAMILIES["llava"].build(**tied)[0]
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": ensure}
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **options)).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="ensure_weight_tying" if ensure else "one tensor with lm_head"):
        load(tmp_path, Host.of(FAMILIES["llava"].build(**tied)[0]))


def test_the_oracle_sees_a_wrong_scale(tmp_path, monkeypatch):
    """Planted: rsLoRA's scale read as the paper's."""
    from tarsia.adapter.config import PeftConfig

    family = FAMILIES["llava"]
    inputs, _, theirs = made_by_peft(family, tmp_path, r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])
    monkeypatch.setattr(PeftConfig, "scale", lambda self, path: self.lora_alpha / self.rank(path))
    assert (logits(here(family, tmp_path), inputs) - theirs).abs().max() > 10 * LIMIT
