"""What an adapter adds is what its fold makes of (W, b), for every method that folds."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from merge.values import BOTTLENECKS, EVERY, FOLDING, THIN, adapter, gap, host

from tarsia.adapter import Host, put
from tarsia.core.attach import merge as fold_in_memory
from tarsia.core.errors import MergeError
from tarsia.merge import Delta, deltas
from tarsia.merge.delta import Grounds


@pytest.mark.parametrize("what", FOLDING)
def test_a_delta_is_the_folded_weight_less_the_weight(what):
    """Against the model that the adapter is folded into in memory, in float64."""
    wide = Host.of(deepcopy(host().model).double())
    one = adapter(what)
    found = deltas(one, wide)
    before = {name: tensor.clone() for name, tensor in wide.model.state_dict().items()}
    put(wide, _of(one, wide), "one")
    fold_in_memory(wide.model)
    after, sites = dict(wide.model.named_parameters()), {site.path: site for site in wide.sites}
    assert found.keys() == one.patches.keys()
    moved = 0.0
    for path, delta in found.items():
        site = sites[path]
        change = after[site.weight].detach() - before[site.weight]
        given = torch.zeros_like(change) if delta.still else delta.weight().view_as(change)
        assert gap(given, change) < 2e-6, path  # DoRA measures rows in float32
        moved = max(moved, float(change.abs().max()))
        if site.bias is not None:
            shift = after[site.bias].detach() - before[site.bias]
            assert gap(torch.zeros_like(shift) if delta.bias is None else delta.bias.view_as(shift), shift) < 2e-6
            moved = max(moved, float(shift.abs().max()))
    assert moved > 0.01, "the adapter changes nothing, so nothing was tried"


def _of(one, wide):
    from dataclasses import replace

    return replace(one, fingerprint=wide.fingerprint)


@pytest.mark.parametrize("what", THIN)
def test_thin_methods_stay_factored_and_never_read_the_base(what):
    def read(path):
        raise AssertionError(f"{path} was read")

    sites = {site.path: site for site in host().sites}
    for delta in deltas(adapter(what), Grounds(host(), sites, read)).values():
        assert delta.factored and delta.whole is None and delta.bias is None


def test_a_bias_alone_reads_nothing_and_moves_no_weight():
    def read(path):
        raise AssertionError(f"{path} was read")

    sites = {site.path: site for site in host().sites}
    found = deltas(adapter("bitfit"), Grounds(host(), sites, read))
    assert all(delta.still and delta.bias is not None for delta in found.values())


@pytest.mark.parametrize("what", [*BOTTLENECKS, "prompt", "prefix", "vpt", "vpt_deep"])
def test_what_is_no_change_of_a_weight_is_refused_by_site_and_method(what):
    one = adapter(what)
    with pytest.raises(MergeError, match="no change of a weight") as refusal:
        deltas(one, host())
    assert next(iter(one.patches)) in str(refusal.value) and EVERY[what][0][0] in str(refusal.value)


def test_the_norm_of_factors_is_that_of_their_product():
    for delta in deltas(adapter("unequal"), host()).values():
        assert delta.norm == pytest.approx(float(delta.weight().norm()), rel=1e-12)


def test_a_delta_of_nothing_has_no_weight():
    with pytest.raises(MergeError, match="changes no weight"):
        Delta().weight()


def test_a_site_that_the_base_has_not_is_named():
    other = Host(**{**host().__dict__, "sites": host().sites[:3]})
    with pytest.raises(MergeError, match="no such place"):
        deltas(adapter("lora"), other)
