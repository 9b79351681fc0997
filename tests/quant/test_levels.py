"""The tables: derived as their papers derive them, and equal to bitsandbytes' to the bit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tarsia.core.errors import ConfigError
from tarsia.quant.levels import KINDS, bounds, levels, normal_float, scale_codes, scale_levels

WHY = "bitsandbytes is the oracle"
SCALE_LEVELS, SCALE_CODES = "e732639a65f497b4", "dddf35d1312b15e6"  # of their bytes, little-endian, by SHA-256


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_sixteen_levels_are_those_of_bitsandbytes(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason=WHY)
    assert same_bits(levels(kind), functional.get_4bit_type(kind, device="cpu"))


def test_nf4_follows_from_the_normal_distribution() -> None:
    assert same_bits(normal_float(), levels("nf4"))


def test_fp4_is_a_sign_two_bits_of_exponent_and_one_of_fraction() -> None:
    for code, level in enumerate(levels("fp4").tolist()):
        exponent, fraction = code >> 1 & 3, code & 1
        # the powers stand in the order of bitsandbytes' hardware tree; a zero exponent has no leading one
        size = fraction / 192 if exponent == 0 else {1: 2 / 3, 2: 1 / 3, 3: 1 / 6}[exponent] * (1 + fraction / 2)
        assert level == pytest.approx(-size if code & 8 else size, rel=1e-6)
    zeros = levels("fp4")[[0, 8]]
    assert not zeros.signbit().any()


def test_int4_is_twos_complement_in_sevenths() -> None:
    numbers = torch.tensor([(c ^ 8) - 8 for c in range(16)])
    assert torch.equal(levels("int4"), (numbers.double() / 7).float())


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_lie_between_the_levels_and_the_smaller_of_equal_codes_comes_first(kind: str) -> None:
    edges, order = bounds(kind)
    table = levels(kind)[order]
    assert sorted(order.tolist()) == list(range(16))
    assert (table[1:] >= table[:-1]).all() and (table[:-1] <= edges).all() and (edges <= table[1:]).all()
    assert torch.equal(edges.double(), ((table[:-1] + table[1:]).double() / 2))
    equal = (table[1:] == table[:-1]).nonzero().view(-1).tolist()
    assert all(order[i] < order[i + 1] for i in equal) and len(equal) == (kind == "fp4")


def test_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="nf5"):
        levels("nf5")


def test_scale_levels_are_those_that_bitsandbytes_makes_where_it_has_a_fused_multiplication() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason=WHY)
    theirs = functional.create_dynamic_map()
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert same_bits(scale_levels(), theirs)
    assert torch.allclose(scale_levels(), theirs, rtol=2.5e-7, atol=0)


def test_scale_levels_are_powers_of_ten_with_ever_finer_fractions() -> None:
    table = scale_levels()
    assert len(table) == 256 and (table[1:] > table[:-1]).all()
    assert table[-1] == 1 and (table == 0).sum() == 1 and torch.equal(-table[table < 0].flip(0), table[table > 0][:-1])
    for i in range(7):
        decade = table[(table > 10.0 ** (i - 7)) & (table < 10.0 ** (i - 6))].double()
        exact = 10.0 ** (i - 6) * (0.1 + 0.9 * (torch.arange(2**i, dtype=torch.float64) + 0.5) / 2**i)
        torch.testing.assert_close(decade, exact, rtol=2e-7, atol=0)


PRINT = """
import hashlib
from tarsia.quant.levels import *
for t in (scale_levels(), scale_codes(), normal_float(), *map(levels, KINDS), *(bounds(k)[0] for k in KINDS)):
    print(hashlib.sha256(t.numpy().tobytes()).hexdigest())
"""


def test_no_machine_decides_a_level() -> None:
    """Torch without vector instructions, where its linspace has other bits, makes the same tables."""
    tables = [scale_levels(), scale_codes(), normal_float(), *map(levels, KINDS), *(bounds(k)[0] for k in KINDS)]
    here = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tables]
    plain = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, "-c", PRINT], env=plain, capture_output=True, text=True, check=True).stdout
    assert there.split() == here
    assert here[0].startswith(SCALE_LEVELS) and here[1].startswith(SCALE_CODES)


FIRST = """
import torch
with {mode}:
    from tarsia.quant.levels import *
    asked = scale_levels(), scale_codes(), levels("nf4"), *bounds("nf4")
assert [(t.device.type, t.is_inference()) for t in asked] == [("cpu", False)] * 5, asked
"""


@pytest.mark.parametrize("mode", ['torch.device("meta")', "torch.inference_mode()"])
def test_who_asks_first_does_not_decide_what_a_table_is(mode: str) -> None:
    """A table is made once for the whole process: on no other device than the processor, and for training too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = [sys.executable, "-c", FIRST.format(mode=mode)]
    assert subprocess.run(script, env=environment, capture_output=True, text=True, check=False).stderr == ""


def test_a_place_has_the_level_nearest_to_it() -> None:
    codes, table = scale_codes().long(), scale_levels().double()
    place = (torch.arange(65536, dtype=torch.float32) * 2 / 65535 - 1).double()
    assert codes[0] == 0 and codes[-1] == 255 and (codes.diff() >= 0).all()
    distance = (place[:, None] - table).abs()
    chosen = distance.gather(1, codes[:, None]).squeeze(1)
    # bounds between levels are rounded to float32
    assert (chosen <= distance.min(1).values + 1e-7).all()
    assert not torch.isin(place.float(), (scale_levels()[:-1] + scale_levels()[1:]) / 2).any()
    # the 65,536 places are too few for the finest levels: some are never chosen
    assert 0 < 256 - len(codes.unique()) < 20
