"""One optimiser step's loss: the mean over all labelled tokens of all its micro-batches.

Only positions whose next token is labelled go through the language head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.errors import TrainingError
from tarsia.data.encode import IGNORED, Batch


def predicted(labels: Tensor) -> Tensor:
    """Which positions predict a labelled token: bool [rows, length - 1]. A row's first token is predicted by none."""
    return labels[:, 1:] != IGNORED


def named(batches: Sequence[Batch], rows: Sequence[int] | None = None) -> str:
    """The rows as errors name them; ``rows`` picks from a single batch."""
    pairs = [pair for batch in batches for pair in zip(batch.sources, batch.rows, strict=True)]
    return ", ".join(f"row {row} of {source}" for source, row in (pairs if rows is None else [pairs[i] for i in rows]))


@dataclass(frozen=True, slots=True)
class Losses:
    """Summed loss in nats, labelled tokens and rows of each source over one step."""

    total: Mapping[str, float]
    tokens: Mapping[str, int]
    rows: Mapping[str, int]

    @property
    def mean(self) -> float:
        """Mean over all labelled tokens."""
        return sum(self.total.values()) / sum(self.tokens.values())

    @property
    def means(self) -> dict[str, float]:
        """Mean over each source's labelled tokens."""
        return {source: total / self.tokens[source] for source, total in self.total.items() if self.tokens[source]}


@contextmanager
def only_predicting(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Let the language head see only the positions whose next token is labelled, as [1, n, width].

    What a family does after its head (a soft cap, a scale) then runs on these n rows alone. Raises
    TrainingError where the model has no language head, or it is not called on every position of the batch.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module):
        raise TrainingError("The model has no language head.", given=type(model).__name__)
    wanted = predicted(labels)
    calls = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        if hidden.shape[:-1] != labels.shape:
            raise TrainingError(
                "The language head does not see one position for each label.",
                given=f"hidden states {tuple(hidden.shape)}, labels {tuple(labels.shape)}",
            )
        calls.append(1)
        return (hidden[:, :-1][wanted.to(hidden.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield
        if len(calls) != 1:
            raise TrainingError("The language head was not called exactly once.", given=f"{len(calls)} calls")
    finally:
        handle.remove()


def token_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of each labelled token in float32, in nats, rows in order: [n]."""
    with only_predicting(model, labels):
        logits = model(**inputs, use_cache=False).logits
    targets = labels[:, 1:][predicted(labels)].to(logits.device)
    return F.cross_entropy(logits[0].float(), targets, reduction="none")


def backward(model: nn.Module, batches: Sequence[Batch], step: int) -> Losses:
    """Add the gradient of the step's loss to the parameters. Returns what each source lost.

    Raises TrainingError, naming step and rows, where no token is labelled or a loss is not a finite number.
    """
    tokens = sum(int(predicted(batch.labels).sum()) for batch in batches)
    if not tokens:
        raise TrainingError(f"Step {step} has no labelled token.", given=named(batches), do="look at their answers")
    sources = [source for batch in batches for source in batch.sources]
    total, counts = dict.fromkeys(sources, 0.0), dict.fromkeys(sources, 0)
    for batch in batches:
        owners = predicted(batch.labels).nonzero()[:, 0].tolist()
        if not owners:
            continue
        losses = token_losses(model, batch.inputs, batch.labels)
        values = losses.detach().tolist()
        bad = sorted({row for row, value in zip(owners, values, strict=True) if not math.isfinite(value)})
        if bad:
            raise TrainingError(
                f"The loss of step {step} is not a number.",
                given=named([batch], bad),
                do="look at these rows; if the loss had risen before, lower the learning rates",
            )
        for row, value in zip(owners, values, strict=True):
            total[batch.sources[row]] += value
            counts[batch.sources[row]] += 1
        (losses.sum() / tokens).backward()
    return Losses(total, counts, Counter(sources))
