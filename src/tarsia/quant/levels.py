"""The sixteen levels of each 4-bit type, and the 256 of the type that block scales are rounded to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from statistics import NormalDist
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from tarsia.core.errors import ConfigError

OUTERMOST = 0.9677083
"""The share of N(0, 1) below NF4's outermost level: 1 - (1/32 + 1/30) / 2, as bitsandbytes rounds it.

Half a step in from the end where levels are 1/16 apart, and where they are 1/15 apart: the mean of the two.
"""

# As written in bitsandbytes' sources, in the order of their bits; a machine's own arithmetic never decides a level.
_TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    # a sign, two bits of exponent, one of fraction; the smallest is not the half of the next, and zero is there twice
    "fp4": tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
    # two's complement, of which -8 is never the nearest: as many steps below zero as above
    "int4": tuple(v / 7 for v in (*range(8), *range(-8, 0))),
}
KINDS = tuple(_TABLES)

# plain tensors on the processor, within whatever this is imported; not made by a function, so that graphs take them in
with torch.device("cpu"), torch.inference_mode(False):
    _LEVELS = {kind: torch.tensor(table, dtype=torch.float64).to(torch.float32) for kind, table in _TABLES.items()}

_P = ParamSpec("_P")
_T = TypeVar("_T")


def constant(make: Callable[_P, _T]) -> Callable[_P, _T]:
    """What is made once for all is made in the same way, whoever asks first and within what."""

    @wraps(make)
    def made(*args: _P.args, **keywords: _P.kwargs) -> _T:
        with torch.device("cpu"), torch.inference_mode(False):
            return make(*args, **keywords)

    return made


def levels(kind: str) -> Tensor:
    """The table of ``kind``, float32 [16], indexed by a code; the largest magnitude that is ever chosen is 1.

    "nf4": arXiv:2305.14314, section 3. "fp4": one bit of sign, two of exponent, one of fraction. "int4": sevenths.
    Raises ConfigError for another kind.
    """
    if kind not in _TABLES:
        raise ConfigError("There is no such 4-bit type.", given=kind, allowed=", ".join(KINDS))
    return _LEVELS[kind]


def normal_float(outermost: float = OUTERMOST, dtype: torch.dtype = torch.float32) -> Tensor:
    """NF4 derived, float32 [16]: seven quantiles of N(0, 1) below zero, zero, and eight above, over the largest.

    Quantiles are at equal steps of probability from ``outermost`` to one half, on each side its own step, in ``dtype``.
    """

    def half(count: int) -> Tensor:
        shares = torch.linspace(outermost, 0.5, count + 1, dtype=dtype)[:-1]
        return torch.tensor([NormalDist().inv_cdf(p) for p in shares.tolist()], dtype=dtype)

    table = torch.cat([-half(7), torch.zeros(1, dtype=dtype), half(8).flip(0)])
    return (table / table.max()).float()


@cache
@constant
def bounds(kind: str) -> tuple[Tensor, Tensor]:
    """Where rounding changes from one level to the next, float32 [15], and the codes in the order of their levels.

    A bound is the float32 sum of its two levels, halved; a number that lies on it belongs to the level below.
    Of two equal levels (the zeros of FP4) the smaller code comes first.
    """
    table = levels(kind)
    order = torch.argsort(table, stable=True)
    return (table[order[:-1]] + table[order[1:]]) / 2, order


@cache
@constant
def dynamic_levels(signed: bool) -> Tensor:
    """The 256 levels of arXiv:1511.04561's dynamic type, float32, ascending: finer towards zero, from 0 or -1 to 1.

    For each of seven powers of ten the middles of equal steps of [0.1, 1], 2^i of them with both signs or 2^(i + 1)
    without, then 0 and 1. An edge is an end plus a multiple of the step, rounded once. (bitsandbytes asks
    ``torch.linspace``, which rounds twice where it was built without a fused multiplication: its table differs by up
    to two last places between machines.)
    """

    def edges(count: int) -> Tensor:
        first, last = torch.tensor([0.1, 1.0])
        step = ((last - first) / count).double()
        index = torch.arange(count + 1, dtype=torch.float64)
        halves = torch.where(index < (count + 1) // 2, first + step * index, last - step * (count - index))
        return halves.float()

    table = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        e = edges(2**i if signed else 2 ** (i + 1))
        middles = (e[:-1] + e[1:]) / 2 * torch.tensor(10.0 ** (i - 6))
        table += [middles, -middles] if signed else [middles]
    return torch.cat(table).sort().values


def scale_levels() -> Tensor:
    """The 256 levels of a block scale's own 8 bits, float32, ascending: the dynamic type with both signs."""
    return dynamic_levels(True)


@cache
@constant
def scale_codes() -> Tensor:
    """The code of a scale by where it lies in [-1, 1], uint8 [65536]: bitsandbytes' short cut to the nearest level.

    Place i stands for the number -1 + 2 i / 65535 and has the level that is nearest to it (none is on a tie).
    Near zero, where levels lie closer than places, that is not the nearest to every number of the place.
    """
    table = scale_levels()
    place = torch.arange(65536, dtype=torch.float32) * 2 / 65535 - 1
    return torch.bucketize(place, (table[:-1] + table[1:]) / 2).to(torch.uint8)
