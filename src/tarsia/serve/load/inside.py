"""The same load on an engine in this process: what the engine does by itself, without HTTP and a worker around it."""

from __future__ import annotations

import gc
import hashlib
import io
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import torch
from PIL import Image

from tarsia.adapter import Host
from tarsia.core.errors import ServeError
from tarsia.serve.engine import Engine
from tarsia.serve.load.asked import WORDS, picture
from tarsia.serve.request import Picture, Prompt, Request, Sampling

_LATEST: Final = 0.002
"""Seconds that are slept where all that waits waits for an adapter."""


@dataclass(frozen=True, slots=True)
class Text:
    """A question before it is read: words, and the number of its picture (None: none)."""

    words: str
    picture: int | None = None


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of some requests: seconds from the first submission to the last token, and each answer's ids."""

    seconds: float
    ids: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.ids))

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def texts(number: int, rows: int, words: int, pictured: bool) -> list[Text]:
    """Questions that nobody has asked before, for a round of this number: nothing of them is in any cache."""
    drawn = random.Random(f"round {number}")
    vocabulary = WORDS.split()
    return [
        Text(
            " ".join([str(number * rows + i), *drawn.choices(vocabulary, k=words)]),
            number * rows + i if pictured else None,
        )
        for i in range(rows)
    ]


def shown(host: Host, asked: Text) -> tuple[str, list[Image.Image]]:
    """The question as the chat template writes it, and its pictures."""
    parts: list[dict[str, Any]] = [] if asked.picture is None else [{"type": "image"}]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": asked.words}]}
    written: str = host.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    pictures = [] if asked.picture is None else [Image.open(io.BytesIO(picture(asked.picture))).convert("RGB")]
    return written, pictures


def encoded(host: Host, asked: Text) -> Prompt:
    """The question as the engine takes it."""
    written, pictures = shown(host, asked)
    given = dict(host.processor(text=[written], images=pictures or None, return_tensors="pt"))
    ids = given.pop("input_ids")
    given.pop("attention_mask", None)
    marks = {name: value for name, value in given.items() if value.shape == ids.shape}
    inputs = {name: value for name, value in given.items() if name not in marks}
    if bool(pictures) != bool(inputs):
        raise ServeError("internal", "A picture came to no numbers, or numbers to no picture.", given=", ".join(inputs))
    total = hashlib.sha256()
    for value in inputs.values():
        total.update(value.contiguous().numpy().tobytes())
    kept = (Picture(total.digest(), inputs),) if inputs else ()
    return Prompt(tuple(ids[0].tolist()), kept, marks)


_numbers = count()


def run(engine: Engine, prompts: Sequence[Prompt], adapters: Sequence[str | None], tokens: int) -> Ran:
    """Submit all of them at once, and step until each has said ``tokens`` tokens, whatever these are; greedy.

    Raises the error of a request that fails.
    """
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_end=True)
    asked = [
        Request(f"load-{next(_numbers)}", prompt, adapter, sampling)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    ids: dict[str, list[int]] = {request.id: [] for request in asked}
    gc.collect()
    began = time.perf_counter()
    for request in asked:
        engine.submit(request)
    while not engine.idle:
        events = engine.step()
        for event in events:
            if event.kind == "failed":
                raise event.data["error"]
            if event.kind == "text":
                ids[event.id] += event.data["ids"]
        if not events and not engine.stats()["running"]:
            time.sleep(_LATEST)
    return Ran(time.perf_counter() - began, tuple(tuple(ids[request.id]) for request in asked))


@torch.inference_mode()
def plainly(host: Host, asked: Sequence[Text], tokens: int, **options: Any) -> Ran:
    """The same questions through Transformers' own ``generate``, as one batch padded on the left, with what acts now.

    ``options`` go to ``generate``.
    """
    return generated(host, host.model, asked, tokens, **options)


@torch.inference_mode()
def generated(host: Host, model: Any, asked: Sequence[Text], tokens: int, **options: Any) -> Ran:
    """As ``plainly``, of a model that wraps the host's; only ``generate`` itself is timed."""
    from transformers import GenerationConfig

    pairs = [shown(host, one) for one in asked]
    pictures = [image for _, held in pairs for image in held]
    tokenizer = host.processor.tokenizer
    kept, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = dict(
            host.processor(
                text=[written for written, _ in pairs], images=pictures or None, return_tensors="pt", padding=True
            )
        )
    finally:
        tokenizer.padding_side = kept
    inputs = {name: value.to(host.model.device) for name, value in inputs.items()}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    wanted = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=pad, eos_token_id=None)
    before, model.generation_config = model.generation_config, wanted
    own, host.model.generation_config = host.model.generation_config, wanted
    gc.collect()
    try:
        began = time.perf_counter()
        said = model.generate(**inputs, **options)
        seconds = time.perf_counter() - began
    finally:
        model.generation_config, host.model.generation_config = before, own
    return Ran(seconds, tuple(map(tuple, said[:, inputs["input_ids"].shape[1] :].tolist())))
