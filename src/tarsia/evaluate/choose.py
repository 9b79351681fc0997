"""Every answer that may be chosen, scored for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tarsia.adapter import Host
from tarsia.data import Sample
from tarsia.evaluate import score
from tarsia.evaluate.chat import Chat, examined

_PROVED: Final = 8  # answers, the longest, on which packing is held to the plain scoring


@dataclass(frozen=True, slots=True)
class Chances:
    """For each sample, ``found``: float64 [answers + 1], log-probabilities of every answer and, last, of its own
    reference, each with its end of turn; ``tokens``: ids of that reference. ``way``: how they were computed."""

    found: tuple[Tensor, ...]
    tokens: tuple[int, ...]
    way: str


def chances(host: Host, samples: Sequence[Sample], choice: Sequence[str], batch: int = 16) -> Chances:
    """How likely every answer of ``choice`` is to each sample's question, with the adapters that act now.

    Packed scores are held to the plain ones on the first row with the most pictures; where they differ, or the
    model's configuration stands against it, all are computed plainly.
    """
    chat = Chat(host)
    ids = [chat.choices(sample, choice) for sample in samples]
    found: list[Tensor] = [torch.empty(0)] * len(samples)
    with examined(host.model):
        reason = score.obstacle(chat.model) or _difference(chat, samples, ids, batch)
        for rows, texts in chat.batches(samples, batch):
            if reason is not None:
                for i, text in zip(rows, texts, strict=True):
                    found[i] = _plain(chat, samples[i], text, ids[i], batch)
                continue
            size = score.room(chat.model, max(len(score.tree(tuple(ids[i])).tokens) for i in rows))
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                inputs = chat.inputs([samples[i] for i in part], texts[start : start + size])
                for i, scores in zip(part, score.packed(chat.model, inputs, [ids[i] for i in part]), strict=True):
                    found[i] = scores
    way = "packed" if reason is None else f"plain ({reason})"
    return Chances(tuple(scores.cpu() for scores in found), tuple(len(mine[-1]) for mine in ids), way)


def _difference(chat: Chat, samples: Sequence[Sample], ids: Sequence[Sequence[score.Ids]], batch: int) -> str | None:
    """Why packing may not be trusted here: what it gets otherwise than the plain computation, or None."""
    i = max(range(len(samples)), key=lambda n: len(samples[n].pictures))
    text, few = chat.prompt(samples[i]), sorted(ids[i], key=len)[-_PROVED:]
    fast = score.packed(chat.model, chat.inputs([samples[i]], [text]), [few])[0]
    slow = _plain(chat, samples[i], text, few, batch)
    lengths = torch.tensor([len(a) for a in few])
    apart = float(((fast - slow).abs().cpu() / lengths).max())
    return None if apart <= score.tolerance(chat.model) else f"packed scores were {apart:.2g} a token off"


def _plain(chat: Chat, sample: Sample, text: str, answers: Sequence[score.Ids], batch: int) -> Tensor:
    parts = []
    for start in range(0, len(answers), batch):
        some = answers[start : start + batch]
        inputs = chat.inputs([sample] * len(some), [text] * len(some))
        parts.append(score.plain(chat.model, inputs, some))
    return torch.cat(parts)
