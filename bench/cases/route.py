"""Choosing an adapter by a picture: beside the pass of mini-1's vision tower that its signature is made of.

Cards of drawn signatures as wide as mini-1's, 32 pictures each. *choose*: one signature against all adapters, median.
*add and settle*: one more adapter comes, and all that the next choice needs is worked out. *KiB*: what a card holds.
*tower*: mini-1's pass for one picture and its signature. One thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median

import torch

from bench.run import Values
from tarsia.adapter import open_base
from tarsia.adapter.prototypes import Look
from tarsia.adapter.signature import signature, view
from tarsia.serve.route import CARD, Router

ADAPTERS = (50, 500, 2000)
PICTURES = 32
ROUNDS = 200


def measure() -> Values:
    """Every number of adapters, and the tower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured()
    finally:
        torch.set_num_threads(threads)


def _measured() -> Values:
    host = open_base("mini-1", dtype="float32", device="cpu")
    inputs = {"pixel_values": torch.rand(1, 3, 64, 64)}
    width = len(signature(host, inputs))
    generator = torch.Generator().manual_seed(0)
    router = Router(view(host))
    values: dict[str, dict[str, float | int | str]] = {}
    tower = _milliseconds(lambda: signature(host, inputs))
    middles = torch.randn(max(ADAPTERS) + 1, width, generator=generator)
    for count in ADAPTERS:
        for i in range(len(router.names), count):
            router.add(str(i), _card(host_view=router.view, middle=middles[i], generator=generator))
        router.settle()
        asked = [middles[i] + torch.randn(width, generator=generator) for i in range(0, count, max(1, count // 20))]
        right = sum(
            router.choose([one]).nearest == str(i)
            for i, one in zip(range(0, count, max(1, count // 20)), asked, strict=True)
        )
        turn = iter(range(10**9))
        choose = _milliseconds(lambda asked=asked, turn=turn: router.choose([asked[next(turn) % len(asked)]]))  # type: ignore[misc]
        began = time.perf_counter()
        card = _card(router.view, middles[-1], generator)
        router.add("one more", card)
        router.settle()
        settled = time.perf_counter() - began
        router.remove("one more")
        values[f"{count} adapters"] = {
            "choose, ms": round(choose, 3),
            "tower, ms": round(tower, 2),
            "choose / tower": round(choose / tower, 3),
            "add and settle, s": round(settled, 2),
            "KiB of a card": round(len(json.dumps(card)) / 1024, 1),
            "right of those asked, %": round(100 * right / len(asked), 1),
        }
    return values


def _card(host_view: dict[str, str], middle: torch.Tensor, generator: torch.Generator) -> dict[str, object]:
    shown = middle + torch.randn(PICTURES, len(middle), generator=generator)
    return {CARD: Look.of(host_view, shown).plain()}


def _milliseconds(step: Callable[[], object]) -> float:
    step()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return 1000 * median(taken)
