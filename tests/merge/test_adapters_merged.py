"""Adapters made one: exact against what the parents do, kept like any adapter, refused where it has no meaning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from types import MappingProxyType

import pytest
import torch
from families import FAMILIES
from merge.values import BOTTLENECKS, EVERY, FOLDING, THIN, adapter, gap, host, inputs, trained
from torch import nn

from tarsia.adapter import Adapter, Host, load, probe, put, resolution_of, save
from tarsia.adapter.value import Patched, restored
from tarsia.core.attach import detach
from tarsia.core.attach import merge as fold_in_memory
from tarsia.core.errors import BaseMismatch, ConfigError, MergeError
from tarsia.core.site import Component, Kind
from tarsia.merge import WAYS, deltas, digest, merge
from tarsia.merge.adapters import swelling
from tarsia.merge.live import _encoded as listened_to
from tarsia.quant.codec import Scheme
from tarsia.quant.tensor import Weight4

CLOSE = 1e-5


def logits(base: Host, *adapters: Adapter) -> torch.Tensor:
    """What the model gives with these adapters put in, one over the other."""
    for i, one in enumerate(adapters):
        put(base, one, f"one{i}")
    try:
        with torch.no_grad():
            return base.model(**inputs()).logits
    finally:
        for i in range(len(adapters)):
            detach(base.model, f"one{i}")


@cache
def folded_alone(one: Adapter) -> dict[str, torch.Tensor]:
    """Every parameter of the base, in float64, once this adapter alone is folded into it in memory."""
    wide = Host.of(deepcopy(host().model).double())
    put(wide, replace(one, fingerprint=None), "one")
    fold_in_memory(wide.model)
    return {name: tensor.detach() for name, tensor in wide.model.named_parameters() if ".slot." not in name}


def by_hand(adapters, weights) -> nn.Module:
    """The base with W + sum_i w_i (W_i - W), where W_i is what adapter i alone folds into."""
    model = deepcopy(host().model).double()
    own = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    total = {name: tensor.clone() for name, tensor in own.items()}
    for one, weight in zip(adapters, weights, strict=True):
        for name, tensor in folded_alone(one).items():
            total[name] += weight * (tensor - own[name])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(total[name])
    return model


class TestOneAlone:
    @pytest.mark.parametrize("what", EVERY)
    def test_it_is_the_adapter_itself_by_every_way(self, what):
        one = adapter(what)
        for way in WAYS:
            made = merge([one], [1.0], way, host())
            assert made.adapter is one
            assert set(made.errors.values()) == {0.0}

    def test_so_it_is_with_others_at_nothing(self):
        one = adapter("dora")
        assert merge([adapter("lora"), one], [0.0, 1.0], "ties", host()).adapter is one

    @pytest.mark.parametrize("what", EVERY)
    def test_at_another_weight_it_is_not(self, what):
        one = adapter(what)
        if what not in (*FOLDING, *BOTTLENECKS):
            with pytest.raises(MergeError, match="can not be merged"):
                merge([one], [0.5], "cat", host())
            return
        made = merge([one], [0.5], "cat", host()).adapter
        assert made is not one and gap(logits(host(), made), logits(host(), one)) > 1e-3


class TestSums:
    @pytest.mark.parametrize("pair", list(itertools.pairwise([*FOLDING, FOLDING[0]])), ids="-".join)
    def test_a_merged_adapter_does_what_the_summed_changes_do(self, pair):
        self.check(pair)

    @pytest.mark.slow
    @pytest.mark.parametrize("pair", list(itertools.combinations(FOLDING, 2)), ids="-".join)
    def test_so_do_all_others(self, pair):
        self.check(pair)

    def check(self, pair: Sequence[str]) -> None:
        parents, weights = [adapter(what, seed) for seed, what in enumerate(pair)], [0.7, -0.4]
        found = merge(parents, weights, "task_arithmetic", host())
        with torch.no_grad():
            wanted = by_hand(parents, weights)(**_wide(inputs())).logits
            bare = host().model(**inputs()).logits
        assert gap(wanted.float(), bare) > 0.01, "these adapters change nothing, so nothing was tried"
        assert gap(logits(host(), found.adapter).double(), wanted) < CLOSE
        assert set(found.errors.values()) == {0.0}

    def test_one_of_every_kind_at_once(self):
        parents = [adapter(what, seed) for seed, what in enumerate(FOLDING)]
        weights = [0.5, -0.25, 0.4, 0.3, 0.2, 0.5, 0.1, -0.6, 0.4, 0.2, 0.7, 0.3][: len(parents)]
        found = merge(parents, weights, "cat", host()).adapter
        with torch.no_grad():
            wanted = by_hand(parents, weights)(**_wide(inputs())).logits
        assert gap(logits(host(), found).double(), wanted) < CLOSE

    def test_components_and_scale_multiply_what_is_added(self):
        parents = [trained(host(), [("lora", "vision.*.{q}; language.*.{q}", {"rank": 2})], seed) for seed in (1, 2)]
        plain = deltas(merge(parents, [1, 1], "cat", host()).adapter, host())
        found = merge(parents, [1, 1], "cat", host(), scale=0.5, components={"vision": -0.5, "projector": 3.0})
        sites = {site.path: site for site in host().sites}
        for path, delta in deltas(found.adapter, host()).items():
            factor = 0.5 * (-0.5 if sites[path].component is Component.VISION else 1)
            assert gap(delta.weight(), factor * plain[path].weight()) < 1e-6
        assert found.card["merged"]["components"] == {"vision": -0.5, "projector": 3.0}
        none = merge(parents, [1, 1], "cat", host(), components={"vision": 0.0}).adapter
        assert {sites[path].component for path in none.patches} == {Component.LANGUAGE}

    def test_an_adapter_less_itself_leaves_nothing(self):
        one, other = adapter("lora"), adapter("rslora", 3)
        with pytest.raises(MergeError, match="cancel"):
            merge([one, one], [1.0, -1.0], "iso_c", host())
        found = merge([one, other, one], [1.0, 1.0, -1.0], "task_arithmetic", host()).adapter
        assert gap(logits(host(), found), logits(host(), other)) < CLOSE

    def test_unlearning_takes_the_change_back(self):
        one = adapter("lora")
        away = merge([one], [-1.0], "task_arithmetic", host()).adapter
        assert gap(logits(host(), one, away), logits(host())) < CLOSE < gap(logits(host(), one), logits(host()))

    @pytest.mark.parametrize("what", [*THIN, "ia3", "bitfit"])
    def test_what_can_stay_small_does(self, what):
        parents = [adapter(what, 1), adapter(what, 2)]
        found = merge(parents, [1.0, 0.5], "linear", host()).adapter
        assert {one.method for one in found.patches.values()} == {what if what in ("ia3", "bitfit") else "lora"}

    def test_factors_wider_than_the_matrix_are_made_narrow_without_loss(self):
        parents = [adapter("vera", seed) for seed in range(8)]
        found = merge(parents, [1.0] * 8, "cat", host())
        sites = {site.path: site for site in host().sites}
        for path, one in found.adapter.patches.items():
            assert one.tensors["A"].shape[0] <= min(sites[path].shape)
        assert 0 <= max(found.errors.values()) < 1e-9
        with torch.no_grad():
            wanted = by_hand(parents, [1.0] * 8)(**_wide(inputs())).logits
        assert gap(logits(host(), found.adapter).double(), wanted) < CLOSE

    def test_the_patch_of_one_alone_at_a_site_stays_what_it_is(self):
        found = merge([adapter("dora"), adapter("bitfit")], [1.0, 1.0], "cat", host()).adapter
        for path, one in adapter("dora").patches.items():
            assert found.patches[path] is one


class TestBottlenecks:
    @pytest.mark.parametrize("what", BOTTLENECKS)
    def test_joined_they_add_the_weighted_sum(self, what):
        parents, weights = [adapter(what, seed) for seed in (1, 2, 3)], [0.5, -1.0, 2.0]
        found = merge(parents, weights, "task_arithmetic", host()).adapter
        sites = {site.path: site for site in host().sites}
        for path, one in found.patches.items():
            x, y = (torch.randn(2, 3, sites[path].shape[0], generator=torch.Generator().manual_seed(i)) for i in (1, 2))
            alone = [restored(host(), sites[path], parent.patches[path]) for parent in parents]
            with torch.no_grad():
                wanted = y + sum(w * (patch.change(x, y) - y) for w, patch in zip(weights, alone, strict=True))
                given = restored(host(), sites[path], one).change(x, y)
            assert gap(wanted, y) > 0.01 and gap(given, wanted) < 2e-6, path
        logits(host(), found)

    def test_scales_of_their_own_are_honoured(self):
        specs = [[("scaled_parallel", "language", {"reduction": r, "scale": s})] for r, s in ((4, 3.0), (8, 0.5))]
        parents = [trained(host(), spec, seed) for seed, spec in enumerate(specs)]
        found = merge(parents, [1.0, 1.0], "cat", host()).adapter
        path, site = next((p, s) for p, s in ((s.path, s) for s in host().sites) if p in found.patches)
        x = torch.randn(4, site.shape[0], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            changes = [restored(host(), site, p.patches[path]).change(x, torch.zeros_like(x)) for p in parents]
            assert gap(restored(host(), site, found.patches[path]).change(x, torch.zeros_like(x)), sum(changes)) < 2e-6

    @pytest.mark.parametrize("pair", [("houlsby", "normed")])
    def test_unlike_ones_are_refused_with_the_site(self, pair):
        with pytest.raises(MergeError, match="different kinds") as refusal:
            merge([adapter(what) for what in pair], [1, 1], "cat", host())
        assert "layers" in str(refusal.value)

    def test_nothing_but_a_sum_is_taken(self):
        for way in ("ties", "iso_c", "core_ties", "dare"):
            with pytest.raises(MergeError, match=r"houlsby at .* can not be merged"):
                merge([adapter("houlsby"), adapter("houlsby", 1)], [1, 1], way, host())

    def test_two_prompts_are_refused_and_one_is_kept(self):
        with pytest.raises(MergeError, match=r"prompt at .* can not be merged"):
            merge([adapter("prompt"), adapter("prompt", 1)], [1, 1], "cat", host())
        found = merge([adapter("prompt"), adapter("lora")], [1, 0.5], "cat", host()).adapter
        assert gap(logits(host(), found), logits(host(), adapter("lora"))) > 1e-3
        with pytest.raises(MergeError, match="can not be merged"):
            merge([adapter("prompt"), adapter("lora")], [0.5, 1], "cat", host())


class TestRank:
    @pytest.mark.parametrize("way", ["cat", "ties", "iso_c"])
    def test_the_error_told_is_the_error_made(self, way):
        parents = [adapter("lora", 1), adapter("dora", 2), adapter("unequal", 3)]
        whole = deltas(merge(parents, [1, 1, 1], way, host()).adapter, host())
        found = merge(parents, [1, 1, 1], way, host(), rank=2)
        for path, delta in deltas(found.adapter, host()).items():
            if whole[path].still or found.adapter.patches[path].method != "lora":
                continue
            assert delta.rank <= 2
            wanted = float((delta.weight() - whole[path].weight()).norm() / whole[path].weight().norm())
            assert found.errors[path] == pytest.approx(wanted, abs=2e-5)
        assert max(found.errors.values()) > 0.01
        assert found.card["merged"]["largest_error"] == max(found.errors.values())

    def test_svd_has_the_parents_largest_rank(self):
        found = merge([adapter("lora", 1), adapter("unequal", 2)], [1, 1], "svd", host())
        ranks = {path: one.tensors["A"].shape[0] for path, one in found.adapter.patches.items()}
        both = {path for path in adapter("lora").patches if path in adapter("unequal").patches}
        assert both and {ranks[path] for path in both} <= {3, 5} and max(found.errors.values()) > 0

    def test_one_alone_can_be_made_thinner_too(self):
        found = merge([adapter("dora")], [1.0], "cat", host(), rank=2)
        assert {one.method for one in found.adapter.patches.values()} == {"lora"} and max(found.errors.values()) > 0


class TestKept:
    @pytest.mark.parametrize("way", ["cat", "svd", "ties", "knots_ties", "iso_cts", "regmean"])
    def test_it_is_saved_and_loaded_like_any_adapter(self, way, tmp_path):
        parents = [probed("lora", 1), probed("rslora", 2)]
        made = merge(parents, [1.0, 0.5], way, host(), scale=0.8)
        save(made.adapter, tmp_path / "merged")
        back = load(tmp_path / "merged")
        assert torch.equal(logits(host(), back), logits(host(), made.adapter))
        told = back.card["merged"]
        assert told["way"] == way and told["scale"] == 0.8
        assert [parent["weight"] for parent in told["parents"]] == [1.0, 0.5]
        assert [parent["digest"] for parent in told["parents"]] == [digest(parent) for parent in parents]
        assert back.fingerprint == host().fingerprint and back.parts == made.adapter.parts

    def test_a_mixed_one_too(self, tmp_path):
        parents = [adapter("dora", 1), adapter("both", 2), adapter("bitfit"), adapter("pfeiffer"), adapter("ia3")]
        made = merge(parents, [1.0, 0.5, 0.3, 0.2, 0.6], "cat", host()).adapter
        save(made, tmp_path / "merged")
        assert torch.equal(logits(host(), load(tmp_path / "merged")), logits(host(), made))
        assert {part.method for part in made.parts} == {one.method for one in made.patches.values()}

    def test_a_merged_adapter_is_merged_again(self):
        one, two, three = (adapter("lora", seed) for seed in (1, 2, 3))
        pair = merge([one, two], [1.0, 0.5], "cat", host()).adapter
        twice = merge([pair, three], [1.0, 2.0], "cat", host()).adapter
        at_once = merge([one, two, three], [1.0, 0.5, 2.0], "cat", host()).adapter
        assert gap(logits(host(), twice), logits(host(), at_once)) < CLOSE

    def test_the_digest_knows_every_number(self):
        one = adapter("lora")
        path = next(iter(one.patches))
        held = one.patches[path]
        for name in held.tensors:
            other = {key: value.clone() for key, value in held.tensors.items()}
            other[name].view(-1)[0] += 1e-3
            changed = replace(one, patches={**one.patches, path: replace(held, tensors=other)})
            assert digest(changed) != digest(one)
        scaled = replace(held, constants={**held.constants, "scale": 9.0})
        assert digest(replace(one, patches={**one.patches, path: scaled})) != digest(one)
        assert digest(replace(one, card={})) == digest(one)


class TestRefusals:
    @pytest.mark.parametrize(
        "weights, options, said",
        [
            ([1.0], {}, "one weight for each"),
            ([1.0, math.nan], {}, "finite"),
            ([1.0, True], {}, "finite"),
            ([0.0, 0.0], {}, "Nothing would be left"),
            ([1.0, 1.0], {"scale": 0.0}, "Nothing would be left"),
            ([1.0, 1.0], {"scale": math.inf}, "finite"),
            ([1.0, 1.0], {"rank": 0}, "whole number"),
            ([1.0, 1.0], {"rank": 2.0}, "whole number"),
            ([1.0, 1.0], {"components": {"eyes": 0.5}}, "no such component"),
            ([1.0, 1.0], {"components": {"vision": "half"}}, "finite"),
            ([1.0, 1.0], {"density": 0.5}, "no option"),
        ],
    )
    def test_what_makes_no_sense(self, weights, options, said):
        with pytest.raises(MergeError, match=said):
            merge([adapter("lora"), adapter("rslora")], weights, "cat", host(), **options)

    def test_nothing_at_all(self):
        with pytest.raises(MergeError, match="takes adapters"):
            merge([], [], "cat", host())

    def test_adapters_of_two_bases(self):
        other = Host.of(FAMILIES["llava"].build(seed=5)[0])
        stranger = trained(other, EVERY["lora"])
        with pytest.raises(BaseMismatch):
            merge([adapter("lora"), stranger], [1, 1], "cat", host())
        with pytest.raises(BaseMismatch):
            merge([stranger, stranger], [1, 1], "cat", host())

    def test_a_change_of_every_number_over_four_bits(self):
        packed = four_bits()
        two = [trained(packed, [("dora", "language.*.{q}", {"rank": 2})], seed) for seed in (1, 2)]
        with pytest.raises(MergeError, match="4 bits"):
            merge(two, [1, 1], "cat", packed)
        thin = merge(two, [1, 1], "cat", packed, rank=4)
        assert {one.method for one in thin.adapter.patches.values()} == {"lora"} and max(thin.errors.values()) > 0
        thinner = [trained(packed, EVERY["lora"][:1], seed) for seed in (1, 2)]
        assert merge(thinner, [1, 1], "cat", packed).adapter.patches

    def test_what_four_bits_took_is_put_back_once(self):
        packed = four_bits()
        two = [trained(packed, [("loftq", "language.*.{q}", {"rank": 2})], seed) for seed in (1, 2)]
        assert merge([two[0]], [1.0], "ties", packed).adapter is two[0]
        with pytest.raises(MergeError, match="count once"):
            merge(two, [1, 1], "cat", packed)
        with pytest.raises(MergeError, match="count once"):
            merge(two, [1, 1], "iso_c", packed)
        assert merge(two, [1, 1], "linear", packed).adapter.patches
        assert merge(two, [0.25, 0.75], "cat", packed).adapter.patches


class TestInputs:
    def test_it_is_the_minimum_over_what_the_layers_are_given(self):
        parents = [probed("lora", 1), probed("unequal", 2)]
        found = deltas(merge(parents, [1, 1], "regmean", host(), ridge=0.0).adapter, host())
        held = [deltas(parent, host()) for parent in parents]
        path = next(path for path in held[0] if path in held[1])
        seen = [one[path].inputs().double() for one in held]
        taus = [one[path].weight() for one in held]

        def missed(tau):
            return sum(float(((tau - t) @ x.T).square().sum()) / len(x) for t, x in zip(taus, seen, strict=True))

        best = missed(found[path].weight())
        assert best < 0.9 * missed(sum(taus)) and best < missed(sum(taus) / 2)
        for seed in range(4):
            noise = torch.randn(taus[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert missed(found[path].weight() + 1e-2 * noise) > best

    def test_a_layer_that_one_alone_changes_is_still_given_the_others_inputs(self):
        one, other = probed("lora", 1), probed("unequal", 2)
        alone = next(path for path in one.patches if path not in other.patches)
        made = deltas(merge([one, other], [1, 1], "regmean", host()).adapter, host())[alone].weight()
        assert gap(made, deltas(one, host())[alone].weight()) > 1e-2

    def test_the_host_is_left_as_it_was(self):
        before = {name: tensor.clone() for name, tensor in host().model.state_dict().items()}
        merge([probed("lora", 1), probed("rslora", 2)], [1, 1], "regmean", host())
        after = host().model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert not any(module._forward_pre_hooks for module in host().model.modules())

    def test_without_a_probe_it_is_refused(self):
        with pytest.raises(MergeError, match="no probe"):
            merge([adapter("lora"), probed("rslora", 2)], [1, 1], "regmean", host())

    def test_padding_is_left_out(self):
        one = probed("lora", 1)
        mask = one.probe.inputs["attention_mask"]
        assert not bool(mask.all()), "the probe has no padding, so nothing was tried"
        path = next(
            site.path for site in host().sites if site.component is Component.LANGUAGE and site.kind is Kind.WEIGHT
        )
        assert len(deltas(one, host())[_first_language(one)].inputs()) == int(mask.sum()), path


def _first_language(one):
    sites = {site.path: site for site in host().sites}
    return next(path for path in one.patches if sites[path].component is Component.LANGUAGE)


def probed(what: str, seed: int) -> Adapter:
    """The adapter with a probe."""
    one = adapter(what, seed)
    put(host(), one, "probed")
    try:
        return replace(one, probe=probe(host(), FAMILIES["llava"].batch((1, 2))))
    finally:
        detach(host().model, "probed")


def four_bits() -> Host:
    """The tiny model with the decoder's queries and values in 4 bits."""
    model = FAMILIES["llava"].build()[0]
    own = {}
    for site in host().sites:
        if site.component is Component.LANGUAGE and site.path.endswith(("q_proj", "v_proj")):
            module = model.get_submodule(site.module)
            own[site.path] = module.weight.detach()
            module.weight = nn.Parameter(Weight4.of(own[site.path], Scheme()), requires_grad=False)
    return Host.of(model)


def _wide(batch):
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def test_values_are_not_shared_with_the_parents_they_came_of():
    one = adapter("lora")
    made = merge([one, adapter("rslora")], [1.0, 1.0], "cat", host()).adapter
    assert isinstance(made.patches, MappingProxyType)
    for path, held in made.patches.items():
        assert isinstance(held, Patched)
        for name, tensor in held.tensors.items():
            if path in one.patches and held is not one.patches[path]:
                assert tensor.data_ptr() != one.patches[path].tensors[name].data_ptr()


def _seen_at(one: Adapter, *resolution: int | None) -> Adapter:
    return replace(one, card={"recipe": {"resolution": resolution[0]}} if resolution else {})


class TestResolution:
    @pytest.mark.parametrize("sizes", [[(336,), (336,)], [(336,), ()], [(None,), (None,)], [(), ()]])
    def test_what_all_parents_were_trained_at_is_carried(self, sizes, tmp_path):
        parents = [_seen_at(adapter("lora", seed), *size) for seed, size in enumerate(sizes)]
        made = merge(parents, [1.0, 1.0], "cat", host()).adapter
        assert resolution_of(made) == sizes[0]
        save(made, tmp_path / "made")
        assert resolution_of(tmp_path / "made") == sizes[0]

    @pytest.mark.parametrize("other", [448, None])
    def test_parents_that_differ_are_refused_and_a_choice_settles_it(self, other):
        parents = [_seen_at(adapter("lora"), 336), _seen_at(adapter("lora", 1), other)]
        with pytest.raises(ConfigError, match="different sizes"):
            merge(parents, [1.0, 1.0], "cat", host())
        for chosen in (224, None):
            assert resolution_of(merge(parents, [1.0, 1.0], "cat", host(), resolution=chosen).adapter) == (chosen,)
        with pytest.raises(MergeError, match="above 0"):
            merge(parents, [1.0, 1.0], "cat", host(), resolution=0)

    def test_a_fold_shows_no_rows_at_the_resolution_of_one_of_two(self):
        adapters = [_seen_at(adapter("lora"), 336), _seen_at(adapter("lora", 1), 224)]
        with pytest.raises(ConfigError, match="different sizes"):
            listened_to(host(), adapters, [object()])


def test_ranks_of_most_sites_are_said_once():
    """For every name in a table of ranks is tried at every site."""
    made = merge([adapter("lora"), adapter("unequal")], [1.0, 1.0], "cat", host()).adapter
    (part,) = (part for part in made.parts if part.method == "lora")
    sites = {site.path: site for site in host().sites}
    held = {path: one for path, one in made.patches.items() if one.method == "lora"}
    assert len(part.config.ranks) < len(held) and not set(part.config.ranks.values()) & {part.config.rank}
    for path, one in held.items():
        rank = len(one.tensors["A"])
        assert part.config.scale(sites[path]) == (rank, pytest.approx(one.constants["scale"]))


@pytest.mark.parametrize("pair", [("lora", "rslora"), ("lora", "dora")], ids="-".join)
@pytest.mark.parametrize("way", sorted(set(WAYS) - {"regmean"}))
def test_what_swells_is_known_before(way, pair):
    """Here no parent has a site alone at a coefficient of 1, so the most is what comes."""
    parents = [adapter(what, seed) for seed, what in enumerate(pair)]
    told = swelling(parents, WAYS[way], host())
    made = merge(parents, [0.5, 0.7], way, host()).adapter
    whole = [one.tensors["weight"] for one in made.patches.values() if one.method == "full"]
    wanted = (0, 0) if told is None else (told.sites, told.size)
    assert (len(whole), sum(tensor.nbytes for tensor in whole)) == wanted
