"""One optimiser step's loss: the mean over all labelled tokens of all its micro-batches.

Only positions whose next token is labelled go through the language head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.errors import TrainingError

IGNORED = -100
"""The label of a token that is not learnt."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model together.

    ``inputs`` is what the model takes, without labels; ``labels`` int64 [rows, length], IGNORED where nothing
    is learnt; ``sources`` and ``numbers`` name each row, ``pictures`` counts its pictures.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    sources: tuple[str, ...]
    numbers: tuple[int, ...]
    pictures: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Labelled tokens that a position predicts (a row's first token is predicted by none)."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def named(self) -> str:
        """The rows as errors name them."""
        return ", ".join(f"{source} row {number}" for source, number in zip(self.sources, self.numbers, strict=True))


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
    wanted = labels[:, 1:] != IGNORED
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
    targets = labels[:, 1:][labels[:, 1:] != IGNORED].to(logits.device)
    return F.cross_entropy(logits[0].float(), targets, reduction="none")


def backward(model: nn.Module, batches: Sequence[MicroBatch], step: int) -> Losses:
    """Add the gradient of the step's loss to the parameters. Returns what each source lost.

    Raises TrainingError, naming step and rows, where no token is labelled or a loss is not a finite number.
    """
    tokens = sum(batch.tokens for batch in batches)
    if not tokens:
        raise TrainingError(
            f"Step {step} has no labelled token.",
            given="; ".join(batch.named for batch in batches),
            do="look at the rows' answers, and at max_length",
        )
    names = dict.fromkeys(source for batch in batches for source in batch.sources)
    total, counts, rows = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for batch in batches:
        for source in batch.sources:
            rows[source] += 1
        if not batch.tokens:
            continue
        losses = token_losses(model, batch.inputs, batch.labels)
        owner = (batch.labels[:, 1:] != IGNORED).nonzero()[:, 0].tolist()
        values = losses.detach().tolist()
        bad = sorted({row for row, value in zip(owner, values, strict=True) if not abs(value) < float("inf")})
        if bad:
            raise TrainingError(
                f"The loss of step {step} is not a number.",
                given=", ".join(f"{batch.sources[row]} row {batch.numbers[row]}" for row in bad),
                do="look at these rows; lower the learning rate if earlier steps' losses had risen",
            )
        for row, value in zip(owner, values, strict=True):
            total[batch.sources[row]] += value
            counts[batch.sources[row]] += 1
        (losses.sum() / tokens).backward()
    return Losses(total, counts, rows)
