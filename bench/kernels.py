"""Who takes part in ``bench/cases/quant_kernels.py``: one call on 4-bit weights, in Tarsia, bitsandbytes, and dense.

Weights are taken in turn from so many that none is in the cache when its turn comes. A step is ``CALLS`` calls.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.race import Step

CALLS = 6
CACHE = 320 * 2**20
"""More bytes than the last cache of the machines that this ran on."""


def call(who: str, what: str, shape: tuple[int, int], dtype: str, rows: int = 0) -> Step:
    """``CALLS`` times ``what`` by ``who``: quantise, dequantise (where the call takes a buffer, into one), product."""
    number = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(*shape, generator=generator) / shape[1] ** 0.5).to(number)
    act = _ACTS[who, what](weight, rows)
    turn = iter(range(10**9))

    def step() -> float:
        with torch.no_grad():
            for _ in range(CALLS):
                act(next(turn))
        return 0.0

    return step


def _copies(make: Callable[[], Any], size: float) -> list[Any]:
    """As many as exceed the cache, each with memory of its own."""
    return [make() for _ in range(max(2, int(CACHE / size) + 1))]


def _x(weight: Tensor, rows: int) -> Tensor:
    return torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight.dtype)


def _dense(weight: Tensor, rows: int) -> Callable[[int], Any]:
    every, x = _copies(weight.clone, weight.nbytes), _x(weight, rows)
    return lambda turn: F.linear(x, every[turn % len(every)])


def _ours(weight: Tensor) -> list[Any]:
    from tarsia.quant.codec import Scheme
    from tarsia.quant.tensor import Weight4

    made = Weight4.of(weight, Scheme())
    return _copies(made.clone, weight.numel() * made.value.bits / 8)


def _product(weight: Tensor, rows: int) -> Callable[[int], Any]:
    every, x = _ours(weight), _x(weight, rows)
    return lambda turn: F.linear(x, every[turn % len(every)])


def _unpack(weight: Tensor, _: int) -> Callable[[int], Any]:
    every, out = _ours(weight), torch.zeros_like(weight)
    return lambda turn: every[turn % len(every)].dense(out=out)


def _pack(weight: Tensor, _: int) -> Callable[[int], Any]:
    from tarsia.quant.levels import levels
    from tarsia.quant.ops import quantise4

    every = _copies(weight.clone, weight.nbytes)
    return lambda turn: quantise4(every[turn % len(every)], levels("nf4"), 64)


def _theirs(weight: Tensor) -> list[Any]:
    from bitsandbytes import functional

    made = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return _copies(lambda: deepcopy(made), 0.52 * weight.numel())


def _their_product(weight: Tensor, rows: int) -> Callable[[int], Any]:
    from bitsandbytes.autograd._functions import matmul_4bit

    every, x = _theirs(weight), _x(weight, rows)

    def act(turn: int) -> Tensor:
        codes, state = every[turn % len(every)]
        found: Tensor = matmul_4bit(x, codes.t(), quant_state=state)
        return found

    return act


def _their_unpack(weight: Tensor, _: int) -> Callable[[int], Any]:
    from bitsandbytes import functional

    every = _theirs(weight)
    return lambda turn: functional.dequantize_4bit(*every[turn % len(every)])


def _their_pack(weight: Tensor, _: int) -> Callable[[int], Any]:
    from bitsandbytes import functional

    every = _copies(weight.clone, weight.nbytes)
    return lambda turn: functional.quantize_4bit(every[turn % len(every)], quant_type="nf4", blocksize=64)


_ACTS: dict[tuple[str, str], Callable[[Tensor, int], Callable[[int], Any]]] = {
    ("Tarsia", "product"): _product,
    ("Tarsia", "dequantise"): _unpack,
    ("Tarsia", "quantise"): _pack,
    ("bitsandbytes", "product"): _their_product,
    ("bitsandbytes", "dequantise"): _their_unpack,
    ("bitsandbytes", "quantise"): _their_pack,
    ("dense", "product"): _dense,
}
