"""Whether an adapter does anything to the questions at hand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tarsia.adapter import Host
from tarsia.core.attach import activate
from tarsia.data import Sample
from tarsia.evaluate.chat import Chat, examined
from tarsia.evaluate.evaluate import active
from tarsia.evaluate.score import only_last


def effects(host: Host, samples: Sequence[Sample]) -> dict[str, float]:
    """For each adapter that acts now, how far the next token's logits move when it alone is left out.

    The largest absolute difference over the vocabulary and ``samples``; 0 means that the adapter changes
    nothing here. The active set is restored.
    """
    names = active(host)
    chat = Chat(host)

    def logits(acting: Sequence[str]) -> list[Tensor]:
        activate(host.model, *acting)
        inputs = (chat.inputs([samples[i] for i in rows], texts) for rows, texts in chat.batches(samples, 8))
        return [chat.model(**batch, **only_last(chat.model, 1)).logits[:, -1].float() for batch in inputs]

    try:
        with examined(host.model):
            whole = logits(names)
            without = {name: logits([n for n in names if n != name]) for name in names}
    finally:
        activate(host.model, *names)
    return {name: max(float((a - b).abs().max()) for a, b in zip(whole, without[name], strict=True)) for name in names}
