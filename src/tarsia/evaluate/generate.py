"""Free answers: greedy, in batches that equal one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import GenerationConfig

from tarsia.adapter import Host
from tarsia.data.samples import Sample
from tarsia.evaluate.chat import Chat, examined


def generate(host: Host, samples: Sequence[Sample], max_new_tokens: int = 32, batch: int = 16) -> tuple[str, ...]:
    """What the host, with the adapters that act now, says to each sample's question: the messages before its
    last answer. Greedy; stops at the end of the turn or after ``max_new_tokens``.
    """
    chat = Chat(host)
    # The model's own generation configuration would add what its makers liked: sampling, penalties.
    wanted = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(chat.ends),
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    said = [""] * len(samples)
    kept = chat.model.generation_config
    try:
        chat.model.generation_config = wanted
        with examined(host.model):
            for rows, texts in chat.batches(samples, batch):
                inputs = chat.inputs([samples[i] for i in rows], texts)
                out = chat.model.generate(**inputs)
                for i, ids in zip(rows, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                    said[i] = chat.decode(ids)
    finally:
        chat.model.generation_config = kept
    return tuple(said)
