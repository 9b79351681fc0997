"""A picture's signature is the bare base's, whoever asks; a card's look is small, whole, and read as it was written."""

from __future__ import annotations

import base64
import copy
import json

import pytest
import torch
from data.processors import picture
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.adapter import Host, open_base
from tarsia.adapter.prototypes import FEWEST, MOST, Look, clusters
from tarsia.adapter.signature import DEPTHS, picture_inputs, pooled, signature, view
from tarsia.core.attach import Part, activate, active, attach, patches
from tarsia.core.errors import AdapterError
from tarsia.core.method import find
from tarsia.data.samples import Picture

SEEN = {"version": "1", "weights": "files:0"}


def signatures(count=40, width=24, seed=0, middle=0.0):
    generator = torch.Generator().manual_seed(seed)
    return middle + torch.randn(count, width, generator=generator)


@pytest.fixture(scope="module")
def mini():
    return open_base("mini-1")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mllama"])
def test_every_family_has_one(name):
    family = FAMILIES[name]
    model, _ = family.build()
    host = Host.of(model)
    found = signature(host, family.batch((1,)))
    assert found.shape == (2 * len(DEPTHS) * 24,)
    assert found.dtype == torch.float32 and bool(found.isfinite().all())
    assert not torch.equal(found, signature(host, family.batch((1,), seed=1)))


def test_a_family_whose_tower_is_not_called_apart_says_so():
    family = FAMILIES["mllama"]
    with pytest.raises(AdapterError, match="no signature") as told:
        signature(Host.of(family.build()[0]), family.batch((1,)))
    assert "mllama" in str(told.value) and "routing: 0" in str(told.value)


def test_no_adapter_acts_on_it_and_what_acted_does_so_again():
    family = FAMILIES["llava"]
    host = Host.of(family.build()[0])
    inputs = family.batch((1,))
    bare = signature(host, inputs)
    attach(host.model, host.sites, [Part("lora", "vision.*.{q,v}", find("lora").configure({}))], name="a", seed=0)
    with torch.no_grad():
        for patch in patches(host.model, "a").values():
            patch.B.normal_()
    host.model.train()
    acting = host.model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    assert not torch.allclose(pooled(acting), bare)  # the adapter would have moved it
    assert torch.equal(signature(host, inputs), bare)
    assert active(host.model) == ("a",) and host.model.training
    activate(host.model)


def test_other_inputs_of_the_row_are_not_looked_at(mini):
    inputs = picture_inputs(mini, Picture(picture(shade=9), "p", "s", 0))
    assert "input_ids" in inputs
    alone = dict(mini.processor.image_processor([picture(shade=9)], return_tensors="pt"))
    assert torch.equal(signature(mini, inputs), signature(mini, alone))


def test_a_state_that_is_no_number_is_refused(mini):
    inputs = picture_inputs(mini, Picture(picture(), "p", "s", 0))
    with pytest.raises(AdapterError, match="no numbers"):
        signature(mini, {"pixel_values": inputs["pixel_values"] * float("nan")})


def test_the_view_names_the_base_and_the_size_of_pictures(mini):
    found = view(mini)
    assert found["weights"] == mini.fingerprint.weights and found["resolution"] == "none" and "template" not in found


@settings(max_examples=25, deadline=None)
@given(count=st.integers(FEWEST, 60), width=st.integers(2, 40), seed=st.integers(0, 9))
def test_a_look_is_read_as_it_was_written(count, width, seed):
    look = Look.of(SEEN, signatures(count, width, seed, middle=3.0))
    again = Look.read(json.loads(json.dumps(look.plain())))
    assert again.view == SEEN and again.pictures == count and again.width == width
    assert torch.equal(again.counts, look.counts) and int(look.counts.sum()) + len(look.apart) == count
    for name, most in (("prototypes", 4e-3), ("directions", 2e-2), ("rest", 2e-2), ("apart", 5e-2)):
        assert torch.allclose(getattr(again, name), getattr(look, name), atol=most, rtol=2e-2), name


def test_it_is_small():
    assert len(json.dumps(Look.of(SEEN, signatures(128, 1152)).plain())) < 64_000


def test_the_covariance_is_that_of_the_pictures():
    points = signatures(400, 6) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    look = Look.of(SEEN, points)
    made = look.directions.T @ look.directions + look.rest.diag()
    assert torch.allclose(made, torch.cov(points[16:].T), rtol=0.1, atol=0.6)


def test_two_kinds_of_pictures_have_two_prototypes_and_one_has_one():
    two = torch.cat([signatures(40, seed=1), signatures(40, seed=2, middle=9.0)])[torch.randperm(80)]
    owners, prototypes = clusters(two)
    assert len(prototypes) == 2 and sorted(torch.bincount(owners).tolist()) == [40, 40]
    assert len(clusters(signatures(80))[1]) == 1
    many = torch.cat([signatures(20, seed=i, middle=9.0 * i) for i in range(7)])
    assert 1 <= len(clusters(many)[1]) <= MOST


def test_too_few_pictures_are_refused():
    with pytest.raises(AdapterError, match="So few pictures"):
        Look.of(SEEN, signatures(FEWEST - 1))


def broken(change):
    values = copy.deepcopy(Look.of(SEEN, signatures()).plain())
    change(values)
    return values


def lost(raw):
    return base64.b64encode(base64.b64decode(raw)[:-2]).decode()


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("view"),
        lambda v: v.update(width=0),
        lambda v: v.update(width="24"),
        lambda v: v.update(width=10**30),
        lambda v: v.update(counts=[]),
        lambda v: v.update(counts=[24] * 9),
        lambda v: v.update(prototypes="%%%"),
        lambda v: v.update(prototypes=lost(v["prototypes"])),
        lambda v: v.update(rest=v["rest"] * 2),
        lambda v: v.update(prototypes=base64.b64encode(b"\x00\x7c" * 24).decode()),
        lambda v: v["directions"].update(scale=""),
        lambda v: v["apart"].update(values=7),
        lambda v: v.update(apart=None),
        lambda v: v.update(view={"version": 1}),
    ],
)
def test_what_is_broken_is_refused(change):
    with pytest.raises(AdapterError, match="can not be read"):
        Look.read(broken(change))


@pytest.mark.parametrize("values", [None, 3, [], "text", {}])
def test_what_is_no_look_is_refused(values):
    with pytest.raises(AdapterError, match="can not be read"):
        Look.read(values)
