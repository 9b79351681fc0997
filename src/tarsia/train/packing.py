"""Packed micro-batches of a run, and the proof that a model computes their rows as if each were alone."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from tarsia.anatomy import anatomy_of
from tarsia.core.errors import TrainingError
from tarsia.data import Batch
from tarsia.data.pack import pack
from tarsia.train.step import named, token_losses

_TOLERANCE: Final = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""How far packed losses may be from padded ones on average, as a share of their mean (of 0.1 where that is less)."""


def packed(model: nn.Module, batch: Batch) -> Batch:
    """The rows of a padded ``batch`` laid end to end. Raises AnatomyError where the family's can not be."""
    return pack(batch, anatomy_of(model.config).positions(model, batch.inputs))


def shared(batch: Batch) -> bool:
    """Whether a line of a packed ``batch`` holds more than one row."""
    return len(batch.labels) < len(batch.rows)


def prove(model: nn.Module, padded: Batch, tight: Batch) -> None:
    """Raise TrainingError where rows in one line do not lose what they lose alone, in eval mode.

    That they do rests on how a model's code and its attention read positions, which a version may change.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone, beside = (token_losses(model, b.inputs, b.labels) for b in (padded, tight))
    finally:
        model.train(training)
    away = float((alone - beside).abs().mean() / alone.abs().mean().clamp(min=0.1))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if not away <= _TOLERANCE[dtype]:
        raise TrainingError(
            "Packed rows are not computed as each is alone.",
            given=f"their losses differ by {away:.2g} of their mean; {named([padded])}",
            allowed=f"up to {_TOLERANCE[dtype]:g}",
            do="set batching: grouped, or plain",
        )
