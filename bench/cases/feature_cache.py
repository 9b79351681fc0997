"""Steps of training with and without the cache of features, on mini-1 and on a tower as large as its language model.

*twins* is a LLaVA of random weights whose tower and decoder have 14 million parameters each, 144 tokens a picture.
LoRA of rank 8 on the decoder, tower and projector frozen, float32, 1 thread, batches of 4 rows with a picture each,
epochs of 16 pictures. In each round: an epoch without a cache, a first one that fills an empty folder (its first steps
also prove, which computes their pictures twice), a second one that finds everything. Ratios are medians over rounds.
*tower* and *look-up* are the pass to the projector's output, apart, for one picture. The gradient's difference is a
share of its 2-norm.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from bench.run import Values
from tarsia.adapter import Host, open_base
from tarsia.core.attach import Part, attach
from tarsia.core.method import find
from tarsia.train.exact import threads
from tarsia.train.features import features
from tarsia.train.store import Store

ROUNDS: Final = 7
PICTURES, BATCH, WORDS = 16, 4, 48
LIMIT: Final = 10**9

Result = tuple[list[float], Tensor]
T = TypeVar("T")


def twins() -> Host:
    """A LLaVA of random weights; tower and decoder are of one size."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    size = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6}
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 192, "patch_size": 16}
    config = LlavaConfig(
        vision_config={**vision, **size, "intermediate_size": 1536},
        text_config={"model_type": "llama", "vocab_size": 1000, **size, "intermediate_size": 1024},
        image_token_index=999,
        image_seq_length=144,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return Host.of(LlavaForConditionalGeneration(config))


def batches(host: Host) -> list[dict[str, Tensor]]:
    """Rows of a random picture and random words each."""
    config = host.anatomy.config
    side, cell = config.vision_config.image_size, config.vision_config.patch_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(PICTURES, 3, side, side, generator=generator)
    words = torch.randint(10, 60, (PICTURES, WORDS), generator=generator)
    ids = torch.cat([torch.full((PICTURES, (side // cell) ** 2), config.image_token_id), words], 1)
    starts = range(0, PICTURES, BATCH)
    return [{"input_ids": ids[i : i + BATCH], "pixel_values": pixels[i : i + BATCH]} for i in starts]


def epoch(host: Host, rows: list[dict[str, Tensor]]) -> Result:
    """Forward and backward of every batch. Returns the losses, and the last gradient as one vector."""
    losses = []
    for inputs in rows:
        host.model.zero_grad()
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == host.anatomy.config.image_token_id, -100)
        loss = host.model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
    gradients = [p.grad.flatten() for p in host.model.parameters() if p.grad is not None]
    return losses, torch.cat(gradients)


def timed(act: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what came out."""
    began = time.perf_counter()
    result = act()
    return time.perf_counter() - began, result


@contextmanager
def prepared(host: Host) -> Iterator[list[dict[str, Tensor]]]:
    """The host with a patch on each linear layer of its decoder, once through an epoch."""
    attach(host.model, host.sites, [Part("lora", "language.*.{q,k,v,o,gate,up,down}", find("lora").configure({}))])
    rows = batches(host)
    epoch(host, rows)
    yield rows


def look(host: Host, rows: list[dict[str, Tensor]]) -> float:
    """Seconds of one picture's way to the projector's output."""
    model: Any = host.model
    with torch.no_grad():
        seconds, _ = timed(lambda: [model.model.get_image_features(r["pixel_values"]) for r in rows])
    return seconds / PICTURES


def compare(host: Host) -> dict[str, float | int | str]:
    """One row of the table."""
    first, second, without, towers, looks = [], [], [], [], []
    gaps: list[tuple[float, float]] = []
    with prepared(host) as rows:
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                off, plain = timed(lambda: epoch(host, rows))
                towers.append(look(host, rows))
                with features(host, Store(Path(folder), LIMIT)) as cache:
                    cold, _ = timed(lambda: epoch(host, rows))
                    warm, kept = timed(lambda: epoch(host, rows))
                    looks.append(look(host, rows))
                    report = cache.report()
            without.append(off)
            first.append(cold / off)
            second.append(warm / off)
            apart = float((plain[1] - kept[1]).norm() / plain[1].norm())
            gaps.append((max(abs(a - b) for a, b in zip(plain[0], kept[0], strict=True)), apart))
    return {
        "no cache s": round(median(without), 4),
        "first epoch / no cache": round(median(first), 3),
        "second epoch / no cache": round(median(second), 3),
        "tower ms": round(1e3 * median(towers), 3),
        "look-up ms": round(1e3 * median(looks), 3),
        "bytes a picture": int(report["bytes_per_picture"]),
        "loss differs by": f"{max(loss for loss, _ in gaps):.1e}",
        "gradient differs by": f"{max(gradient for _, gradient in gaps):.1e}",
    }


def measure() -> Values:
    """Both models."""
    with threads(1):
        return {"mini-1": compare(open_base("mini-1")), "twins": compare(twins())}
