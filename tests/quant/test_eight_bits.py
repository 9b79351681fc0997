"""States in 8 bits: the reference's numbers, bitsandbytes' numbers, and no more lost than the levels are apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tarsia.quant.eight_bits import BLOCK, blocks, bounds, decode, decode_slowly, encode, encode_slowly, starts
from tarsia.quant.levels import dynamic_levels

WHY = "bitsandbytes is the oracle"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def numbers(seed: int, count: int, signed: bool, decades: float = 6.0) -> Tensor:
    """Numbers over many powers of ten, some zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 10 ** (-decades * torch.rand(count, generator=generator))
    x[torch.rand(count, generator=generator) < 0.1] = 0
    return x if signed else x * x


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(0, 3 * BLOCK + 5), signed=st.booleans(), decades=st.floats(0, 30))
def test_the_reference_number_by_number(seed, count, signed, decades):
    x = numbers(seed, count, signed, decades)
    codes, scales = encode(x, signed)
    slow_codes, slow_scales = encode_slowly(x, signed)
    assert codes.dtype == torch.uint8 and scales.dtype == torch.float32
    assert codes.shape == x.shape and scales.shape == (blocks(count),)
    assert torch.equal(codes, slow_codes) and same_bits(scales, slow_scales)
    assert same_bits(decode(codes, scales, signed), decode_slowly(codes, scales, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional", reason=WHY)
    theirs = functional.create_dynamic_map(signed=signed)
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert same_bits(dynamic_levels(signed), theirs)
    assert torch.allclose(dynamic_levels(signed), theirs, rtol=2.5e-7, atol=0)


def test_unsigned_levels_are_powers_of_ten_with_ever_finer_fractions():
    table = dynamic_levels(False)
    assert len(table) == 256 and (table[1:] > table[:-1]).all()
    assert table[0] == 0 and table[-1] == 1
    for i in range(7):
        decade = table[(table > 10.0 ** (i - 7)) & (table < 10.0 ** (i - 6))].double()
        count = 2 ** (i + 1)
        exact = 10.0 ** (i - 6) * (0.1 + 0.9 * (torch.arange(count, dtype=torch.float64) + 0.5) / count)
        torch.testing.assert_close(decade, exact, rtol=2e-7, atol=0)


def theirs(name: str, portable: bool):
    """bitsandbytes' operation: the one for any device, or the processor's own."""
    pytest.importorskip("bitsandbytes", reason=WHY)
    operation = getattr(torch.ops.bitsandbytes, name).default
    if not portable:
        return operation
    return lambda *args: operation._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_codes_scales_and_numbers_are_those_of_bitsandbytes(signed, seed):
    x = numbers(seed, 1024 * BLOCK, signed)
    codes, scales = encode(x, signed)
    their_codes, their_scales = theirs("quantize_blockwise", portable=True)(x, dynamic_levels(signed), BLOCK)
    assert len(codes.unique()) > 250
    assert torch.equal(codes, their_codes) and same_bits(scales, their_scales)
    for portable in (True, False):
        back = theirs("dequantize_blockwise", portable)(codes, scales, dynamic_levels(signed), BLOCK, torch.float32)
        assert same_bits(decode(codes, scales, signed), back)


@pytest.mark.parametrize("signed", [True, False])
def test_where_bitsandbytes_on_a_processor_has_another_code_ours_is_nearer(signed):
    x = numbers(7, 256 * BLOCK, signed)
    codes, scales = encode(x, signed)
    their_codes, their_scales = theirs("quantize_blockwise", portable=False)(x, dynamic_levels(signed), BLOCK)
    assert same_bits(scales, their_scales)
    other = codes != their_codes
    assert 0 < other.float().mean() < 1
    place = (x.view(-1, BLOCK) / scales.unsqueeze(1)).view(-1)[other].double()
    away, their_away = ((dynamic_levels(signed)[c[other].long()] - place).abs() for c in (codes, their_codes))
    assert (away <= their_away + 1e-12).all()
    assert (away < their_away).float().mean() > 0.99


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(1, 2 * BLOCK), signed=st.booleans())
def test_a_number_is_rounded_to_the_nearest_level(seed, count, signed):
    x = numbers(seed, count, signed)
    codes, scales = encode(x, signed)
    each = scales.repeat_interleave(BLOCK)[:count].clamp(min=1e-38)
    distance = ((x / each).double()[:, None] - dynamic_levels(signed).double()).abs()
    assert (distance.gather(1, codes.long()[:, None])[:, 0] <= distance.amin(1) + 1e-7).all()


def test_zeros_and_the_tiniest_numbers():
    for x in (torch.zeros(300), torch.full((300,), 1e-44), torch.full((256,), 1e-39)):
        for signed in (True, False):
            codes, scales = encode(x, signed)
            found = decode(codes, scales, signed)
            assert found.isfinite().all() and (found <= x).all() and (found >= 0).all()


def test_codes_and_scales_of_zero_stand_for_zeros():
    """What fresh memory holds is a fresh optimiser's state."""
    for signed in (True, False):
        codes, scales = torch.zeros(700, dtype=torch.uint8), torch.zeros(blocks(700))
        assert not decode(codes, scales, signed).any()


def test_bounds_lie_between_levels():
    for signed in (True, False):
        table = dynamic_levels(signed)
        assert (table[:-1] < bounds(signed)).all() and (bounds(signed) < table[1:]).all()


@pytest.mark.parametrize("signed", [True, False])
def test_no_two_bounds_begin_with_the_same_16_bits(signed):
    """What the lookup of codes rests on; and it gives each bound, and the number after it, the right code."""
    edges = bounds(signed)
    first = (edges.view(torch.int32) >> 16) & 0xFFFF
    assert len(first.unique()) == len(edges)
    above = torch.nextafter(edges, torch.tensor(2.0))
    one = torch.ones(1)
    for numbers, codes in ((edges, range(255)), (above, range(1, 256))):
        assert encode(torch.cat([numbers, one]), signed)[0][:-1].tolist() == list(codes)
    assert len(starts(signed)) == 1 << 16
