"""Merges on models of other families, and from a base's files alone."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from merge.values import gap, trained

from tarsia.adapter import Host, open_base, open_outline, put
from tarsia.adapter.four_bits import FourBits
from tarsia.core.attach import detach
from tarsia.core.attach import merge as fold_in_memory
from tarsia.core.errors import BaseMismatch, MergeError
from tarsia.merge import deltas, merge

FEW = ["qwen2_5_vl", "gemma3", "qwen3_vl_moe"]
"""A fused query, key and value; a bare tensor for a projector; experts."""
CLOSE = 1e-5


def check(family):
    base = Host.of(FAMILIES[family].build()[0])
    batch = FAMILIES[family].batch((1, 2) if (FAMILIES[family].max_pictures or 2) > 1 else (1, 1))
    specs = [
        [("lora", "vision; language", {"rank": 3}), ("full", "projector", {})],
        [("dora", "language.*.{q}", {"rank": 2}), ("full", "projector; language.1.{down}", {})],
        [("rslora", "vision", {"rank": 2}), ("vera", "language.*.{o}", {"rank": 4})],
    ]
    parents, weights = [trained(base, spec, i, 0.05) for i, spec in enumerate(specs)], [1.0, -0.5, 0.7]
    model = deepcopy(base.model)
    own = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    total = {name: tensor.clone() for name, tensor in own.items()}
    for one, weight in zip(parents, weights, strict=True):
        alone = Host.of(deepcopy(base.model).double())
        put(alone, replace(one, fingerprint=None), "one")
        fold_in_memory(alone.model)
        for name, tensor in alone.model.named_parameters():
            if name in total:
                total[name] += weight * (tensor.detach() - own[name])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(total[name])
        wanted, bare = model(**batch).logits, base.model(**batch).logits
    made = merge(parents, weights, "task_arithmetic", base).adapter
    put(base, made, "merged")
    with torch.no_grad():
        given = base.model(**batch).logits
    detach(base.model, "merged")
    assert gap(wanted, bare) > 0.05
    assert gap(given, wanted) < CLOSE
    for way in ("ties", "iso_c", "core_ties", "wudi"):
        put(base, merge(parents, [1.0, 0.5, 0.7], way, base).adapter, way)
        detach(base.model, way)


@pytest.mark.parametrize("family", FEW)
def test_a_merge_does_what_the_summed_changes_do(family):
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FEW])
def test_so_it_does_on_every_family(family):
    check(family)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("base") / "llava"
    FAMILIES["llava"].build()[0].save_pretrained(place)
    return place


class TestFiles:
    """An outline reads no weight where none is needed, and the right ones where some are."""

    SPECS = (
        [("lora", "language.*.{q,v}", {"rank": 3}), ("full", "projector", {})],
        [("dora", "language.*.{q,v}", {"rank": 2}), ("bitfit", "projector", {})],
    )

    def parents(self, base):
        return [trained(base, spec, seed) for seed, spec in enumerate(self.SPECS)]

    @pytest.mark.parametrize("way", ["cat", "ties", "iso_c"])
    def test_it_is_the_same_from_the_files(self, folder, way):
        base, outline = open_base(str(folder), processor=False), open_outline(str(folder), processor=False)
        parents = self.parents(base)
        live, read = merge(parents, [1, 0.5], way, base).adapter, merge(parents, [1, 0.5], way, outline).adapter
        assert live.patches.keys() == read.patches.keys() and live.layout == read.layout
        for path, one in live.patches.items():
            assert one.method == read.patches[path].method
            assert all(torch.equal(tensor, read.patches[path].tensors[name]) for name, tensor in one.tensors.items())

    def test_thin_adapters_need_no_weights_there(self, folder, tmp_path):
        base = open_base(str(folder), processor=False)
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        outline = open_outline(str(tmp_path), processor=False)
        thin = [trained(base, [("rslora", "language.*.{q,v}", {"rank": 3})], seed) for seed in (1, 2)]
        assert merge(thin, [1, 1], "core_ties", outline).adapter.patches

    def test_files_of_another_base_are_refused(self, folder, tmp_path):
        FAMILIES["llava"].build(seed=3)[0].save_pretrained(tmp_path / "other")
        parents = self.parents(open_base(str(folder), processor=False))
        with pytest.raises(BaseMismatch):
            merge(parents, [1, 1], "cat", open_outline(str(tmp_path / "other"), processor=False))

    def test_what_was_learnt_over_four_bits_is_not_read_from_sixteen(self, folder):
        base = open_base(str(folder), processor=False, four_bits=FourBits())
        outline = open_outline(str(folder), processor=False)
        measured = [trained(base, [("dora", "language.*.{q}", {"rank": 2})], seed) for seed in (1, 2)]
        with pytest.raises(MergeError, match="quantised for them"):
            merge(measured, [1, 1], "cat", outline)
        thin = [trained(base, [("lora", "language.*.{q}", {"rank": 2})], seed) for seed in (1, 2)]
        found = merge(thin, [1, 1], "cat", outline).adapter
        assert found.fingerprint == base.fingerprint
        assert deltas(found, base).keys() == thin[0].patches.keys()

    def test_an_outline_runs_nothing(self, folder):
        base = open_base(str(folder), processor=False)
        with pytest.raises(MergeError, match="an outline runs nothing"):
            merge(self.parents(base), [1, 1], "regmean", open_outline(str(folder), processor=False))
