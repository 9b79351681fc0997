"""What is held to the base that it says it belongs to, and what nobody can hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from merge.fold_world import LORA, saved, trained
from merge.values import adapter, host

from tarsia.adapter import FourBits, Outline, open_outline
from tarsia.core.errors import BaseMismatch
from tarsia.merge import deltas, merge
from tarsia.merge.belonging import weights_here
from tarsia.merge.thin import thin


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base, and another with other numbers in the same places."""
    folder = tmp_path_factory.mktemp("bases")
    one, other = saved(folder / "one"), saved(folder / "other")
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    return one, other


def outlined(folder) -> Outline:
    return open_outline(str(folder), processor=False)


@pytest.mark.parametrize("form", [None, FourBits("nf4")])
def test_thin_adapters_are_held_to_an_outlines_files(bases, form):
    """No weight of the base is read for them, so nothing else would tell."""
    one = trained(bases[0], (LORA,), form=form)
    asked = (
        lambda base: merge([one, one], [1, 1], "cat", base),
        lambda base: thin(one, base),
        lambda b: deltas(one, b),
    )
    for does in asked:
        does(outlined(bases[0]))
        with pytest.raises(BaseMismatch, match="weights"):
            does(outlined(bases[1]))


def test_without_weights_the_architecture_is_looked_at(bases, tmp_path):
    one = trained(bases[0], (LORA,))
    config = json.loads((bases[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert weights_here(bases[0])
    assert not weights_here(tmp_path)
    thin(one, outlined(tmp_path))
    config["text_config"]["rms_norm_eps"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseMismatch, match="architecture"):
        thin(one, outlined(tmp_path))


def test_who_does_not_say_where_it_belongs_is_told_of_in_the_card():
    one, silent = adapter("lora"), replace(adapter("lora", 1), fingerprint=None)
    assert one.fingerprint is not None
    parents = merge([one, silent], [1, 1], "cat", host()).card["merged"]["parents"]
    assert [parent["fingerprint"] for parent in parents] == [one.fingerprint.weights, None]
