"""What makes a step cheaper and changes nothing else, entered for a whole run, and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tarsia.core.attach import slots
from tarsia.core.patch import Ground, loaded
from tarsia.core.slot import Slot
from tarsia.methods.lora import LoRA
from tarsia.quant import cuda, native
from tarsia.quant.tensor import Weight4
from tarsia.train.heap import kept_heap
from tarsia.train.lean import lean
from tarsia.train.loss import followed, plain_head
from tarsia.train.paged import PagedAdamW

FOLLOWED = "The model changes what its head gives (a soft cap, a scale), so all logits of a batch are made at once."


@contextmanager
def fast(model: nn.Module, optimiser: torch.optim.AdamW) -> Iterator[tuple[str, ...]]:
    """Compute in the cheap ways inside. Gives a line for each that acts, and for each that does not: why."""
    with lean(model) as found, kept_heap() as kept:
        lines = [*_four_bits(model), *_low_rank(model)]
        taken = ", ".join(f"{count} {name}" for name, count in found.taken.items())
        lines.append(f"in one pass each: {taken}" if taken else "no module is of a class that is computed in one pass")
        if found.refused:
            lines.append(f"as the model has them, for the numbers differ: {', '.join(found.refused)}")
        if not plain_head(model):
            lines.append("all logits at once: the head is patched, trained, watched or not linear")
        elif followed(model):
            lines.append(FOLLOWED)
        else:
            lines.append("loss by chunks through the frozen head")
        fused = all(group["fused"] for group in optimiser.param_groups)
        lines.append("AdamW in one pass" if fused else "AdamW as torch does it: the patches are not on a processor")
        if isinstance(optimiser, PagedAdamW):
            lines.append(f"AdamW's {optimiser.line}")
        lines.append("freed memory is kept" if kept else "freed memory is not kept: the C library can not be told to")
        yield tuple(lines)


def _four_bits(model: nn.Module) -> Iterator[str]:
    """What multiplies weights in 4 bits, on each kind of device that has some."""
    places = {weight.device.type for weight in model.parameters() if isinstance(weight, Weight4)}
    for place in sorted(places):
        status = cuda.status() if place == "cuda" else native.status()
        yield f"weights in 4 bits: {status}" + (f"; to do: {status.do}" if status.do else "")


def _low_rank(model: nn.Module) -> Iterator[str]:
    """How many LoRAs are one operation with their layer, and what keeps the others from it."""
    apart = [
        _apart(slot, below, key)
        for slot in slots(model)
        for below, name in enumerate(slot.active)
        for key, patch in slot.held(name).items()
        if isinstance(patch, LoRA)
    ]
    if apart:
        why = ", ".join(f"{count} {reason}" for reason, count in Counter(filter(None, apart)).items())
        yield f"LoRA and its layer as one operation: {apart.count('')} of {len(apart)}" + (f"; {why}" if why else "")


def _apart(slot: Slot, below: int, key: str) -> str:
    """Why the LoRA on so many active ones is no operation with its layer; "" where it is."""
    module, site, patch = slot.parent[0], slot.sites[key], slot.held(slot.active[below])[key]
    if patch.dropout:
        return "have dropout"
    ground = Ground(module, site, slot.below)
    with loaded(module):
        weight = module.get_parameter(key)
        frozen = ground.linear(torch.empty(0, dtype=weight.dtype, device=weight.device))
    if frozen is None:
        plain = type(module) is nn.Linear
        return "are of a layer that is wrapped" if plain else f"are of a layer of the class {type(module).__name__}"
    return "" if slot.pile(slot.active[:below], ground) is ground else "lie over another patch"
