"""Merges beside PEFT's: the same numbers where PEFT is right, and right where PEFT is not."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from merge.values import FAMILY, adapter, gap, host, inputs
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import Tensor

from tarsia.adapter import Adapter, load, put, save
from tarsia.core.attach import detach
from tarsia.merge import deltas, merge
from tarsia.merge.combine import ties, total
from tarsia.merge.sparsify import magnitude

WHOLE = settings(max_examples=15, deadline=None, derandomize=True)
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 11))


def stack(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestFunctions:
    """PEFT's own arithmetic on tensors, to the last bit."""

    @WHOLE
    @given(shape=SHAPES, seed=st.integers(0, 99), density=st.sampled_from([0.1, 0.25, 0.5, 0.9]))
    def test_trimming(self, shape, seed, density):
        parts = stack(seed, *shape)
        for given_, part in zip(magnitude(parts, density), parts, strict=True):
            assert torch.equal(given_, merge_utils.prune(part, density, "magnitude"))

    @pytest.mark.parametrize("elect", ["total", "frequency"])
    @WHOLE
    @given(shape=SHAPES, seed=st.integers(0, 99), density=st.sampled_from([0.2, 0.5, 0.9]))
    def test_ties(self, elect, shape, seed, density):
        parts = stack(seed, *shape)
        weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) + 0.1
        wanted = merge_utils.ties(list(parts), weights, density, majority_sign_method=elect)
        assert torch.equal(ties(magnitude(parts, density), weights, elect=elect), wanted)

    @WHOLE
    @given(shape=SHAPES, seed=st.integers(0, 99))
    def test_sums(self, shape, seed):
        parts, weights = stack(seed, *shape), stack(seed + 1, shape[0])
        assert torch.equal(total(parts, weights), merge_utils.task_arithmetic(list(parts), weights))
        wanted = merge_utils.magnitude_prune(list(parts), weights, 0.5)
        assert torch.equal(total(magnitude(parts, 0.5), weights), wanted)

    def test_dare_with_one_mask(self, monkeypatch):
        """PEFT draws from the global generator: given our masks, it gives our numbers."""
        from tarsia.merge.sparsify import dare

        parts, weights = stack(0, 3, 7, 8), torch.tensor([1.0, 0.5, 2.0])
        left = dare(parts, 0.4, [1, 2, 3])
        masks = iter((left != 0).to(parts.dtype))
        monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))
        wanted = merge_utils.dare_ties(list(parts), weights, 0.4)
        assert gap(ties(left, weights), wanted) < 1e-6

    def test_an_election_that_went_the_other_way_is_seen(self, monkeypatch):
        import tarsia.merge.combine as combine

        parts = stack(0, 4, 30)
        monkeypatch.setattr(combine, "signs", lambda voters, elect: -torch.where(voters.sum(0) >= 0, 1, -1))
        assert not torch.equal(ties(parts, torch.ones(4)), merge_utils.ties(list(parts), torch.ones(4), 1.0))


def in_peft(folders: Mapping[str, Any]) -> PeftModel:
    (first, folder), *rest = folders.items()
    model = PeftModel.from_pretrained(FAMILIES[FAMILY].build()[0], folder, adapter_name=first)
    for name, other in rest:
        model.load_adapter(other, adapter_name=name)
    return model.eval()


def combined(model: PeftModel, weights: Sequence[float], kind: str, **options: Any) -> dict[str, Tensor]:
    """What PEFT's merged adapter adds, by our paths."""
    names = [name for name in model.peft_config if name != "merged"]
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    model.add_weighted_adapter(names, list(weights), "merged", combination_type=kind, **options)
    model.set_adapter("merged")
    model.eval()  # what it has just injected would drop numbers out
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("merged").detach()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "merged" in module.lora_A
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def ours(one: Adapter) -> Tensor:
    put(host(), one, "one")
    try:
        return logits(host().model)
    finally:
        detach(host().model, "one")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two LoRAs of one rank in PEFT, and the adapters themselves."""
    folder, parents = tmp_path_factory.mktemp("pair"), [adapter("lora", 1), adapter("lora", 2)]
    for name, one in zip("ab", parents, strict=True):
        save(one, folder / name)
    return in_peft({name: folder / name for name in "ab"}), parents


class TestWeightedAdapter:
    """``add_weighted_adapter`` on LoRAs of one rank, where it is right."""

    @pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
    def test_cat(self, pair, weights):
        model, parents = pair
        wanted = combined(model, weights, "cat")
        found = merge(parents, weights, "cat", host()).adapter
        self.check(found, wanted, 1e-6)
        assert gap(ours(found), logits(model)) < 1e-5
        assert gap(logits(model), logits(host().model)) > 0.1

    def test_svd(self, pair):
        model, parents = pair
        wanted = combined(model, (0.7, -0.4), "svd")
        self.check(merge(parents, (0.7, -0.4), "svd", host()).adapter, wanted, 2e-5)

    @pytest.mark.parametrize(
        "kind, way, weights, options",
        [
            ("ties_svd", "ties", (1.0, 0.5), {"majority_sign_method": "total"}),
            ("ties_svd", "ties", (1.0, 0.5), {"majority_sign_method": "frequency"}),
            ("magnitude_prune_svd", "magnitude", (0.7, -0.4), {}),
        ],
    )
    def test_trimmed(self, pair, kind, way, weights, options):
        model, parents = pair
        wanted = combined(model, weights, kind, density=0.5, **options)
        elect = {"elect": options["majority_sign_method"]} if options else {}
        found = merge(parents, weights, way, host(), rank=3, density=0.5, **elect)
        self.check(found.adapter, wanted, 1e-4)

    @pytest.mark.parametrize("kind", ["linear", "ties"])
    def test_what_it_does_to_factors_apart_is_not_what_the_adapters_do(self, pair, kind):
        """A sum of As times a sum of Bs has products of one adapter's A with another's B in it."""
        model, parents = pair
        wanted = combined(model, (1.0, 1.0), kind, **({"density": 1.0} if kind == "ties" else {}))
        honest = deltas(merge(parents, (1.0, 1.0), "cat", host()).adapter, host())
        assert max(gap(wanted[path].double(), delta.weight()) for path, delta in honest.items()) > 0.05

    def check(self, found: Adapter, wanted: Mapping[str, Tensor], tolerance: float) -> None:
        mine = deltas(found, host())
        assert mine.keys() == wanted.keys()
        for path, delta in mine.items():
            assert gap(delta.weight().float(), wanted[path]) < tolerance, path
            assert float(wanted[path].abs().max()) > 1e-3


def native(folder: Any, **options: Any) -> PeftModel:
    """An adapter that PEFT itself makes and saves, moved by noise."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=r".*language_model.*(q_proj|v_proj)", **options)
    model = get_peft_model(FAMILIES[FAMILY].build()[0], config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                assert "lora" in name or "modules_to_save" in name
    model.eval().save_pretrained(folder)
    return model


class TestOneAlone:
    """One adapter at weight 1.0: PEFT gives another one for these variants; here it is itself."""

    @pytest.mark.parametrize(
        "options",
        [{"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["multi_modal_projector"]}],
        ids=["rslora", "dora", "modules_to_save"],
    )
    def test_peft_changes_it(self, options, tmp_path):
        model = native(tmp_path, **options)
        wanted = logits(model)
        one = load(tmp_path, host())
        assert gap(ours(one), wanted) < 1e-5 and gap(wanted, logits(host().model)) > 0.1
        assert merge([one], [1.0], "cat", host()).adapter is one
        combined(model, [1.0], "cat")
        assert gap(logits(model), wanted) > 1e-2, "PEFT has mended this: say so in docs/merging.md"

    def test_lora_with_a_bias_is_refused_where_peft_drops_it(self, tmp_path):
        from tarsia.core.errors import AdapterError

        model = native(tmp_path, lora_bias=True)
        wanted = logits(model)
        with pytest.raises(AdapterError, match="lora_bias"):
            load(tmp_path, host())
        combined(model, [1.0], "cat")
        assert gap(logits(model), wanted) > 1e-2

    def test_plain_lora_it_keeps(self, tmp_path):
        model = native(tmp_path)
        wanted = logits(model)
        combined(model, [1.0], "cat")
        assert gap(logits(model), wanted) < 1e-5

    @pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}], ids=["rslora", "dora"])
    def test_two_of_them_are_summed_here(self, options, tmp_path):
        """Against W + sum of what each alone folds into, by PEFT's own merge of one."""
        model = native(tmp_path, **options)
        one = load(tmp_path, host())
        both = merge([one, adapter("lora", 1)], [0.5, 1.0], "cat", host()).adapter
        folded = copy.deepcopy(model).merge_and_unload()
        bare, plain = dict(host().model.named_parameters()), dict(folded.named_parameters())
        mine, other = deltas(both, host()), deltas(adapter("lora", 1), host())
        for path in one.patches:
            name = f"{path}.weight"
            wanted = 0.5 * (plain[name] - bare[name]).detach().double()
            wanted = wanted + (other[path].weight() if path in other else 0)
            assert gap(mine[path].weight(), wanted) < 1e-5, path


def test_the_version_of_peft_is_one_that_this_was_tried_with():
    assert tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 19)
