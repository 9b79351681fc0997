"""How far an adapter moves what its base would say next, where it should move nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from pydantic import BaseModel
from torch import Tensor

from tarsia.adapter import Host
from tarsia.core.attach import activate
from tarsia.core.errors import DataError
from tarsia.data import Sample
from tarsia.evaluate import score
from tarsia.evaluate.bootstrap import Interval, ratio
from tarsia.evaluate.chat import Chat, examined
from tarsia.evaluate.evaluate import active
from tarsia.evaluate.report import FROZEN

REFERENCES: Final = "the references"
OWN: Final = "the base's own answers"

_ROUNDING: Final = 1e-4  # nats a token that a divergence may seem to be below 0
_HELD: Final = 4  # tensors of logits that live at once: both models' and the products of both


class Divergence(BaseModel):
    """One source: the base against base and adapters, both made to say the same answers.

    ``kl`` is KL(base || adapted) = sum_v p_base(v) ln(p_base(v) / p_adapted(v)) in nats, the mean over the answers'
    ``tokens``, the end of the turn included; ``agreement`` the share of tokens at which both models' likeliest next
    token is the same. Their intervals draw rows. ``each`` is every row's own mean KL, in the source's order, None where
    the row is not counted. ``forced`` says which answers: the rows' references, or what the base itself says.
    """

    model_config = FROZEN

    source: str
    forced: str
    tokens: int
    kl: Interval
    agreement: Interval
    each: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Apart:
    """One row and one answer: the sum of KL over its tokens, how many of them agree, and how many there are."""

    kl: float
    agreed: int
    tokens: int


def apart(host: Host, samples: Sequence[Sample], answers: Sequence[score.Ids], batch: int = 16) -> tuple[Apart, ...]:
    """The base against base and acting adapters, made to say ``answers[i]`` (one id or more) to sample i's question.

    Each batch is encoded once and read by both models in turn; only positions that predict an answer's token go
    through the language head, and only as many rows at a time as their logits leave room for. The active set is
    restored. Raises DataError where a divergence is no number.
    """
    if not samples:
        return ()
    names = active(host)
    chat = Chat(host)
    found: dict[int, Apart] = {}
    size = min(batch, score.room(chat.model, _HELD * (1 + max(map(len, answers)))))
    try:
        with examined(host.model):
            for rows, texts in chat.batches(samples, size):
                inputs = chat.inputs([samples[i] for i in rows], texts)
                mine = [answers[i] for i in rows]
                activate(host.model)
                base, real, _ = score.forced(chat.model, inputs, mine)
                activate(host.model, *names)
                adapted, _, _ = score.forced(chat.model, inputs, mine)
                found.update(zip(rows, compared(base, adapted, real), strict=True))
    finally:
        activate(host.model, *names)
    for i, row in found.items():
        if not math.isfinite(row.kl):
            raise DataError(f"The divergence of row {samples[i].row} of {samples[i].source} is no number.")
    return tuple(found[i] for i in range(len(samples)))


def compared(base: Tensor, adapted: Tensor, real: Tensor) -> list[Apart]:
    """For each row of two models' logits [rows, tokens, vocabulary], over its ``real`` [rows, tokens] tokens."""
    p, q = base.log_softmax(-1), adapted.log_softmax(-1)
    # A token that the base rules out (-inf) adds nothing, whatever the other model thinks of it.
    kl = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).double()
    agreed = (base.argmax(-1) == adapted.argmax(-1)) & real
    total = torch.where(real, kl, 0.0).sum(1)
    rows = zip(total.tolist(), agreed.sum(1).tolist(), real.sum(1).tolist(), strict=True)
    return [Apart(max(0.0, k) if k > -_ROUNDING * n else math.nan, a, n) for k, a, n in rows]


def divergence(
    host: Host, sources: Mapping[str, Sequence[Sample]], own: Mapping[str, Sequence[score.Ids]], batch: int = 16
) -> tuple[Divergence, ...]:
    """Of every source, forced on its references and on ``own``, the ids of the base's greedy answers by source.

    What the base says is followed up to a picture's token, which only a question can hold; rows of which nothing
    is left then are not counted.
    """
    chat, found = Chat(host), []
    marker = host.processor.image_token_id
    for name, members in sources.items():
        samples = tuple(members)
        said = [_before(ids, marker) for ids in own[name]]
        references = [chat.choices(sample, ())[-1] for sample in samples]
        forced = apart(host, samples, references, batch)
        # Much of what a base says of what it knows are the references themselves, which are read already.
        counted = [row if ids == references[i] else None for i, (row, ids) in enumerate(zip(forced, said, strict=True))]
        other = [i for i, ids in enumerate(said) if ids and ids != references[i]]
        read = apart(host, [samples[i] for i in other], [said[i] for i in other], batch)
        for i, row in zip(other, read, strict=True):
            counted[i] = row
        for kind, rows in ((REFERENCES, forced), (OWN, counted)):
            if any(rows):
                found.append(_divergence(name, kind, rows))
    return tuple(found)


def _before(ids: score.Ids, marker: int) -> tuple[int, ...]:
    return tuple(ids[: ids.index(marker)] if marker in ids else ids)


def _divergence(source: str, forced: str, rows: Sequence[Apart | None]) -> Divergence:
    counted = [row for row in rows if row is not None]
    tokens = [row.tokens for row in counted]
    return Divergence(
        source=source,
        forced=forced,
        tokens=sum(tokens),
        kl=ratio([row.kl for row in counted], tokens),
        agreement=ratio([row.agreed for row in counted], tokens),
        each=tuple(None if row is None else row.kl / row.tokens for row in rows),
    )
