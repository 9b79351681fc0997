"""A weight as the files hold it: by whatever name, of whatever shard, alone."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from torch import nn

from tarsia.adapter import FourBits, Host, open_base
from tarsia.adapter.export import quantise
from tarsia.adapter.origin import Origins
from tarsia.core.attach import Part, attach, detach, patches
from tarsia.core.errors import AdapterError, AttachError
from tarsia.core.site import Kind
from tarsia.methods.lora import LoRAConfig
from tarsia.train.memory import live


def linear(host):
    modules = dict(host.model.named_modules())
    return [s for s in host.sites if s.kind is Kind.WEIGHT and isinstance(modules.get(s.module), nn.Linear)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_layer_of_every_family_is_found(name, tmp_path):
    """Transformers saves under the names of the checkpoints of the hub, which are not the model's."""
    model = FAMILIES[name].build()[0]
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    host = Host.of(model)
    origins, missing = Origins(tmp_path, model, host.sites), []
    assert linear(host)
    for site in linear(host):
        if site.weight not in origins.places:
            missing.append(site.path)
        else:
            assert torch.equal(origins(site), host.model.get_parameter(site.weight)), site.path
    assert missing == []


def test_a_weight_that_the_files_do_not_have_is_refused(tmp_path):
    model = FAMILIES["llava"].build()[0]
    model.save_pretrained(tmp_path)
    host = Host.of(model)
    origins = Origins(tmp_path, model, host.sites)
    site = linear(host)[0]
    del origins.places[site.weight]
    with pytest.raises(AttachError, match="another form"):
        origins(site)


PART = Part("loftq", "language", LoRAConfig(rank=4))


def test_loftq_from_the_files_of_a_base_that_was_rounded_as_it_was_opened(checkpoint):
    host = open_base(str(checkpoint), processor=False, four_bits=FourBits())
    whole = open_base(str(checkpoint), processor=False)
    attach(host.model, host.sites, [PART], origin=host.origin)
    made = patches(host.model, "default")
    assert made
    for site, patch in made.items():
        w = whole.model.get_parameter(site.weight).double()
        error = w - host.model.get_parameter(site.weight).dense().double()
        left = error - patch.scale * (patch.B.double() @ patch.A.double())
        assert left.norm().item() == pytest.approx(torch.linalg.svdvals(error)[4:].norm().item(), rel=1e-5)
    inputs = FAMILIES["llava"].batch()
    with torch.no_grad():
        wanted, started = whole.model(**inputs).logits, host.model(**inputs).logits
        detach(host.model, "default")
        rounded = host.model(**inputs).logits
    assert (started - wanted).norm() < 0.95 * (rounded - wanted).norm()


def test_a_base_without_16_bit_files_is_refused(checkpoint):
    host = open_base(str(checkpoint), processor=False, four_bits=FourBits())
    whole = open_base(str(checkpoint), processor=False)
    with pytest.raises(AttachError, match="no error to correct"):
        attach(whole.model, whole.sites, [PART], origin=whole.origin)
    memory = Host.of(host.model)
    for other, why in ((memory, "built in memory"), (whole, "the files hold it as it is")):
        with pytest.raises(AttachError, match=why):
            attach(host.model, host.sites, [PART], origin=other.origin)


def test_a_base_that_was_quantised_before_it_was_saved_is_refused(checkpoint, tmp_path):
    quantise(str(checkpoint), tmp_path / "four")
    host = open_base(str(tmp_path / "four"), processor=False)
    with pytest.raises(AttachError, match="hold the 4 bits alone") as refused:
        attach(host.model, host.sites, [PART], origin=host.origin)
    assert "four_bits" in str(refused.value)


def test_a_weight_is_read_alone(tmp_path):
    """Of a file that is mapped whole the allocator's record holds every byte, however small the tensor."""
    model = FAMILIES["llava"].build()[0]
    model.save_pretrained(tmp_path)
    host = Host.of(model)
    origins = Origins(tmp_path, model, host.sites)
    site = linear(host)[0]
    assert origins.places
    with live() as watched:
        weight = origins(site)
    assert watched.peak == 0
    assert not weight.untyped_storage().resizable()


def test_a_file_that_ends_too_early_is_said(tmp_path):
    model = FAMILIES["llava"].build()[0]
    model.save_pretrained(tmp_path)
    host = Host.of(model)
    origins = Origins(tmp_path, model, host.sites)
    site = linear(host)[0]
    place = origins.places[site.weight]
    with place.path.open("r+b") as file:
        file.truncate(place.begin + 1)
    with pytest.raises(AdapterError, match="can not be read"):
        origins(site)
