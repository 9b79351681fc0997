"""PiSSA and LoftQ beside PEFT's: the same start, the same step, the same files."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from families import FAMILIES
from oracles.beside_peft import LIMIT, MOVED, SOME, here, in_peft, learnt, logits, move, saved
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn

from tarsia.adapter import Adapter, Host, load, put, save
from tarsia.core.attach import Part, attach, patches
from tarsia.core.errors import AdapterError
from tarsia.core.site import Kind
from tarsia.methods.lora import LoRAConfig
from tarsia.quant.codec import Scheme
from tarsia.quant.tensor import Weight4

CONFIG = LoRAConfig(rank=4, alpha=6.0, ranks={"*.0.*": 2})
PARTS = (Part("pissa", "language", CONFIG), Part("lora", "vision", LoRAConfig(rank=2)))


@pytest.mark.parametrize("name", SOME)
def test_peft_reads_a_pissa_as_a_lora_of_twice_the_rank(name, tmp_path):
    inputs, base, adapted, _ = saved(FAMILIES[name], PARTS, tmp_path / "a")
    assert (adapted - base).abs().max() >= MOVED
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert {8, 4} <= {config["r"], *config["rank_pattern"].values()}
    assert (logits(in_peft(FAMILIES[name], tmp_path / "a"), inputs) - adapted).abs().max() <= LIMIT


@pytest.mark.parametrize("name", SOME)
def test_our_own_files_keep_every_bit(name, tmp_path):
    inputs, _, adapted, adapter = saved(FAMILIES[name], PARTS, tmp_path / "a")
    again = load(tmp_path / "a")
    for path, patched in adapter.patches.items():
        assert again.patches[path].method == patched.method
        assert again.patches[path].tensors.keys() == patched.tensors.keys()
        for key, tensor in patched.tensors.items():
            assert torch.equal(again.patches[path].tensors[key], tensor), (path, key)
    assert torch.equal(logits(here(FAMILIES[name], tmp_path / "a"), inputs), adapted)


def test_where_peft_has_no_place_for_the_rest_the_four_tensors_are_kept_apart(tmp_path):
    from tarsia.methods.full import FullConfig

    family = FAMILIES["gemma3"]
    host = Host.of(family.build()[0])
    parts = [PARTS[0], Part("full", "@*mm_input_projection_weight", FullConfig())]
    attach(host.model, host.sites, parts)
    move(learnt(host))
    save(Adapter.of(host, "default", parts), tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["peft_type"] == "TARSIA"
    inputs = family.batch((1, 2))
    assert torch.equal(logits(here(family, tmp_path / "a"), inputs), logits(host.model, inputs))


def pefts(family):
    """PEFT's PiSSA on the attention of the language model, as PEFT makes it."""
    where = r".*language_model.*\.(q_proj|v_proj)"
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=where, init_lora_weights="pissa")
    return peft.get_peft_model(family.build()[0], config, adapter_name="default").eval()


def factors(model):
    """PEFT's (A, B) by the path of their module."""
    found = {}
    for name, parameter in model.named_parameters():
        head, _, tail = name.removeprefix("base_model.model.").partition(".lora_")
        if tail:
            found.setdefault(head, {})[tail[0]] = parameter
    return found


@pytest.mark.parametrize("name", SOME)
def test_pefts_converted_pissa_is_read_here(name, tmp_path):
    family, inputs = FAMILIES[name], FAMILIES[name].batch((1, 2))
    base = logits(family.build()[0], inputs)
    model = pefts(family)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    move([p for sides in factors(model).values() for p in sides.values()], 0.1)
    theirs = logits(model, inputs)
    assert (theirs - base).abs().max() >= MOVED
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    host = Host.of(family.build()[0])
    adapter = load(tmp_path / "a", host)
    assert {patched.tensors["A"].shape[0] for patched in adapter.patches.values()} == {8}
    put(host, adapter, "theirs")
    assert (logits(host.model, inputs) - theirs).abs().max() <= 5 * LIMIT


def test_pefts_pissa_that_was_not_converted_is_refused(tmp_path):
    """Its base is another one, which PEFT makes anew from W each time it is loaded."""
    model = pefts(FAMILIES["llava"])
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="init_lora_weights"):
        load(tmp_path, Host.of(FAMILIES["llava"].build()[0]))


@pytest.mark.parametrize("name", SOME)
def test_the_start_and_the_gradients_are_pefts(name):
    family, inputs = FAMILIES[name], FAMILIES[name].batch((1, 2))
    theirs = pefts(family)
    host = Host.of(family.build()[0])
    sides = factors(theirs)
    config = LoRAConfig(rank=4, alpha=6.0)
    attach(host.model, host.sites, [Part("pissa", "; ".join(f"@{path}" for path in sides), config)])
    made = {site.path: patch for site, patch in patches(host.model, "default").items()}
    assert made.keys() == sides.keys()
    for path, patch in made.items():
        a, b = sides[path]["A"].data, sides[path]["B"].data
        assert torch.allclose(patch.B0 @ patch.A0, b @ a, atol=1e-5)
        # a singular vector's sign is anybody's: take theirs
        for own, their in ((patch.A, a), (patch.A0, a), (patch.B, b), (patch.B0, b)):
            own.data.copy_(their)
    for model in (theirs, host.model):
        out = model(**inputs).logits
        out.square().mean().backward()
    for path, patch in made.items():
        for own, their in ((patch.A, sides[path]["A"]), (patch.B, sides[path]["B"])):
            assert own.grad.norm() > 0
            assert (own.grad - their.grad).norm() <= 2e-4 * their.grad.norm()


def packed(family, scheme, **options):
    """A model with its language model's linear layers in 4 bits, and their weights as they were."""
    model = family.build(**options)[0]
    host = Host.of(model)
    was = {}
    for site in host.sites:
        if (
            site.kind is Kind.WEIGHT
            and "language_model" in site.path
            and isinstance(model.get_submodule(site.module), nn.Linear)
        ):
            module = model.get_submodule(site.module)
            was[site.path] = module.weight.detach()
            module.weight = nn.Parameter(Weight4.of(module.weight.detach(), scheme), requires_grad=False)
    return model, was


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_loftq_starts_where_pefts_decomposition_of_the_error_does(alpha):
    model, was = packed(FAMILIES["llava"], Scheme())
    sites = [site for site in Host.of(FAMILIES["llava"].build()[0]).sites if site.path in was]
    paths = "; ".join(f"@{site.path}" for site in sites)
    attach(model, sites, [Part("loftq", paths, LoRAConfig(4, alpha))], origin=lambda site: was[site.path])
    for site, patch in patches(model, "default").items():
        error = was[site.path] - model.get_submodule(site.module).weight.dense()
        theirs = _low_rank_decomposition(error, reduced_rank=4)
        assert (patch.scale * (patch.B @ patch.A) - theirs["L"] @ theirs["R"]).abs().max() <= 1e-6


def test_a_loftq_over_bitsandbytes_is_the_same_lora(tmp_path):
    """Its file is a plain LoRA's; over the same 4 bits PEFT gives the same outputs."""
    bnb = pytest.importorskip("bitsandbytes", reason="the oracle is bitsandbytes' own layer")
    # bitsandbytes 0.50 on the CPU decodes rows that are no whole blocks wrongly
    wide = {"text_config": {"hidden_size": 64, "intermediate_size": 128}}
    family, inputs = FAMILIES["llava"], FAMILIES["llava"].batch((1, 2))
    model, was = packed(family, Scheme(), **wide)
    host = Host.of(model)
    bits = logits(model, inputs)
    paths = "; ".join(f"@{path}" for path in was)
    parts = [Part("loftq", paths, LoRAConfig(8, 16.0))]
    attach(model, host.sites, parts, origin=lambda site: was[site.path])
    started = logits(model, inputs)
    whole = logits(family.build(**wide)[0], inputs)
    assert (started - whole).norm() < 0.9 * (bits - whole).norm()
    move(learnt(host))
    adapted = logits(model, inputs)
    assert (adapted - bits).abs().max() >= MOVED
    save(Adapter.of(host, "default", parts), tmp_path / "a")
    theirs = family.build(**wide)[0]
    for path in was:
        parent, _, name = path.rpartition(".")
        own = theirs.get_submodule(path)
        layer = bnb.nn.Linear4bit(own.in_features, own.out_features, own.bias is not None, torch.float32, True, "nf4")
        layer.weight = bnb.nn.Params4bit(own.weight.data, False, compress_statistics=True, quant_type="nf4")
        layer.bias = own.bias
        setattr(theirs.get_submodule(parent), name, layer.to("cpu"))
    theirs.is_loaded_in_4bit = True
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert any(type(module).__name__ == "Linear4bit" and hasattr(module, "lora_A") for module in loaded.modules())
    assert (logits(loaded, inputs) - adapted).abs().max() <= 5 * LIMIT
    other, _ = packed(family, Scheme(), **wide)
    there = Host.of(other)
    put(there, load(tmp_path / "a"), "again")
    assert torch.equal(logits(other, inputs), adapted)


def test_a_loftq_is_refused_over_the_16_bit_base(tmp_path):
    """Its B A would be added to a weight that lacks nothing."""
    family = FAMILIES["llava"]
    model, was = packed(family, Scheme())
    host = Host.of(model)
    parts = [Part("loftq", "; ".join(f"@{path}" for path in was), LoRAConfig(2))]
    attach(model, host.sites, parts, origin=lambda site: was[site.path])
    save(Adapter.of(host, "default", parts), tmp_path / "a")
    with pytest.raises(AdapterError, match="another base"):
        put(Host.of(family.build()[0]), load(tmp_path / "a"), "wrong")


def test_the_oracle_sees_a_start_that_is_not_subtracted(monkeypatch, tmp_path):
    """Planted: B0 written with the wrong sign."""
    from tarsia.methods.pissa import PiSSA

    def wrong(tensors):
        return {"A": torch.cat([tensors["A"], tensors["A0"]]), "B": torch.cat([tensors["B"], tensors["B0"]], 1)}

    monkeypatch.setattr(PiSSA, "to_lora", staticmethod(wrong))
    inputs, _, adapted, _ = saved(FAMILIES["llava"], PARTS, tmp_path / "a")
    assert (logits(in_peft(FAMILIES["llava"], tmp_path / "a"), inputs) - adapted).abs().max() > 100 * LIMIT
    assert math.isfinite(adapted.sum())
