"""Who takes part in ``bench/cases/merge.py``: eight adapters of one 2048 x 2048 weight made one.

PEFT, mergekit and plain torch take the changes as dense matrices, made before the clock starts; Tarsia takes the same
matrices, or the factors that adapters hold. The number that a step gives is a sum over a sample of the result: equal
for all who compute the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.race import Step

COUNT, SIZE, RANK = 8, 2048, 16
DENSITY = 0.2
DARE_DENSITY = 0.3
VARIABLE = "TARSIA_MERGEKIT"
"""The Python of an environment that has mergekit, in the environment."""

Act = Callable[[], Tensor]


def factors() -> tuple[list[Tensor], list[Tensor]]:
    """Ups [SIZE, RANK] and downs [RANK, SIZE] of every adapter, float32."""
    generator = torch.Generator().manual_seed(0)
    ups = [torch.randn(SIZE, RANK, generator=generator) / RANK for _ in range(COUNT)]
    downs = [torch.randn(RANK, SIZE, generator=generator) / SIZE**0.5 for _ in range(COUNT)]
    return ups, downs


def changes() -> list[Tensor]:
    """The products, [SIZE, SIZE] each."""
    return [up @ down for up, down in zip(*factors(), strict=True)]


def call(who: str, what: str) -> Step:
    """``what`` (ties, sum, dare, knots) by ``who``."""
    act = CONTESTANTS[what][who]()

    def step() -> float:
        with torch.no_grad():
            return float(act().flatten()[::4099].double().sum())

    return step


def _way(name: str, dense: bool, dtype: torch.dtype = torch.float32, **options: float) -> Act:
    from tarsia.merge import Delta
    from tarsia.merge.ways import WAYS, combined

    if dense:
        deltas = [Delta(whole=change.to(dtype)) for change in changes()]
    else:
        deltas = [Delta(up.double(), down.double()) for up, down in zip(*factors(), strict=True)]
    way = WAYS[name].taking(options)
    return lambda: combined(way, deltas, [1.0] * COUNT, "a.site").weight(torch.float32)


def _elected(stack: Tensor) -> Tensor:
    signs = stack.sum(0).sign()
    agree = stack.sign() == signs
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def _naive_ties() -> Act:
    """As one would write it in torch: the k-th magnitude, a mask, the sign of the sum, the mean of what has it."""
    held = changes()

    def act() -> Tensor:
        trimmed = []
        for change in held:
            size = change.abs()
            least = size.flatten().kthvalue(change.numel() - int(DENSITY * change.numel()) + 1).values
            trimmed.append(torch.where(size >= least, change, 0.0))
        return _elected(torch.stack(trimmed))

    return act


def _naive_sum() -> Act:
    held = changes()
    return lambda: torch.stack(held).sum(0)


def _naive_dare() -> Act:
    held = changes()
    return lambda: torch.stack(
        [torch.bernoulli(torch.full_like(c, DARE_DENSITY)) * c / DARE_DENSITY for c in held]
    ).sum(0)


def _naive_knots() -> Act:
    """The dense SVD of all changes side by side, of a quarter of the rows: the whole would take minutes."""
    wide = torch.cat([change[: SIZE // 4] for change in changes()], 1)
    return lambda: torch.linalg.svd(wide, full_matrices=False)[1]


def _peft(what: str, *density: float) -> Act:
    import peft.utils.merge_utils as theirs

    held, ones = changes(), torch.ones(COUNT)
    return lambda: getattr(theirs, what)(held, ones, *density)


def _mergekit(what: str, density: float | None = None) -> Act:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    group = TensorGroup.from_tensors([torch.zeros(SIZE, SIZE), *changes()], base_index=0)
    method, chosen = registry.get(what), {"weight": 1.0} | ({} if density is None else {"density": density})
    return lambda: method([group], parameters=chosen)[0]


def _knots() -> Act:
    from tarsia.merge.align import knots
    from tarsia.merge.delta import Delta

    deltas = [Delta(up.double(), down.double()) for up, down in zip(*factors(), strict=True)]
    return lambda: knots(deltas).parts


FROM_FACTORS, DENSE, DOUBLE = "Tarsia, from factors", "Tarsia, dense", "Tarsia, dense in float64"
TORCH, PEFT, MERGEKIT = "torch", "PEFT", "mergekit"

CONTESTANTS: dict[str, dict[str, Callable[[], Act]]] = {
    "ties": {
        FROM_FACTORS: partial(_way, "ties", False, density=DENSITY),
        DENSE: partial(_way, "ties", True, density=DENSITY),
        TORCH: _naive_ties,
        PEFT: partial(_peft, "ties", DENSITY),
        MERGEKIT: partial(_mergekit, "ties", DENSITY),
    },
    "sum": {
        FROM_FACTORS: partial(_way, "task_arithmetic", False),
        DOUBLE: partial(_way, "task_arithmetic", True, torch.float64),
        TORCH: _naive_sum,
        PEFT: partial(_peft, "task_arithmetic"),
        MERGEKIT: partial(_mergekit, "task_arithmetic"),
    },
    "dare": {
        FROM_FACTORS: partial(_way, "dare", False, density=DARE_DENSITY),
        DENSE: partial(_way, "dare", True, density=DARE_DENSITY),
        TORCH: _naive_dare,
        PEFT: partial(_peft, "dare_linear", DARE_DENSITY),
        MERGEKIT: partial(_mergekit, "dare_linear", DARE_DENSITY),
    },
    "knots": {FROM_FACTORS: _knots, "torch, a quarter of the rows": _naive_knots},
}
"""Who takes part in what."""


def taking_part(what: str) -> Sequence[str]:
    """Those of ``what`` that there are here."""
    return [who for who in CONTESTANTS[what] if who != MERGEKIT or os.environ.get(VARIABLE)]
