"""Adapters over 4 bits: a choice that nobody guesses, and what is left of a change that is rounded again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from merge.fold_world import LORA, saved, trained

from tarsia.adapter import FourBits, open_base
from tarsia.adapter.export import quantise
from tarsia.core.attach import Part
from tarsia.core.errors import ConfigError, MergeError
from tarsia.core.method import METHODS
from tarsia.merge.fold import RECORD, fold
from tarsia.quant.tensor import Weight4

NF4 = FourBits()
LARGE = Part("lora", "language.*.v", METHODS["lora"].config(rank=8, alpha=8.0))
"""With tensors of this size the change is as large as the weight."""
SIZE = 0.3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("bits") / "base", "llava")


@pytest.fixture(scope="module")
def adapter(base):
    return trained(base, form=NF4)


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "four"
    quantise(str(base), folder)
    return folder


@pytest.fixture(scope="module")
def over_packed(packed):
    return trained(packed)


def test_there_is_no_default(base, adapter, packed, over_packed, tmp_path):
    for folder, one in ((base, adapter), (packed, over_packed)):
        with pytest.raises(ConfigError, match="into which numbers") as refusal:
            fold(str(folder), one, tmp_path / "out")
        assert "dequantised:" in str(refusal.value.allowed) and "original:" in str(refusal.value.allowed)
    assert not (tmp_path / "out").exists()


def test_a_choice_where_there_is_none(base, packed, over_packed, tmp_path):
    with pytest.raises(ConfigError, match="nothing to choose"):
        fold(str(base), trained(base), tmp_path / "out", onto="dequantised")
    with pytest.raises(ConfigError, match="hold the 4 bits alone"):
        fold(str(packed), over_packed, tmp_path / "out", onto="original")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_onto_the_dequantised_numbers_it_is_what_it_was_trained_over(name, tmp_path):
    base = saved(tmp_path / "base", name)
    folded = fold(str(base), trained(base, name=name, form=NF4), tmp_path / "out", onto="dequantised")
    assert folded.proof.difference <= 1e-5 * folded.proof.peak
    assert json.loads((tmp_path / "out" / RECORD).read_text())["onto"] == "dequantised"
    plain, four = (open_base(str(f), processor=False, four_bits=form) for f, form in ((base, None), (base, NF4)))
    given = open_base(str(tmp_path / "out"), processor=False).model.state_dict()
    quantised = [k for k, v in four.model.state_dict().items() if isinstance(v, Weight4) and "v_proj" not in k]
    patched = ("q_proj", "projector", "merger", "connector", "qformer", "language_projection")
    untouched = next(k for k in quantised if not any(part in k for part in patched))
    assert not torch.equal(given[untouched], plain.model.state_dict()[untouched])
    assert torch.equal(given[untouched], four.model.state_dict()[untouched].dense(torch.float32))


@pytest.mark.slow
def test_onto_the_original_it_is_the_adapter_there(base, adapter, tmp_path):
    folded = fold(str(base), adapter, tmp_path / "out", onto="original")
    assert folded.proof.difference <= 1e-5 * folded.proof.peak
    given = open_base(str(tmp_path / "out"), processor=False).model.state_dict()
    plain = open_base(str(base), processor=False).model.state_dict()
    up = next(k for k in plain if "language" in k and "up_proj" in k)
    assert torch.equal(given[up], plain[up])


@pytest.mark.slow
def test_loftq_means_nothing_over_the_original(base, tmp_path):
    part = Part("loftq", "language.*.{q,v}", METHODS["loftq"].config(rank=4))
    made = trained(base, (part,), form=NF4)
    with pytest.raises(MergeError, match="loftq"):
        fold(str(base), made, tmp_path / "out", onto="original")
    assert fold(str(base), made, tmp_path / "out", onto="dequantised").proof.agreement == 1


@pytest.mark.slow
def test_files_in_four_bits_become_files_in_sixteen(packed, over_packed, tmp_path):
    folded = fold(str(packed), over_packed, tmp_path / "out", onto="dequantised")
    assert folded.proof.difference <= 1e-5 * folded.proof.peak
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_small_change_does_not_survive_rounding_again(base, packed, tmp_path):
    """The change is far below the steps of the levels: rounded again, nearly nothing of it is left."""
    small = trained(packed, (LORA,), size=0.02)
    with pytest.raises(MergeError, match="would be left") as refusal:
        fold(str(packed), small, tmp_path / "out", onto="dequantised", requantise=NF4)
    assert "|d|/|W|" in str(refusal.value.given) and "q_proj" in str(refusal.value.given)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", [NF4, pytest.param(FourBits("int4", nested=False), marks=pytest.mark.slow)])
def test_a_large_change_survives(form, packed, tmp_path):
    large = trained(packed, (LARGE,), size=SIZE)
    folded = fold(str(packed), large, tmp_path / "out", onto="dequantised", requantise=form)
    share = folded.record["remains"]["share"]
    assert 0.9 <= share <= 1.1
    host = open_base(str(tmp_path / "out"), processor=False)
    assert host.quantisation.form.kind == form.kind
    if form is NF4:  # what nobody changed has the bytes that it had
        mine, theirs = (open_base(str(f), processor=False).model.state_dict() for f in (tmp_path / "out", packed))
        up = next(k for k in theirs if "language" in k and "up_proj" in k)
        assert torch.equal(mine[up].codes, theirs[up].codes)


@pytest.mark.slow
def test_requantised_the_untouched_have_the_live_bytes(base, tmp_path):
    made = trained(base, (LARGE,), form=NF4, size=SIZE)
    folded = fold(str(base), made, tmp_path / "out", onto="dequantised", requantise=NF4)
    assert folded.proof.difference <= folded.proof.allowed
    mine = open_base(str(tmp_path / "out"), processor=False).model.state_dict()
    live = open_base(str(base), processor=False, four_bits=NF4).model.state_dict()
    up = next(k for k in live if "language" in k and "up_proj" in k)
    assert torch.equal(mine[up].codes, live[up].codes)


@pytest.mark.slow
def test_bitsandbytes_reads_the_result(base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the oracle")
    pytest.importorskip("accelerate", reason="Transformers wants it beside bitsandbytes")
    from transformers import AutoModelForImageTextToText

    wide = {
        "text_config": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
        "vision_config": {"hidden_size": 64, "intermediate_size": 128},
    }
    base = saved(tmp_path / "base", **wide)
    made = trained(base, (LARGE,), form=NF4, size=SIZE)
    fold(str(base), made, tmp_path / "out", onto="dequantised", requantise=NF4)
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    inputs = FAMILIES["llava"].batch((1, 1))
    with torch.no_grad():
        theirs = model(**inputs).logits
        mine = open_base(str(tmp_path / "out"), processor=False).model(**inputs).logits
    assert (theirs - mine).abs().max() <= 1e-4 * mine.abs().max()


@pytest.mark.slow
def test_an_adapter_over_the_files_own_numbers_is_rounded_too(base, tmp_path):
    """Over numbers that lie on no grid, the mean of the change is there: what it costs is the noise."""
    folded = fold(str(base), trained(base, (LARGE,), size=SIZE), tmp_path / "out", requantise=NF4)
    assert 0.9 <= folded.record["remains"]["share"] <= 1.1
    assert folded.proof.noise_mean > 0 and folded.proof.difference_mean <= folded.proof.allowed_mean


@pytest.mark.parametrize("onto", ["original", pytest.param(None, marks=pytest.mark.slow)])
def test_a_small_change_over_numbers_on_no_grid_is_refused(onto, base, tmp_path):
    """There a few numbers move a whole step: the mean of the change is kept, and drowned in what moves beside it."""
    small = trained(base, (LORA,), form=None if onto is None else NF4, size=0.02)
    with pytest.raises(MergeError, match="times what the adapter changes") as refusal:
        fold(str(base), small, tmp_path / "out", onto=onto, requantise=NF4)
    assert "of what differs would be the adapter's" in str(refusal.value.given)
    assert not any(tmp_path.iterdir())


def foreign(adapter, how, base):
    """An adapter as PEFT leaves it, which names no base, or as an import does, whose base is its importer's word."""
    if how == "peft":
        return replace(adapter, fingerprint=None)
    plain = open_base(str(base), processor=False).fingerprint
    return replace(adapter, fingerprint=plain, card={"origin": {"made_by": "PEFT"}})


@pytest.mark.parametrize("how", ["peft", pytest.param("imported", marks=pytest.mark.slow)])
def test_what_an_adapter_does_not_say_its_user_may(how, base, adapter, tmp_path):
    silent = foreign(adapter, how, base)
    with pytest.raises(ConfigError, match="is not known") as refusal:
        fold(str(base), silent, tmp_path / "out", onto="dequantised")
    assert "--over nf4" in str(refusal.value.do)
    with pytest.raises(ConfigError, match="into which numbers"):
        fold(str(base), silent, tmp_path / "out", over=NF4)
    folded = fold(str(base), silent, tmp_path / "out", onto="dequantised", over=NF4)
    assert folded.record["over"] == "nf4" and folded.proof.difference <= 1e-5 * folded.proof.peak
    mine = open_base(str(tmp_path / "out"), processor=False).model.state_dict()
    four = open_base(str(base), processor=False, four_bits=NF4).model.state_dict()
    up = next(k for k in four if "language" in k and "up_proj" in k)
    assert torch.equal(mine[up], four[up].dense(torch.float32))


@pytest.mark.slow
def test_what_an_adapter_does_not_say_is_told(base, adapter, tmp_path):
    told = []
    folded = fold(str(base), foreign(adapter, "peft", base), tmp_path / "out", show=told.append)
    assert any("not known" in line for line in told)
    assert folded.record["over"] == "unknown" and json.loads((tmp_path / "out" / RECORD).read_text())["over"]


def test_what_an_adapter_says_is_not_to_be_told_otherwise(base, adapter, packed, over_packed, tmp_path):
    int4 = FourBits("int4")
    for folder, one in ((base, adapter), (packed, over_packed), (base, trained(base))):
        with pytest.raises(ConfigError, match="is known, and is not that"):
            fold(str(folder), one, tmp_path / "out", onto="dequantised", over=int4)
