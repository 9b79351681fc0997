"""Another adapter's numbers in the place of those that are attached: what `put` would give, or nothing at all."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from tarsia.adapter import put
from tarsia.adapter.swap import swap
from tarsia.core.attach import Part, activate, active, detach, merge, patches, unmerge
from tarsia.core.errors import AdapterError, AttachError, BaseMismatch
from tarsia.core.method import METHODS, find

SELECT = {"bitfit": "vision", "vpt": "vision", "vpt_deep": "vision"}
METHOD = sorted(set(METHODS) - {"loftq"})
"""LoftQ starts from a quantised weight; what it leaves is LoRA's."""


def logits(host, inputs):
    with torch.no_grad():
        return host.model(**inputs).logits


@pytest.mark.parametrize("method", METHOD)
def test_what_put_would_give(host, inputs, make, method):
    parts = [Part(method, SELECT.get(method, "language"), find(method).config())]
    first, second = make(parts, seed=1), make(parts, seed=2)
    put(host, second, "new")
    wanted = logits(host, inputs)
    detach(host.model, "new")
    put(host, first, "here")
    before = dict(patches(host.model, "here"))
    other = logits(host, inputs)
    assert not torch.equal(other, wanted)
    swap(host, second, "here")
    assert torch.equal(logits(host, inputs), wanted) and active(host.model) == ("here",)
    assert all(patch is before[site] for site, patch in patches(host.model, "here").items())
    swap(host, first, "here")
    assert torch.equal(logits(host, inputs), other)


def test_the_value_stays_what_it_is(host, make):
    first, second = make(seed=1), make(seed=2)
    put(host, first, "here")
    swap(host, second, "here")
    with torch.no_grad():
        for patch in patches(host.model, "here").values():
            for parameter in patch.parameters():
                parameter.zero_()
    assert all(bool(tensor.any()) for patched in second.patches.values() for tensor in patched.tensors.values())


def test_one_that_does_not_act_still_does_not(host, inputs, make):
    first, second = make(seed=1), make(seed=2)
    base = logits(host, inputs)
    put(host, first, "here")
    activate(host.model)
    swap(host, second, "here")
    assert torch.equal(logits(host, inputs), base) and active(host.model) == ()


def others(adapter):
    """Values that are nearly of the adapter's make, by what is other."""
    lora = next(path for path, patched in adapter.patches.items() if patched.method == "lora")
    rank = adapter.patches[lora].tensors["A"].shape[0]
    held = adapter.patches[lora]
    out, into = held.tensors["B"].shape[0], held.tensors["A"].shape[1]
    wide = {"A": torch.ones(rank + 1, into), "B": torch.ones(out, rank + 1)}
    half = {key: tensor.half() for key, tensor in held.tensors.items()}

    def with_lora(**changes):
        return replace(adapter, patches=MappingProxyType({**adapter.patches, lora: replace(held, **changes)}))

    return {
        "rank": with_lora(tensors=wide),
        "dtype": with_lora(tensors=half),
        "scale": with_lora(constants={**held.constants, "scale": 3.5}),
        "method": with_lora(method="rslora"),
        "a site less": replace(adapter, patches={p: v for p, v in adapter.patches.items() if p != lora}),
        "a tensor less": with_lora(tensors={"A": held.tensors["A"]}),
    }


@pytest.mark.parametrize("what", ["rank", "dtype", "scale", "method", "a site less", "a tensor less"])
def test_another_make_is_refused_and_changes_nothing(host, make, what):
    first, second = make(seed=1), make(seed=2)
    put(host, first, "here")
    before = {s.path: {k: t.clone() for k, t in p.state_dict().items()} for s, p in patches(host.model, "here").items()}
    mixed = others(second)[what]
    with pytest.raises(AdapterError, match="not of the make of 'here'"):
        swap(host, mixed, "here")
    for site, patch in patches(host.model, "here").items():
        assert all(torch.equal(tensor, before[site.path][key]) for key, tensor in patch.state_dict().items())


def test_a_name_that_is_not_attached(host, make):
    first, second = make(seed=1), make(seed=2)
    put(host, first, "here")
    with pytest.raises(AttachError, match="No adapter 'there'"):
        swap(host, second, "there")


def test_another_base_is_refused(host, make):
    first, second = make(seed=1), make(seed=2)
    put(host, first, "here")
    assert second.fingerprint is not None
    with pytest.raises(BaseMismatch):
        swap(host, replace(second, fingerprint=replace(second.fingerprint, weights="files:0")), "here")


def test_merged_patches_are_refused(host, inputs, make):
    first, second = make(seed=1), make(seed=2)
    put(host, first, "here")
    merge(host.model)
    with pytest.raises(AttachError, match="unmerge first"):
        swap(host, second, "here")
    unmerge(host.model)
    swap(host, second, "here")


def test_a_site_like_the_others_whose_weight_is_not_is_refused(host, make):
    """What fits one place is remembered for those like it, and for no other."""
    adapter = replace(make([Part("lora", "language.*.q", find("lora").config())]), fingerprint=None)
    last = next(site for site in reversed(host.sites) if site.path in adapter.patches)
    module = host.model.get_submodule(last.module)
    module.weight = torch.nn.Parameter(torch.zeros(last.shape[0] + 1, last.shape[1]))
    with pytest.raises(AdapterError, match=f"{last.path} has not the shape"):
        put(host, adapter, "here")
    assert not host.model.get_submodule(last.module)._modules
