"""The slow reference: bitsandbytes bit for bit, both ways; what rounding to levels promises; what the paper says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tarsia.core.errors import ConfigError, QuantError
from tarsia.quant.codec import (
    BLOCKS,
    DTYPES,
    KINDS,
    NESTED_BLOCK,
    Quantised,
    Scheme,
    decode,
    encode,
    linear,
    nest,
    scales,
)
from tarsia.quant.levels import bounds, levels

SHAPES = [(1,), (2,), (63,), (64,), (65,), (7, 9), (3, 5, 7), (33, 64), (4, 16, 96), (5, 4304), (3, 1000), (64, 256)]


@pytest.fixture(scope="module")
def functional() -> Iterator[Any]:
    module = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is the oracle")
    # it compiles its portable path anew for every shape; the same functions run without
    with torch.compiler.set_stance("force_eager"):
        yield module


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """The same dtype, shape and bits."""
    if a is None or b is None:
        return a is b
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))


def decoded(functional: Any, codes: Tensor, state: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By bitsandbytes: by its portable path, which all processors have, and by the one that it chooses."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    table = functional.get_4bit_type(state.quant_type, device="cpu")
    rest = (state.blocksize, state.shape, dtype)
    portable = _dequantize_4bit_compute(codes.view(-1), absmax, table, *rest)
    chosen = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, state.blocksize, state.quant_type, *rest[1:])
    return portable, chosen.view(state.shape)  # of one dimension it makes two


def assert_as_bitsandbytes(functional: Any, weight: Tensor, scheme: Scheme) -> None:
    """Its parts are ours, and its bytes and ours are decoded alike, to every dtype."""
    codes, state = functional.quantize_4bit(
        weight, blocksize=scheme.block, compress_statistics=scheme.nested, quant_type=scheme.kind
    )
    ours = encode(weight, scheme)
    assert same(ours.codes, codes) and same(ours.scales, state.absmax) and same(ours.offset, state.offset)
    assert same(ours.nested_scales, state.state2.absmax if state.nested else None)
    for dtype in DTYPES:
        portable, chosen = decoded(functional, codes, state, dtype)
        assert same(decode(ours, dtype), portable)
        # the two tests below say where the path that it chooses is not equal to the portable one, and why
        if weight.shape[-1] % scheme.block == 0 or weight.shape[-1] % 16:
            assert same(portable, chosen) if scheme.kind == "nf4" else torch.equal(portable, chosen)


def random(shape: tuple[int, ...], seed: int, spread: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight * torch.exp(spread * torch.randn(shape, generator=generator)) * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bits_are_those_of_bitsandbytes_for_every_block_and_shape(
    functional: Any, kind: str, dtype: torch.dtype
) -> None:
    for seed, (shape, block, nested) in enumerate(itertools.product(SHAPES, BLOCKS, (True, False))):
        weight = random(shape, seed, spread=seed % 3, scale=10.0 ** (seed % 5 - 4)).to(dtype)
        assert_as_bitsandbytes(functional, weight.clamp(-6e4, 6e4), Scheme(kind, nested, block))


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 1.2e-38, 9.9e-39, 1e-38, 1e-30, -6e-8, 6e4, -6e4, 3e38, -3e38]


@st.composite
def weights(draw: st.DrawFn, kind: str) -> Tensor:
    """Random numbers with stretches of zeros, the smallest, the largest, bounds and what lies beside these."""
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple))
    spread, scale = draw(st.sampled_from([0.0, 3.0])), draw(st.sampled_from([1.0, 1e-39, 1e-4]))
    weight = random(shape, draw(st.integers(0, 9999)), spread, scale)
    flat = weight.view(-1)
    for _ in range(draw(st.integers(0, 3))):
        first, length = draw(st.integers(0, len(flat) - 1)), draw(st.integers(1, 300))
        value = torch.tensor(draw(st.sampled_from(bounds(kind)[0].tolist() + SPECIAL)))
        beside = draw(st.sampled_from([0, 1, -1]))
        flat[first : first + length] = (value.view(torch.int32) + beside).view(torch.float32) if value else value
    dtype = draw(st.sampled_from(DTYPES))
    largest = 6e4 if dtype is torch.float16 else 3e38
    return weight.clamp(-largest, largest).to(dtype)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["nf4", "fp4"]), st.booleans(), st.sampled_from(BLOCKS))
def test_bits_are_those_of_bitsandbytes_on_awkward_numbers(
    functional: Any, data: Any, kind: str, nested: bool, block: int
) -> None:
    weight, scheme = data.draw(weights(kind)), Scheme(kind, nested, block)
    state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested)[1]
    if nested and state.offset.isinf():
        with pytest.raises(QuantError, match="too large"):
            encode(weight, scheme)
    else:
        assert_as_bitsandbytes(functional, weight, scheme)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_gets_the_code_that_bitsandbytes_gives_it(
    functional: Any, kind: str, dtype: torch.dtype
) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite() & (every.abs() <= 1)]
    rows = F.pad(every, (0, -len(every) % 63)).view(-1, 63)
    for largest in (1.0, 0.7, 3.0):
        weight = torch.cat([torch.full((len(rows), 1), largest, dtype=dtype), rows], 1)
        assert_as_bitsandbytes(functional, weight, Scheme(kind, nested=False))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_around_each_bound_codes_are_those_of_bitsandbytes(functional: Any, kind: str) -> None:
    edges = bounds(kind)[0]
    beside = torch.cat([(edges.view(torch.int32) + step).view(torch.float32) for step in range(-40, 41)])
    beside = beside[beside.abs() <= 1]
    rows = F.pad(beside, (0, -len(beside) % 63)).view(-1, 63)
    for largest in (1.0, 1 / 3, 0.1, 7.0, 1e-37, 3e37):
        weight = torch.cat([torch.ones(len(rows), 1), rows], 1) * largest
        assert_as_bitsandbytes(functional, weight, Scheme(kind, nested=False))
    # a number on a bound belongs to the level below
    weight = torch.cat([torch.ones(1), edges]).view(1, -1)
    table, order = levels(kind), bounds(kind)[1]
    assert torch.equal(decode(encode(weight, Scheme(kind, nested=False, block=32)))[0, 1:], table[order[:-1]].float())


def test_around_each_place_the_codes_of_scales_are_those_of_bitsandbytes(functional: Any) -> None:
    between = ((torch.arange(65535, dtype=torch.float64) + 0.5) * 2 / 65535 - 1).float()
    near = torch.cat([(between.view(torch.int32) + step).view(torch.float32) for step in range(-6, 7)])
    near = near[near.isfinite()].clamp(-1, 1)
    rows = F.pad(near, (0, -len(near) % 255)).view(-1, 255)
    for largest in (1.0, 0.37, 1e-30):
        numbers = (torch.cat([torch.ones(len(rows), 1), rows], 1) * largest).view(-1)
        codes, state = functional.quantize_blockwise(numbers, blocksize=NESTED_BLOCK)
        ours, fine = nest(numbers)
        assert torch.equal(ours, codes) and same(fine, state.absmax)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 100_000])
def test_scales_of_all_sizes_have_the_codes_that_bitsandbytes_gives_them(functional: Any, size: int) -> None:
    for seed in range(20):
        numbers = random((size,), seed, spread=seed % 4, scale=10.0 ** (4 * (seed % 9) - 30))
        numbers[: size // 3] *= seed % 2  # groups of zeros
        numbers[size // 2 :] *= (1.0, 1e-8)[seed % 3 == 0]  # groups whose inverse overflows
        codes, state = functional.quantize_blockwise(numbers, blocksize=NESTED_BLOCK)
        ours, fine = nest(numbers)
        assert torch.equal(ours, codes) and same(fine, state.absmax)


def test_a_fused_multiplication_finds_the_same_places() -> None:
    """bitsandbytes' compiler fuses the last product and sum of a place; a compiler that does not has the same codes."""
    last = int(torch.tensor(2.0).view(torch.int32))
    for first in range(last - 15 * (1 << 23), last + 1, 1 << 20):  # each 16th of the numbers between 2^-14 and 2
        shifted = torch.arange(first, min(first + (1 << 16), last + 1), dtype=torch.int32).view(torch.float32)
        plain = (shifted / 2 * 65535 + 0.5).long()
        fused = ((shifted / 2).double() * 65535 + 0.5).float().long()
        assert torch.equal(plain, fused)


def test_the_mean_of_many_scales_is_torchs_with_any_number_of_threads(functional: Any) -> None:
    weight, before = random((40_000, 64), 1), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = encode(weight, Scheme())
            state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")[1]
            assert same(ours.offset, state.offset) and same(ours.scales, state.absmax)
    finally:
        torch.set_num_threads(before)


def test_where_rows_are_no_whole_blocks_the_avx512_path_of_bitsandbytes_takes_other_scales(functional: Any) -> None:
    """Why the portable path is the one that is followed: this one does not undo its own quantiser."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("bitsandbytes has that path on a processor with AVX-512 alone")
    weight = random((4, 4304), 0, spread=2)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4")
    theirs, ours = functional.dequantize_4bit(codes, state), decode(encode(weight, Scheme(nested=False)))
    assert torch.equal(theirs[0], ours[0]) and not torch.equal(theirs[1:], ours[1:])
    assert (theirs - weight).norm() > 2 * (ours - weight).norm()


def test_the_second_zero_of_fp4_is_positive_but_in_one_path_of_bitsandbytes(functional: Any) -> None:
    weight = torch.tensor([[1.0, 1e-3, -1e-3, 0.0, 0.0, 0.0]])
    codes, state = functional.quantize_4bit(weight, quant_type="fp4")
    ours, (portable, chosen) = (
        decode(encode(weight, Scheme("fp4", nested=False))),
        decoded(functional, codes, state, torch.float32),
    )
    assert same(ours, portable) and torch.equal(ours, chosen)
    assert not ours.signbit()[0, 1] and chosen.signbit()[0, 1]


# ---- laws ------------------------------------------------------------------------------------------------------------


def gap(kind: str) -> float:
    """The largest distance between levels that are next to each other and of magnitude up to 1."""
    table = levels(kind).double().sort().values
    return float(table[table.abs() <= 1].diff().max())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.booleans(), st.sampled_from(DTYPES), st.integers(1, 700))
def test_a_number_is_rounded_by_half_the_largest_gap_at_most(
    seed: int, kind: str, nested: bool, dtype: torch.dtype, size: int
) -> None:
    weight = random((size,), seed, spread=seed % 3).to(dtype)
    value = encode(weight, Scheme(kind, nested))
    exact = weight.double().abs()
    absmax = torch.stack([block.max() for block in exact.split(64)]).repeat_interleave(64)[:size]
    allowed = absmax * gap(kind) / 2
    if value.nested_scales is not None:
        # the scale is off by half the largest gap of its own levels, and by half a place
        allowed += value.nested_scales.double().repeat_interleave(NESTED_BLOCK * 64)[:size] * (0.45 / 64 + 1 / 65535)
    assert ((decode(value, torch.float32).double() - weight.double()).abs() <= allowed * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.booleans())
def test_of_two_numbers_of_a_block_the_larger_is_not_decoded_to_less(seed: int, kind: str, nested: bool) -> None:
    order = random((8, 64), seed, spread=1).sort(1).values
    assert (decode(encode(order, Scheme(kind, nested))).diff(dim=1) >= 0).all()


@pytest.mark.parametrize("nested", [True, False])
def test_fp4_and_int4_take_a_sign_out_and_nf4_does_not(nested: bool) -> None:
    weight = random((64, 64), 0)
    for kind in KINDS:
        scheme = Scheme(kind, nested)
        assert torch.equal(decode(encode(-weight, scheme)), -decode(encode(weight, scheme))) is (kind != "nf4")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_decoded_is_encoded_to_itself(kind: str, dtype: torch.dtype) -> None:
    """The same scales and codes; but FP4's second zero, which small positive numbers get, becomes the first."""
    for shape, seed in itertools.product([(1,), (67,), (33, 64), (3, 5, 7)], range(5)):
        weight = random(shape, seed, spread=seed).to(dtype).clamp(-6e4, 6e4)
        once = encode(weight, Scheme(kind, nested=False))
        again = encode(decode(once), once.scheme)
        assert same(again.scales, once.scales)
        assert same(decode(again), decode(once))
        if kind != "fp4":
            assert same(again.codes, once.codes)


@pytest.mark.parametrize("kind", KINDS)
def test_nested_what_was_decoded_keeps_its_codes_and_moves_its_scales_by_one_rounding(kind: str) -> None:
    """The mean of decoded scales is another offset, against which they are rounded anew: not exactly idempotent."""
    for seed in range(10):
        once = encode(random((100, 640), seed, spread=0.3), Scheme(kind))
        again = encode(decode(once), once.scheme)
        assert (scales(once) > 0).all()
        if kind != "fp4":
            assert same(again.codes, once.codes)
        assert again.nested_scales is not None
        moved = (scales(again) - scales(once)).abs()
        by_group = again.nested_scales.repeat_interleave(NESTED_BLOCK)[: len(moved)]
        assert (moved <= by_group * (0.45 / 64 + 1 / 65535) * 1.0001).all() and moved.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_whole_groups_costs_four_bits_and_an_eighth(kind: str) -> None:
    for shape in ((256, 64), (3, 16384), (2, 128, 128)):
        value, count = encode(random(shape, 0), Scheme(kind)), math.prod(shape)
        per_number = 8 * sum(t.nbytes for name, t in value.tensors.items() if name != "offset") / count
        assert per_number == 4.126953125
        assert value.bits == 4.126953125 + 32 / count  # one offset for all of the weight
        assert encode(random(shape, 0), Scheme(kind, nested=False)).bits == 4.5


def test_a_linear_layer_multiplies_by_what_was_decoded() -> None:
    value, x, bias = encode(random((5, 96), 0), Scheme()), random((2, 3, 96), 1), random((5,), 2)
    torch.testing.assert_close(linear(x, value, bias), x @ decode(value).T + bias)


# ---- the paper -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, error", [("nf4", 0.00846), ("int4", 0.01159), ("fp4", 0.01486)])
@pytest.mark.parametrize("nested", [True, False])
def test_the_mean_squared_error_on_normal_numbers(kind: str, error: float, nested: bool) -> None:
    """NF4 < INT4 < FP4; in the perplexity of arXiv:2305.14314 FP4 comes before INT4: squared error alone misorders."""
    weight = random((512, 4096), 0)
    measured = (decode(encode(weight, Scheme(kind, nested))) - weight).square().mean().item()
    assert measured == pytest.approx(error, rel=0.005)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 64, 129])
def test_a_weight_that_is_not_finite_is_refused(bad: float, place: int) -> None:
    weight = torch.zeros(130)
    weight[place] = bad
    with pytest.raises(QuantError, match="1 of 130"):
        encode(weight, Scheme())


@pytest.mark.parametrize("weight", [torch.zeros(0, 4), torch.zeros(4, dtype=torch.float64), torch.zeros(4).long()])
def test_what_is_no_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(QuantError, match="no weight"):
        encode(weight, Scheme())


def test_scales_that_have_no_mean_are_refused() -> None:
    weight = torch.full((4, 64), 3e38)
    with pytest.raises(QuantError, match="too large"):
        encode(weight, Scheme())
    assert torch.equal(decode(encode(weight, Scheme(nested=False))), weight)


def test_blocks_and_kinds_that_are_not_made_are_refused() -> None:
    with pytest.raises(ConfigError, match="48"):
        Scheme(block=48)
    with pytest.raises(ConfigError, match="nf5"):
        Scheme("nf5")


def test_parts_are_replaced_by_name() -> None:
    value = encode(torch.ones(64), Scheme())
    other = value.having({"codes": value.codes + 1}, dtype=torch.bfloat16)
    assert isinstance(other, Quantised) and other.dtype is torch.bfloat16 and torch.equal(other.codes, value.codes + 1)
    assert set(value.tensors) == {"codes", "scales", "nested_scales", "offset"}
