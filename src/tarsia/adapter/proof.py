"""A small proof that outputs are those of the day an adapter was saved, and differ from the base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tarsia.adapter.host import Host
from tarsia.core.attach import activate, slots
from tarsia.core.errors import AdapterError

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of a logit, as a share of the largest logit, that two machines may have."""

_KEPT = 4
_AT_ONCE, _ROWS = 1 << 19, 32
"""Logits that are looked at together, 2 MiB of them, and the fewest positions: fewer make a product slow."""


class Unmoved(AdapterError):
    """The adapter changes no output of the rows that it was probed on."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A fixed batch and what the model gave for it.

    ``inputs`` are the model's, by name. ``tokens`` [rows, length, 4] are the likeliest ids at each position, the
    likeliest first, and ``logits`` theirs in float32; both are 0 where the attention mask is. ``difference`` is
    the largest absolute difference of any logit from the base's, ``peak`` the largest absolute logit, and
    ``dtype`` the base's.
    """

    inputs: Mapping[str, Tensor]
    tokens: Tensor
    logits: Tensor
    difference: float
    peak: float
    dtype: str

    def provable(self, host: Host) -> str | None:
        """Why this probe can not prove an adapter on ``host``, or None: the precision, or too small an effect."""
        dtype = _dtype(host.model)
        if dtype != self.dtype:
            return f"it was recorded in {self.dtype}, and the base runs in {dtype}"
        if self.difference <= 2 * TOLERANCE[dtype] * self.peak:
            return f"the adapter hardly moved its outputs ({self.difference:.3g} on logits up to {self.peak:.3g})"
        return None


def probe(host: Host, inputs: Mapping[str, Tensor]) -> Probe:
    """Run the batch (a processor's output: tensors by name) through the active adapters and through the base.

    Raises Unmoved where the outputs are the base's, AdapterError where they are not all finite.
    """
    batch = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and key != "labels"}
    tokens, logits = [], []
    with _still(host.model):
        adapted, bare = _outputs(host, batch), _bare(host, batch)
        moved = _Moved()
        for part in moved.over(adapted, bare):
            top = part.topk(min(_KEPT, part.shape[-1]), dim=-1)
            tokens.append(top.indices)
            logits.append(top.values)
    if moved.difference == 0:
        raise Unmoved(
            "The adapter changes no output of the probe.", do="train it first, and probe with inputs that it acts on"
        )
    return Probe(
        inputs={key: value.detach().to("cpu", copy=True).contiguous() for key, value in batch.items()},
        tokens=torch.cat(tokens).view(*adapted.shape, -1),
        logits=torch.cat(logits).view(*adapted.shape, -1),
        difference=moved.difference,
        peak=moved.peak,
        dtype=_dtype(host.model),
    )


def prove(host: Host, acting: str | AbstractContextManager[Any], recorded: Probe) -> float:
    """Run the recorded batch through one adapter alone: of this name, or whichever acts while ``acting`` is entered.

    Returns the largest difference of a logit, as a share of the largest. Raises AdapterError where it is beyond
    ``TOLERANCE``, where the difference from the base is another than it was, or can not be told from rounding.
    """
    dtype = _dtype(host.model)
    if dtype != recorded.dtype:
        raise AdapterError(
            "The probe was recorded in another precision than the base has now.",
            given=dtype,
            allowed=recorded.dtype,
            do=f'open the base with dtype="{recorded.dtype}"',
        )
    tolerance = TOLERANCE[dtype]
    if recorded.difference <= 2 * tolerance * recorded.peak:
        raise AdapterError(
            "The probe proves nothing: the adapter hardly moved its outputs.",
            given=f"{recorded.difference:.3g} on logits up to {recorded.peak:.3g}",
            do="probe with inputs that the adapter acts on",
        )
    first, off = 0, 0.0
    with _still(host.model):
        bare = _bare(host, recorded.inputs)
        if isinstance(acting, str):
            activate(host.model, acting)
        with nullcontext() if isinstance(acting, str) else acting:
            adapted = _outputs(host, recorded.inputs)
        compared = _Moved()
        tokens, logits = (kept.flatten(0, -2) for kept in (recorded.tokens, recorded.logits))
        for part in compared.over(adapted, bare):
            rows = slice(first, first := first + len(part))
            off = max(off, float((part.gather(-1, tokens[rows]) - logits[rows]).abs().max()) / recorded.peak)
    moved = compared.difference
    if moved == 0:
        raise AdapterError(
            "The adapter does nothing: the outputs are the base's.",
            given="no difference",
            allowed=f"{recorded.difference:.4g}, as when it was saved",
            do="fetch the adapter again; if its files are whole, report this",
        )
    change = abs(moved - recorded.difference) / recorded.peak
    if not max(off, change) <= tolerance:
        raise AdapterError(
            "The outputs are not those of the day the adapter was saved.",
            given=f"logits differ by {off:.3g} of the largest; the base is left by {moved:.4g}",
            allowed=f"{tolerance:.3g}; {recorded.difference:.4g}",
            do="check the versions of torch and transformers, and that the base's files are whole",
        )
    return max(off, change)


def _dtype(model: nn.Module) -> str:
    # patches may be float32 masters over a bfloat16 base
    inside = {id(p) for slot in slots(model) for p in slot.patches.parameters()}
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if id(p) not in inside}
    known = sorted(found & TOLERANCE.keys())
    if not known:
        raise AdapterError(
            "The probe does not know this precision.", given=", ".join(found), allowed=", ".join(TOLERANCE)
        )
    return known[0]


@dataclass(frozen=True, eq=False)
class _Outputs:
    """The logits of a batch, some positions at a time: of all of them at once there is no copy.

    ``states`` [positions, width] are what the language ``head`` makes logits of; where there is no head, they are the
    logits. ``mask`` is true where a position counts; ``shape`` is [rows, length].
    """

    states: Tensor
    head: nn.Module | None
    mask: Tensor | None
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Tensor:
        """Logits of these positions, in float32 on the CPU, 0 where the attention mask is."""
        with torch.no_grad():
            part: Tensor = self.states[rows] if self.head is None else self.head(self.states[rows])
        part = part.to("cpu", torch.float32, copy=self.head is None)
        if self.mask is not None:
            part.masked_fill_(~self.mask[rows, None], 0)
        return part


@dataclass
class _Moved:
    """The largest difference of a logit from the base's, and the largest logit, both absolute."""

    difference: float = 0.0
    peak: float = 0.0

    def over(self, adapted: _Outputs, bare: _Outputs) -> Iterator[Tensor]:
        """Go over all positions; gives the adapted logits [positions, vocabulary] of each stretch of them."""
        first, length, step = 0, len(adapted.states), 1
        while first < length:
            part = adapted[first : first + step]
            self.peak = max(self.peak, _size(part))
            self.difference = max(self.difference, _size(bare[first : first + step].sub_(part)))
            yield part
            first += len(part)
            step = max(_ROWS, _AT_ONCE // part.shape[-1])


def _size(numbers: Tensor) -> float:
    """The largest magnitude. Raises AdapterError where a number is none."""
    size = max(abs(float(end)) for end in torch.aminmax(numbers))
    if not math.isfinite(size):
        raise AdapterError("The outputs of the probe are not all numbers.", do="train again from an earlier checkpoint")
    return size


def _outputs(host: Host, batch: Mapping[str, Tensor]) -> _Outputs:
    """Run the batch. The head is left for later where the model gives nothing but what its head gave."""
    head = _plain_head(host.model)
    given = _given(host, batch) if head is None else _handed_on(host, batch, head)
    if given is None:
        head, given = None, _given(host, batch)
    shape = tuple(given.shape[:2])
    mask = batch.get("attention_mask")
    counted = None if mask is None or mask.shape != shape else mask.cpu().bool().flatten()
    return _Outputs(given.flatten(0, 1), head, counted, shape)


def _given(host: Host, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits."""
    device = next(host.model.parameters()).device
    with torch.no_grad():
        result: Any = host.model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    logits: Tensor = result.logits
    return logits


def _handed_on(host: Host, batch: Mapping[str, Tensor], head: nn.Module) -> Tensor | None:
    """What the head is given; None where the model does something with what its head gives."""
    seen: list[tuple[Tensor, int]] = []

    def hand_on(hidden: Tensor) -> Tensor:
        seen.append((hidden, _version(hidden)))
        return hidden

    head.__dict__["forward"] = hand_on
    try:
        given = _given(host, batch)
    finally:
        del head.__dict__["forward"]
    return given if len(seen) == 1 and given is seen[0][0] and _version(given) == seen[0][1] else None


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; nothing counts that in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _plain_head(model: nn.Module) -> nn.Module | None:
    """The model's language head, where nobody patches or watches it."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module) or "forward" in head.__dict__ or "_old_forward" in head.__dict__:
        return None
    return None if head._forward_hooks or head._forward_pre_hooks else head


def _bare(host: Host, batch: Mapping[str, Tensor]) -> _Outputs:
    active = {slot: slot.active for slot in slots(host.model)}
    try:
        activate(host.model)
        return _outputs(host, batch)
    finally:
        for slot, names in active.items():
            slot.active = names


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes and active adapters as they were afterwards."""
    training = {module: module.training for module in model.modules()}
    active = {slot: slot.active for slot in slots(model)}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for slot, names in active.items():
            slot.active = names
