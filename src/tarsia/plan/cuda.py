"""A run on a GPU, from a rehearsal on this processor: what is otherwise there, and what its allocator makes of it.

The rehearsal's tensors are those of a processor. On a GPU most are the same; what differs is said here as tables, each
from torch's source (2.13) or from Tarsia's own. NOTHING here was measured on a GPU: `bench/cases/plan_cuda.py` is to.

- Products take no scratch of their own beside cuBLAS's workspaces, one for each thread that multiplies: that which
  calls forward, and autograd's own. Torch 2.13's default; cuBLASLt shares them.
- Operations on mixed dtypes convert in registers: no copies, as a processor makes them.
- Attention keeps its output and the logarithm of its sums, as on a processor; its way back adds up the gradient of
  the queries in float32. A mask whose lines are no whole 16 bytes is copied into one whose lines are.
- Weights in 4 bits are unpacked by slices into scratch of at most `tarsia.quant.gpu.plan.ARENA` bytes, where a product
  has many rows, and not at all where it has few.
- AdamW goes over lists of tensors: beside the states stand the roots of all second moments of a group.
- The base is read, and rounded to 4 bits, in the host's memory, and then moved: of loading and encoding there is on
  the device only what stays. Batches are not pinned.

Not modelled: cuDNN's workspaces for convolutions (a vision tower's first layer; it chooses by what is free), Triton's
own modules, pages of a paged optimiser on their way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final

import torch

from tarsia.plan.allocator import MIB, Taken, replay
from tarsia.plan.ghost import Op, gapless, size_of
from tarsia.plan.ledger import Block
from tarsia.quant.gpu.plan import ARENA, few

if TYPE_CHECKING:
    from tarsia.plan.rehearse import Rehearsal
    from tarsia.train.recipe import Recipe

HOPPER: Final = 9
USUAL: Final = 8
"""The major number of a capability where none is known: Ampere's and Ada's."""
WORKSPACE: Final = 2 * 4 * MIB + 8 * 16 * 1024
"""cuBLAS's for a thread, ":4096:2:16:8" (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
WORKSPACE_HOPPER: Final = 32 * MIB
"""The same from capability 9.0 on."""
THREADS: Final = 2
"""That multiply: one forward, autograd's one backward."""
CONTEXT: Final[Mapping[int, int]] = {7: 330_000_000, 8: 430_000_000, 9: 530_000_000, 10: 560_000_000, 12: 560_000_000}
"""Bytes of a context with the modules that a run loads, by the capability's major number: from reports."""
CONTEXT_ERROR: Final = 0.35
"""How far off these may be, as a share of them, to either side: it changes with driver and card."""
ON_HOST: Final = ("load", "survey", "step")
"""Phases of the rehearsal whose tensors are the host's; what of them is there when a step begins lies on the device."""
TILE: Final = 128
"""Queries that attention's way back adds up at once: sizes are whole ones of these (Dao's kernels)."""
LINE: Final = 16
"""Bytes that a mask's lines must be whole ones of (mem_eff_attention)."""


def workspace(major: int) -> int:
    """Bytes that cuBLAS takes for each thread on a GPU of this capability."""
    return WORKSPACE_HOPPER if major >= HOPPER else WORKSPACE


class Scratch:
    """Bytes that an operation takes on a GPU beside its outputs, and gives back before it ends."""

    def __init__(self, major: int = USUAL) -> None:
        self.major = major

    def __call__(self, op: Op) -> int:
        formula = _FORMULAS.get(op.name.partition(".")[0])
        return 0 if formula is None else formula(op, self.major)


def _unpacked(op: Op, major: int) -> int:
    """The slice of the weight, and the rows of x where they do not lie one behind the other."""
    x, out = op.inputs[0], op.outputs[0]
    rows, columns = prod(x[0][:-1]), x[0][-1]
    copied = 0 if gapless(x) else size_of(x)
    if rows <= few(x[2], major):
        return copied
    return copied + min(ARENA, columns * out[0][-1] * x[2].itemsize)


def _attention_back(op: Op, major: int) -> int:
    """The gradient of the queries in float32, and the products of each with its output (FlashAttention-2)."""
    query = op.inputs[1]
    batch, heads, length, width = query[0]
    lines = batch * heads * -(-length // TILE) * TILE
    return 4 * lines * (-(-width // 32) * 32 + 1)


def _attention(op: Op, major: int) -> int:
    """A mask with lines of whole 16 bytes, where it is given with others."""
    masks = [spec for spec in op.inputs[3:] if len(spec[0]) == 4]
    step = [LINE // spec[2].itemsize for spec in masks]
    return sum(
        prod(spec[0][:-1]) * -(-spec[0][-1] // n) * n * spec[2].itemsize
        for spec, n in zip(masks, step, strict=True)
        if spec[0][-1] % n
    )


_FORMULAS: Final[Mapping[str, Callable[[Op, int], int]]] = {
    "tarsia::linear4": _unpacked,
    "tarsia::product4": _unpacked,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_back,
}


def as_there(recipe: Recipe) -> Recipe:
    """The recipe in the precision that "auto" is on a GPU of capability 8 or more."""
    return recipe.model_copy(update={"precision": "bfloat16"}) if recipe.precision == "auto" else recipe


def major_of(device: str) -> int | None:
    """The major number of the capability of the GPU that a recipe's device is; None where that is a processor.

    Of a GPU that is not here it is the usual one.
    """
    here = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not here):
        return None
    return torch.cuda.get_device_capability()[0] if here else USUAL


def by_lists(optimiser: torch.optim.Optimizer) -> None:
    """Let AdamW go over lists of tensors, as it does by itself where they lie on a GPU; a paged one goes by pages."""
    for group in optimiser.param_groups:
        group["fused"] = None
        if type(optimiser) is torch.optim.AdamW:
            group["foreach"] = True


@dataclass(frozen=True, slots=True)
class Device:
    """What a run takes of a GPU, in bytes: the most ``allocated`` and ``reserved`` by torch, and the ``context``."""

    allocated: int
    reserved: int
    context: int

    @property
    def total(self) -> int:
        return self.reserved + self.context


def device(rehearsal: Rehearsal, major: int = USUAL, expandable: bool = False) -> Device:
    """What the rehearsal's run takes of a GPU of this capability."""
    taken: Taken = replay(on_device(rehearsal), rehearsal.end, expandable, first=[workspace(major)] * THREADS)
    known = CONTEXT.get(major, CONTEXT[max(CONTEXT)])
    return Device(taken.allocated, taken.reserved, known)


def on_device(rehearsal: Rehearsal) -> Sequence[Block]:
    """The blocks that lie on the device. Of the host's phases those that are there when a step begins, from then on."""
    begins = [mark.moment for mark in rehearsal.marks if mark.phase == "forward"]
    return [block for block in rehearsal.blocks if block.phase not in ON_HOST or _stays(block, begins)]


def _stays(block: Block, begins: Sequence[int]) -> bool:
    place = bisect_left(begins, block.born + 1)
    return place < len(begins) and block.died > begins[place]
