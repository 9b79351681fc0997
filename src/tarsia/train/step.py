"""One optimiser step's loss over all its micro-batches, whichever way its sources are mixed.

With N_s labelled tokens of source s in the whole step, all its micro-batches (and, where a run has several,
all its ranks), whose losses sum to S_s:

- sampled: L = sum_s S_s / sum_s N_s, the mean over all labelled tokens
- weighted: L = sum_s lambda_s * S_s / N_s, with the weights lambda_s adding up to 1

Both are L = sum_s c_s * S_s with one factor c_s for each token of a source: 1 / sum N, or lambda_s / N_s. It
is known before the first forward pass, so that micro-batches add up to the step whatever is in them.

Only positions whose next token is labelled go through the language head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.errors import TrainingError
from tarsia.data.encode import IGNORED, Batch
from tarsia.train.loss import bare_hidden, head_losses
from tarsia.train.memory import Phase, phase


def predicted(labels: Tensor) -> Tensor:
    """Which positions predict a labelled token: bool [lines, length - 1]. A line's first token is predicted by none."""
    return labels[:, 1:] != IGNORED


def learnt(batch: Batch) -> list[int]:
    """The row of each labelled token, in the order of ``token_losses``."""
    labelled = batch.labels != IGNORED
    labelled[:, 0] = False
    return batch.owners_of(labelled)


def named(batches: Sequence[Batch], rows: Sequence[int] | None = None) -> str:
    """The rows as errors name them; ``rows`` picks from a single batch."""
    pairs = [pair for batch in batches for pair in zip(batch.sources, batch.rows, strict=True)]
    return ", ".join(f"row {row} of {source}" for source, row in (pairs if rows is None else [pairs[i] for i in rows]))


@dataclass(frozen=True, slots=True)
class Losses:
    """What each source lost over one step: summed loss in nats, labelled tokens, rows."""

    total: Mapping[str, float]
    tokens: Mapping[str, int]
    rows: Mapping[str, int]
    factors: Mapping[str, float]
    """c_s: how much one labelled token of the source counts in the step's loss."""

    @property
    def loss(self) -> float:
        """The step's loss L, the number that is minimised."""
        return sum(self.contributions.values())

    @property
    def means(self) -> dict[str, float]:
        """Mean over each source's labelled tokens."""
        return {source: total / self.tokens[source] for source, total in self.total.items() if self.tokens[source]}

    @property
    def contributions(self) -> dict[str, float]:
        """What each source adds to the step's loss, c_s * S_s; they add up to ``loss``.

        A source's *loss share* is its contribution divided by the loss: over one step, or over many, sum by
        sum. It is the share of what is minimised, not of the weight: a source with lambda 0.1 whose answers are
        known by heart has next to none of it.
        """
        return {source: factor * self.total[source] for source, factor in self.factors.items()}


def loss_shares(contributions: Mapping[str, float]) -> dict[str, float]:
    """Each source's loss share (see ``Losses.contributions``); all are 0 where nothing is lost any more."""
    whole = sum(contributions.values())
    return {source: value / whole if whole else 0.0 for source, value in contributions.items()}


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
    """Cross-entropy of each labelled token in float32, in nats, rows in order: [n].

    Without logits of the whole batch where the head is a plain frozen one (``tarsia.train.loss``).
    """
    targets = labels[:, 1:][predicted(labels)]
    hidden = bare_hidden(model, partial(only_predicting, model, labels), inputs)
    if hidden is not None:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        return head_losses(hidden[0], head.weight, head.bias, targets.to(hidden.device))
    with only_predicting(model, labels):
        logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits[0].float(), targets.to(logits.device), reduction="none")


def counted(batches: Sequence[Batch], step: int, weights: Mapping[str, float] | None) -> dict[str, int]:
    """Labelled tokens of each source over all micro-batches of one step.

    Raises TrainingError, naming step and rows, where no token is labelled, or where one of the sources in
    ``weights`` has none and so no mean.
    """
    tokens = dict.fromkeys((source for batch in batches for source in batch.sources), 0)
    for batch in batches:
        for row in learnt(batch):
            tokens[batch.sources[row]] += 1
    if not any(tokens.values()):
        raise TrainingError(f"Step {step} has no labelled token.", given=named(batches), do="look at their answers")
    missing = [source for source, weight in (weights or {}).items() if weight and not tokens.get(source)]
    if missing:
        raise TrainingError(
            f"Step {step} has no labelled token of {', '.join(missing)}, so no mean to weigh.",
            given=named(batches),
            do="look at these rows' answers, or give these sources more rows of a step",
        )
    return tokens


def backward(
    model: nn.Module, batches: Sequence[Batch], step: int, weights: Mapping[str, float] | None = None
) -> Losses:
    """Add the gradient of the step's loss to the parameters. Returns what each source lost.

    With ``weights``, which add up to 1, in the weighted mode. Raises TrainingError, naming step and rows, where
    no token is labelled, a weighted source has none, or a loss is not a finite number.
    """
    tokens = counted(batches, step, weights)
    if weights is None:
        factors = dict.fromkeys(tokens, 1 / sum(tokens.values()))
    else:
        factors = {source: weights[source] / count for source, count in tokens.items() if count}
    total = dict.fromkeys(tokens, 0.0)
    for batch in batches:
        owners = [batch.sources[row] for row in learnt(batch)]
        if not owners:
            continue
        phase(Phase.FORWARD)
        losses = token_losses(model, batch.inputs, batch.labels)
        phase(Phase.BACKWARD)
        for source, value in zip(owners, _finite(losses, batch, step), strict=True):
            total[source] += value
        if losses.requires_grad:  # rows without pictures reach nothing where tower or projector alone is trained
            (losses * losses.new_tensor([factors[source] for source in owners])).sum().backward()
    return Losses(total, tokens, Counter(source for batch in batches for source in batch.sources), factors)


def _finite(losses: Tensor, batch: Batch, step: int) -> list[float]:
    """The tokens' losses as numbers. Raises TrainingError, naming step and rows, where one is none."""
    values: list[float] = losses.detach().tolist()
    bad = sorted({row for row, value in zip(learnt(batch), values, strict=True) if not math.isfinite(value)})
    if bad:
        raise TrainingError(
            f"The loss of step {step} is not a number.",
            given=named([batch], bad),
            do="look at these rows; if the loss had risen before, lower the learning rates",
        )
    return values
