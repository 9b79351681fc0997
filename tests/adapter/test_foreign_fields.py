"""Every field of PEFT's configuration: read, without effect, or refused by name."""

import dataclasses

import peft
import pytest

from tarsia.adapter.config import _IGNORED, _READ, PeftConfig
from tarsia.core.errors import AdapterError

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
# A value that a trained adapter could carry, where "true" would not be one.
VALUES = {
    "bias": "all",
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 4], [2, 5]],
    "lora_dropout": 0.5,
    "megatron_config": {"x": 1},
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [1, 2],
}


def test_what_a_plain_one_says():
    config = PeftConfig.read(PLAIN)
    assert (config.rank("x.q_proj"), config.scale("x.q_proj")) == (4, 1.5)
    assert config.targets("x.q_proj")
    assert not config.targets("x.xq_proj")


@pytest.mark.parametrize("name", sorted(f.name for f in dataclasses.fields(peft.LoraConfig)))
def test_every_field_that_peft_knows(name):
    """What this does not know changes the mathematics, or may: it is refused, by name."""
    default = peft.LoraConfig().to_dict().get(name)
    if name not in PLAIN:
        PeftConfig.read(PLAIN | {name: default})
    if name in _IGNORED | _READ and name not in VALUES:
        return
    if name == "lora_dropout":
        assert PeftConfig.read(PLAIN | {name: 0.5}).dropout == 0.5
        return
    with pytest.raises(AdapterError, match=name):
        PeftConfig.read(PLAIN | {name: VALUES.get(name, True)})


def test_every_field_that_is_named_here_is_peft_s():
    known = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert known >= (_IGNORED | _READ) - {"peft_version"}


@pytest.mark.parametrize("value", [True, 1, "x", {"a": 1}, [0], 0.1])
def test_a_field_that_nobody_knows(value):
    with pytest.raises(AdapterError, match="use_tomorrow"):
        PeftConfig.read(PLAIN | {"use_tomorrow": value})


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_field_that_nobody_knows_and_nobody_uses(value):
    PeftConfig.read(PLAIN | {"use_tomorrow": value})


@pytest.mark.parametrize(
    "change, match",
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": None}, "peft_type"),
        ({"bias": "lora_only"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": 0}, "r can not"),
        ({"r": "4"}, "r can not"),
        ({"r": None}, "r can not"),
        ({"lora_alpha": "6"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": "("}, "target_modules"),
        ({"exclude_modules": "["}, "exclude_modules"),
        ({"alpha_pattern": {"*": 1}}, "alpha_pattern"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    ],
)
def test_values_that_can_not_be_used(change, match):
    with pytest.raises(AdapterError, match=match):
        PeftConfig.read(PLAIN | change)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_alone(init):
    PeftConfig.read(PLAIN | {"init_lora_weights": init})


PATHS = [f"m.{tower}.layers.{n}.{leaf}" for tower in ("vision", "text") for n in range(12) for leaf in ("q_proj", "fc")]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["text.layers.1.q_proj", "fc"]},
        {"target_modules": r".*text.*\.(q_proj|fc)"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "fc"], "layers_to_transform": [0, 11], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "fc"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["1.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*vision.*"},
        {"target_modules": ["q_proj", "fc"], "modules_to_save": ["vision"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.q_proj": 9}},
        {"target_modules": ["q_proj"], "rank_pattern": {r".*text.*": 2, "q_proj": 3}, "use_rslora": True},
    ],
)
def test_the_same_modules_ranks_and_scales_as_peft(fields):
    """The reference is PEFT's own matching, on a model of these paths."""
    import torch

    model = torch.nn.Module()
    for path in PATHS:
        held = model
        *parents, leaf = path.split(".")
        for name in parents:
            if not hasattr(held, name):
                setattr(held, name, torch.nn.Module())
            held = getattr(held, name)
        setattr(held, leaf, torch.nn.Linear(16, 16))
    fields = {"r": 4, "lora_alpha": 6} | fields
    ours = PeftConfig.read({"peft_type": "LORA"} | fields)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**fields)).base_model.model
    found = {p: m for p, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {path for path in PATHS if ours.targets(path)} == found.keys()
    for path, layer in found.items():
        assert ours.rank(path) == layer.r["default"]
        assert ours.scale(path) == layer.scaling["default"]
