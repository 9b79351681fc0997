"""Any change as plain LoRA: exact where it is thin, else the nearest of its rank, and the error is what is said."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from e2e.made_adapters import Parts, made
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.adapter import Adapter, Host, Patched, load, save
from tarsia.core.errors import MergeError
from tarsia.merge import thin as module
from tarsia.merge.delta import Delta, deltas
from tarsia.merge.thin import LARGE, Spectrum, rounding, spectrum, thin

WHERE = "language.*.{q,up}"


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.of(FAMILIES["llava"].build()[0])


def adapter(host: Host, parts: Parts, **options: Any) -> Adapter:
    return made(host, parts, probed=False, **options)


def far(one: Delta, other: Delta) -> float:
    return float((one.weight() - other.weight()).norm() / one.weight().norm())


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa", "loraplus"])
def test_what_is_lora_keeps_its_tensors(method: str, host: Host) -> None:
    one = adapter(host, [(method, WHERE, {"rank": 3, "alpha": 5.0, "ranks": {"*.1.*": 2}})])
    found = thin(one, host)
    assert found.error == 0
    assert set(found.exact) == set(one.patches)
    for path, patched in one.patches.items():
        held = found.adapter.patches[path]
        assert held.constants["scale"] == patched.constants["scale"]
        assert all(torch.equal(held.tensors[side], patched.factors[side]) for side in ("A", "B"))
    before, after = deltas(one, host), deltas(found.adapter, host)
    # PiSSA's own order of sums is another
    assert all(far(before[path], after[path]) < 1e-12 if method != "pissa" else 1e-6 for path in before)


def test_vera_is_the_same_product(host: Host) -> None:
    for rank in (4, 64):  # narrower than the layers, and wider
        one = adapter(host, [("vera", WHERE, {"rank": rank})])
        found = thin(one, host)
        assert max(found.ranks.values()) == min(rank, 32)
        before, after = deltas(one, host), deltas(found.adapter, host)
        for path, error in found.errors.items():
            assert far(before[path], after[path]) == pytest.approx(error, rel=0.3, abs=1e-7)
            assert error < 2e-7


@pytest.mark.parametrize("method", ["dora", "oft"])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_error_is_what_is_off_and_no_product_is_nearer(method: str, rank: int, host: Host) -> None:
    one = adapter(host, [(method, WHERE, {} if method == "oft" else {"rank": 2})])
    found = thin(one, host, rank=rank)
    before, after = deltas(one, host), deltas(found.adapter, host)
    lost = size = 0.0
    for path, error in found.errors.items():
        values = torch.linalg.svdvals(before[path].weight())
        best = float(values[rank:].norm() / values.norm())
        assert found.ranks[path] == rank
        assert far(before[path], after[path]) == pytest.approx(error, rel=1e-5)
        assert error == pytest.approx(best, rel=1e-5)
        lost, size = lost + (error * before[path].norm) ** 2, size + before[path].norm ** 2
    assert found.error == pytest.approx(math.sqrt(lost / size))


@pytest.mark.parametrize("most", [0.5, 0.1, 0.01])
def test_the_least_rank_within_an_error(most: float, host: Host) -> None:
    one = adapter(host, [("dora", WHERE, {"rank": 2})])
    found = thin(one, host, most=most)
    for path, delta in deltas(one, host).items():
        values = torch.linalg.svdvals(delta.weight())
        off = [float(values[rank:].norm() / values.norm()) for rank in range(len(values) + 1)]
        assert found.ranks[path] == max(1, next(rank for rank, error in enumerate(off) if error <= most))
        assert found.errors[path] <= most


def test_a_thin_site_is_left_alone_where_another_must_be_near(host: Host) -> None:
    one = adapter(host, [("lora", "language.*.q", {"rank": 6}), ("dora", "language.*.up", {"rank": 2})])
    found = thin(one, host, most=0.3)
    assert {path for path, error in found.errors.items() if error == 0} == set(found.exact)
    assert all(path.endswith("q_proj") for path in found.exact)
    assert all(found.ranks[path] == 6 for path in found.exact)


def test_a_rank_below_its_own_is_the_nearest_of_it(host: Host) -> None:
    one = adapter(host, [("lora", WHERE, {"rank": 6})])
    found = thin(one, host, rank=3)
    before, after = deltas(one, host), deltas(found.adapter, host)
    assert set(found.ranks.values()) == {3}
    for path, error in found.errors.items():
        values = torch.linalg.svdvals(before[path].weight())
        assert error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-6)
        assert far(before[path], after[path]) == pytest.approx(error, rel=1e-5)


def test_it_saves_and_loads_and_peft_has_a_place_for_it(host: Host, tmp_path: Any) -> None:
    found = thin(adapter(host, [("dora", WHERE, {"rank": 2}), ("vera", "vision.0.q", {"rank": 2})]), host, rank=4)
    save(found.adapter, tmp_path / "a")
    again = load(tmp_path / "a")
    assert not again.layout.obstacles
    assert set(again.layout.targets) == set(found.adapter.patches)
    for path, patched in found.adapter.patches.items():
        assert torch.equal(again.patches[path].tensors["A"], patched.tensors["A"])


def test_biases_norms_and_bottlenecks_are_refused_with_their_sites(host: Host) -> None:
    for parts, words in [
        ([("full", "projector", {})], ("linear_1: a bias", "tarsia fold")),
        ([("bitfit", "vision.*.q", {})], ("q_proj: a bias", "tarsia fold")),
        ([("full", "language.*.norm", {})], ("norm", "tarsia fold")),
        ([("houlsby", "language", {"reduction": 4})], ("houlsby", "train lora")),
        ([("prompt", "language", {"length": 2})], ("prompt", "train lora")),
    ]:
        with pytest.raises(MergeError) as refusal:
            thin(adapter(host, parts), host, rank=2)
        assert all(word in str(refusal.value) for word in words)


def test_a_bias_that_stays_is_no_obstacle(host: Host) -> None:
    one = adapter(host, [("full", "projector", {})])
    patches = {}
    for path, patched in one.patches.items():
        bias = host.model.get_submodule(path).bias.detach().clone()
        patches[path] = Patched("full", {}, {**patched.tensors, "bias": bias})
    found = thin(replace(one, patches=patches), host, most=0.01)
    assert 0 < found.error <= 0.01


def test_a_site_without_change_is_left_out_and_told_of(host: Host) -> None:
    one = adapter(host, [("lora", WHERE, {"rank": 2})])
    path, patched = next(iter(one.patches.items()))
    still = Patched("lora", patched.constants, {"A": patched.tensors["A"], "B": 0 * patched.tensors["B"]})
    found = thin(replace(one, patches={**one.patches, path: still}), host)
    assert found.still == (path,)
    assert path not in found.adapter.patches
    with pytest.raises(MergeError, match="changes nothing"):
        thin(replace(one, patches={path: still}), host)


def test_a_choice_that_must_be_made_is_asked_for_with_the_errors(host: Host) -> None:
    with pytest.raises(MergeError) as refusal:
        thin(adapter(host, [("dora", WHERE, {"rank": 2})]), host)
    assert "rank 4 0." in str(refusal.value)
    assert "--max-error" in str(refusal.value)
    with pytest.raises(MergeError, match="larger than"):
        thin(adapter(host, [("dora", WHERE, {"rank": 2})]), host, rank=2, most=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 99))
def test_factors_have_the_singular_values_of_their_product(
    rank: int, out: int, into: int, wide: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, wide, generator=generator, dtype=torch.float64)
    down = torch.randn(wide, into, generator=generator, dtype=torch.float64)
    found = spectrum(Delta(up, down))
    values = torch.linalg.svdvals(up @ down)
    assert torch.allclose(found.values, values[: len(found.values)], rtol=1e-6)
    rank = min(rank, len(found.values))
    a, b = found.factors(rank)
    off = float((up @ down - b @ a).norm() / values.norm())
    assert found.off(rank) == pytest.approx(off, abs=1e-6)


def test_a_sketch_is_nearly_the_best_and_says_what_it_leaves() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = 0.9 ** torch.arange(LARGE, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(LARGE, LARGE, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(LARGE + 6, LARGE, generator=generator, dtype=torch.float64))[0]
    whole = (left * sizes) @ right.T
    found = spectrum(Delta(whole=whole), 24)
    assert len(found.values) < 64  # it is a sketch
    a, b = found.factors(24)
    off = float((whole - b @ a).norm() / whole.norm())
    best = float(sizes[24:].norm() / sizes.norm())
    assert found.off(24) == pytest.approx(off, rel=1e-6)
    assert best <= off < 1.01 * best


def test_one_site_at_a_time_is_in_memory(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Delta]] = []
    most = []
    true = module.delta_of

    def watched(*arguments: Any) -> Delta:
        made = true(*arguments)
        held.append(weakref.ref(made))
        most.append(sum(one() is not None for one in held))
        return made

    monkeypatch.setattr(module, "delta_of", watched)
    thin(adapter(host, [("dora", WHERE, {"rank": 2}), ("lora", "language.*.v", {"rank": 2})]), host, rank=3)
    assert len(most) == 9
    assert max(most) <= 2  # the one before goes when the next takes its name


def test_rounding_is_measured_where_it_is_small() -> None:
    generator = torch.Generator().manual_seed(2)
    up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 3), (3, 7)))
    b, a = up.float().double(), down.float().double()
    off = float((up @ down - b @ a).norm() / (up @ down).norm())
    assert rounding(up, down, b, a) == pytest.approx(off, rel=1e-6)
    assert rounding(up, down, b, 1.01 * a) == pytest.approx(0.01, rel=1e-2)


def test_an_error_that_is_not_summed_would_be_seen() -> None:
    """The norm says what no value was computed for."""
    held = Spectrum(torch.eye(3), torch.tensor([2.0]), torch.eye(3), 2.5)
    assert held.off(1) == pytest.approx(1.5 / 2.5)
