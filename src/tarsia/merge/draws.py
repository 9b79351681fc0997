"""Random numbers by their place: a pure function of a key, whoever asks for which of them, in tiles or on threads."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 2**32 - 1


def philox(key: int, count: int, first: int = 0) -> Tensor:
    """Numbers ``first`` to ``first + count - 1`` of Philox4x32-10 under ``key``, each of 0..2^32-1, int64 [count].

    Number i is word i % 4 of the counter i // 4 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).
    A key has 64 bits; below 0 it is their two's complement. ``first`` is a multiple of 4.
    """
    if first % 4:
        raise ValueError(f"numbers come four to a counter, and {first} is no multiple of 4")
    counter = torch.arange(first // 4, first // 4 + -(-count // 4))
    a, b = counter & _LOW, counter >> 32
    c, d = torch.zeros_like(a), torch.zeros_like(a)
    low, high = key & _LOW, key >> 32 & _LOW
    for turn in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # 64 bits, of which int64 keeps all; >> brings its sign along
        a, b, c, d = (
            (q >> 32 & _LOW) ^ b ^ (low + turn * 0x9E3779B9 & _LOW),
            q & _LOW,
            (p >> 32 & _LOW) ^ d ^ (high + turn * 0xBB67AE85 & _LOW),
            p & _LOW,
        )
    return torch.stack([a, b, c, d], 1).flatten()[:count]


def kept_at(key: int, count: int, density: float) -> Tensor:
    """Which of ``count`` numbers stay where each stays with probability ``density``: bool [count]."""
    return philox(key, count) < below(density)


def below(density: float) -> int:
    """What a number of 32 bits is below with probability ``density``, as near as 2^-33."""
    return round(density * 2**32)
