"""A switch walks the model without its patches: it finds every slot, in the modules' order, and sees nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from laws.worlds import logits, worlds
from torch import nn

import tarsia.methods  # noqa: F401 (registers every method)
from tarsia.core.attach import Part, activate, active, attach, detach, routed, slots
from tarsia.core.compose import Average, Stack
from tarsia.core.errors import AttachError
from tarsia.core.segments import Segments
from tarsia.core.slot import Slot
from tarsia.methods.lora import LoRAConfig

NAMES = ("one", "two", "three")


@pytest.fixture
def model():
    """A model with three adapters, of which none is its base."""
    made = worlds()["pictures"].model()
    selects = ("language.*.{q,v}", "vision.*.{up,down}", "language.*.{q,up}")
    for number, (name, select) in enumerate(zip(NAMES, selects, strict=True)):
        attach(made, worlds()["pictures"].sites, [Part("lora", select, LoRAConfig())], name=name, seed=number)
        with torch.no_grad():
            for slot in slots(made):
                for patch in slot.held(name).values():
                    patch.B.normal_(std=0.3)
    return made


def walked(model: nn.Module) -> list[Slot]:
    return [module for module in model.modules() if isinstance(module, Slot)]


def test_every_slot_is_found_in_the_order_of_the_modules(model):
    assert list(slots(model)) == walked(model) != []
    assert list(slots(copy.deepcopy(model))) != walked(model)
    inner = model.get_submodule(walked(model)[0].sites[next(iter(walked(model)[0].sites))].module)
    assert list(slots(inner)) == [inner.slot]


def test_a_module_that_stands_twice_is_seen_once(model):
    both = nn.ModuleList([model, nn.Linear(2, 2), None, model])
    assert list(slots(both)) == walked(both) and len(slots(both)) == len(slots(model))


def test_what_patches_hold_is_not_walked_through(model):
    """However many adapters are held, a switch looks at the base's modules and no more."""
    seen = []

    class Told(dict):
        def values(self):
            seen.append(self)
            return super().values()

        def items(self):
            seen.append(self)
            return super().items()

    for slot in slots(model):
        for held in slot.patches.values():
            held.__dict__["_modules"] = Told(held._modules)
    activate(model, "two")
    assert not seen
    list(model.modules())
    assert seen


def test_a_switch_reaches_every_slot(model):
    activate(model)
    base = logits(model, worlds()["pictures"].inputs)
    said = {}
    for part in (*NAMES, Stack("one", "two"), Average("one", "two")):
        activate(model, part)
        assert {slot.active for slot in walked(model)} == {active(model)}
        said[part] = logits(model, worlds()["pictures"].inputs)
        assert not torch.equal(said[part], base)
    assert len({float(value.sum()) for value in said.values()}) == len(said)
    activate(model)
    assert torch.equal(logits(model, worlds()["pictures"].inputs), base)


@pytest.mark.parametrize("act", [activate, detach])
def test_an_unknown_name_changes_nothing(model, act):
    activate(model, "one")
    with pytest.raises(AttachError, match="No adapter 'four'") as told:
        act(model, "four")
    assert all(name in str(told.value) for name in NAMES) and active(model) == ("one",)


def test_a_name_that_only_a_later_slot_has_is_known(model):
    last = walked(model)[-1]
    assert any("three" not in slot.patches for slot in walked(model))
    activate(model, "three")
    assert last.active == ("three",)


def test_routes_are_taken_back(model):
    with pytest.raises(AttachError, match="No adapter"), routed(model, ["one", "four"], Segments({})):
        pass
    assert all(slot.route is None for slot in walked(model))
