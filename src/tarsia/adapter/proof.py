"""A small proof that outputs are those of the day an adapter was saved, and differ from the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

    Raises AdapterError where the outputs are the base's, or are not all finite.
    """
    batch = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and key != "labels"}
    with _still(host.model):
        adapted, bare = _logits(host, batch), _bare(host, batch)
    difference = float((adapted - bare).abs().max())
    if difference == 0:
        raise AdapterError(
            "The adapter changes no output of the probe.", do="train it first, and probe with inputs that it acts on"
        )
    logits, tokens = adapted.topk(min(_KEPT, adapted.shape[-1]), dim=-1)
    return Probe(
        inputs={key: value.detach().to("cpu", copy=True).contiguous() for key, value in batch.items()},
        tokens=tokens.contiguous(),
        logits=logits.contiguous(),
        difference=difference,
        peak=float(adapted.abs().max()),
        dtype=_dtype(host.model),
    )


def prove(host: Host, name: str, recorded: Probe) -> float:
    """Run the recorded batch through the adapter ``name`` alone.

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
    with _still(host.model):
        bare = _bare(host, recorded.inputs)
        activate(host.model, name)
        adapted = _logits(host, recorded.inputs)
    off = float((adapted.gather(-1, recorded.tokens) - recorded.logits).abs().max()) / recorded.peak
    moved = float((adapted - bare).abs().max())
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


def _logits(host: Host, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [rows, length, vocabulary] in float32 on the CPU, 0 where the attention mask is."""
    device = next(host.model.parameters()).device
    with torch.no_grad():
        result: Any = host.model(**{key: value.to(device) for key, value in batch.items()})
    logits: Tensor = result.logits.float().cpu()
    if "attention_mask" in batch and batch["attention_mask"].shape == logits.shape[:2]:
        logits = logits.masked_fill(~batch["attention_mask"].cpu().bool()[..., None], 0)
    if not bool(logits.isfinite().all()):
        raise AdapterError("The outputs of the probe are not all numbers.", do="train again from an earlier checkpoint")
    return logits


def _bare(host: Host, batch: Mapping[str, Tensor]) -> Tensor:
    active = {slot: slot.active for slot in slots(host.model)}
    try:
        activate(host.model)
        return _logits(host, batch)
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
