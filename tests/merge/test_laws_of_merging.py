"""Laws of the ways, over all of them and over drawn shapes, ranks and weights."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge.values import drawn, gap

from tarsia.merge import WAYS, Delta, Way
from tarsia.merge.ways import combined

LINEAR = [name for name, way in WAYS.items() if way.combine == "sum" and way.sparsify == "none"]
DRAWN = [name for name, way in WAYS.items() if way.sparsify == "dare"]
SHARP = [name for name, way in WAYS.items() if way.combine == "ties" or way.sparsify != "none"]
"""Ways that decide number by number: where rounding turns a decision over, one number may jump."""
RANKS = st.lists(st.integers(0, 4), min_size=2, max_size=4)
WEIGHTS = (1.0, 0.5, 2.0, 0.25)
FEW = settings(max_examples=6, deadline=None, derandomize=True)


def made(name: str, deltas, weights, **options) -> torch.Tensor:
    return combined(WAYS[name].taking(options), deltas, weights, "some.path").weight()


def jumps(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-6) -> int:
    """How many numbers differ."""
    return int(((one - other).abs() > tolerance * max(1.0, float(other.abs().max()))).sum())


@pytest.mark.parametrize("name", WAYS)
@FEW
@given(ranks=RANKS, seed=st.integers(0, 99))
def test_the_order_of_adapters_does_not_matter(name, ranks, seed):
    deltas, weights = drawn(seed, ranks), WEIGHTS[: len(ranks)]
    plain = made(name, deltas, weights)
    for order in itertools.islice(itertools.permutations(range(len(ranks))), 1, 6, 2):
        other = made(name, [deltas[i] for i in order], [weights[i] for i in order])
        assert jumps(other, plain) == 0, order


@pytest.mark.parametrize("name", LINEAR)
@FEW
@given(ranks=st.lists(st.integers(0, 4), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_sums_are_associative(name, ranks, seed):
    a, b, c = drawn(seed, ranks)
    at_once = made(name, [a, b, c], [1.0, 0.5, -2.0])
    in_turn = made(name, [combined(WAYS[name], [a, b], [1.0, 0.5], "p"), c], [1.0, -2.0])
    other = made(name, [a, combined(WAYS[name], [b, c], [0.5, -2.0], "p")], [1.0, 1.0])
    assert gap(in_turn, at_once) < 1e-10 and gap(other, at_once) < 1e-10


@pytest.mark.parametrize("name", [name for name in WAYS if name not in DRAWN])
@FEW
@given(ranks=RANKS, seed=st.integers(0, 99), factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_what_is_scaled_before_is_scaled_after(name, ranks, seed, factor):
    deltas, weights = drawn(seed, ranks), WEIGHTS[: len(ranks)]
    scaled = made(name, [delta.scaled(factor) for delta in deltas], weights)
    assert jumps(scaled / factor, made(name, deltas, weights)) == 0


@pytest.mark.parametrize("name", [n for n in WAYS if WAYS[n].combining.negative and n not in SHARP])
@FEW
@given(rank=st.integers(0, 4), seed=st.integers(0, 99))
def test_an_adapter_less_itself_is_nothing(name, rank, seed):
    (one,) = drawn(seed, [rank])
    assert float(made(name, [one, one], [1.0, -1.0]).abs().max()) < 1e-9 * max(1.0, one.norm)


@pytest.mark.parametrize("name", [name for name in WAYS if name != "linear"])
@FEW
@given(ranks=RANKS, seed=st.integers(0, 99), place=st.integers(0, 4))
def test_one_that_changes_nothing_has_no_part(name, ranks, seed, place):
    deltas, weights = drawn(seed, ranks), list(WEIGHTS[: len(ranks)])
    wider = [*deltas[:place], Delta(), *deltas[place:]]
    assert jumps(made(name, wider, [*weights[:place], 1.0, *weights[place:]]), made(name, deltas, weights)) == 0


def test_in_a_mean_it_has_one():
    one = drawn(0, [2])[0]
    assert gap(made("linear", [one, Delta()], [1.0, 1.0]), one.weight() / 2) < 1e-12


@pytest.mark.parametrize("name", [*LINEAR, "linear"])
def test_one_alone_is_itself_by_a_sum(name):
    one = drawn(0, [3])[0]
    assert gap(made(name, [one], [1.0]), one.weight()) < 1e-12


@pytest.mark.parametrize("name", [name for name in WAYS if name not in DRAWN])
@FEW
@given(ranks=st.lists(st.integers(1, 4), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_factored_and_whole_deltas_give_the_same(name, ranks, seed):
    deltas, weights = drawn(seed, ranks), WEIGHTS[: len(ranks)]
    wholes = [replace(delta, up=None, down=None, whole=delta.weight()) for delta in deltas]
    mixed = [wholes[0], *deltas[1:]]
    plain = made(name, deltas, weights)
    for other in (wholes, mixed):
        assert jumps(made(name, other, weights), plain) == 0


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv", "wudi", "wudi_both"])
@FEW
@given(ranks=st.lists(st.integers(1, 5), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_what_knows_no_basis_is_the_same_in_another(name, ranks, seed):
    """Turned on both sides, merged, and turned back."""
    deltas, weights = drawn(seed, ranks), WEIGHTS[: len(ranks)]
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (12, 9))
    turned = [Delta(up=left @ delta.up, down=delta.down @ right) for delta in deltas]
    assert gap(left.T @ made(name, turned, weights) @ right.T, made(name, deltas, weights)) < 1e-8


def test_what_looks_at_numbers_is_not():
    """So the law above can fail."""
    deltas = drawn(0, (2, 2))
    left = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turned = [Delta(up=left @ delta.up, down=delta.down) for delta in deltas]
    assert gap(left.T @ made("ties", turned, (1, 1)), made("ties", deltas, (1, 1))) > 0.1


@pytest.mark.parametrize("name", DRAWN)
def test_dare_is_a_function_of_its_seed(name):
    deltas = drawn(0, (2, 3, 2))
    one = made(name, deltas, (1, 1, 1), seed=1)
    assert torch.equal(one, made(name, deltas, (1, 1, 1), seed=1))
    assert not torch.equal(one, made(name, deltas, (1, 1, 1), seed=2))
    other = combined(WAYS[name].taking({"seed": 1}), deltas, (1, 1, 1), "another.path").weight()
    assert not torch.equal(one, other), "every site has the same mask"


@pytest.mark.parametrize("name", [name for name in SHARP if WAYS[name].combine == "sum"])
def test_where_all_numbers_are_kept_it_is_the_sum(name):
    deltas = drawn(0, (2, 3))
    assert gap(made(name, deltas, (1, 1), density=1.0), made("cat", deltas, (1, 1))) < 1e-6


def test_the_mean_over_many_seeds_of_dare_is_the_sum():
    deltas = drawn(0, (2, 3))
    found = torch.stack([made("dare", deltas, (1, 1), seed=seed) for seed in range(400)]).mean(0)
    assert gap(found, made("cat", deltas, (1, 1))) < 0.2


def test_biases_and_tensors_that_are_no_matrix_go_number_by_number():
    first, other = (torch.randn(5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    for name, wanted in (("cat", first + other), ("linear", (first + other) / 2), ("iso_c", (first + other) / 2)):
        made_ = combined(WAYS[name], [Delta(bias=first), Delta(bias=other)], [1, 1], "p")
        assert made_.still and gap(made_.bias, wanted) < 1e-12
        table = combined(WAYS[name], [Delta(whole=first), Delta(whole=other)], [1, 1], "p", matrix=False)
        assert gap(table.weight(), wanted) < 1e-12


def test_experts_are_merged_each_by_itself():
    parts = [torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2)]
    for name in ("iso_c", "wudi", "cat", "ties"):
        found = combined(WAYS[name], [Delta(whole=part) for part in parts], [1, 1], "p").weight()
        for i in range(3):
            alone = combined(WAYS[name], [Delta(whole=part[i]) for part in parts], [1, 1], "p").weight()
            assert name == "ties" or gap(found[i], alone) < 1e-10, name
        assert found.shape == (3, 6, 5)


def test_a_way_of_ones_own_is_made_of_the_same_axes():
    mine = Way("mine", "magnitude", "core", "sum", "nobody's", {"density": 0.5})
    assert combined(mine, drawn(0, (2, 2)), [1, 1], "p").factored
