"""Steps of training with and without the cache of features, on mini-1 and on a tower as large as its language model.

*twins* is a LLaVA of random weights whose tower and decoder have 14 million parameters each, 144 tokens a picture.
LoRA of rank 8 on the decoder, tower and projector frozen, float32, 1 thread, batches of 4 rows with a picture each,
epochs of 8 pictures. In each round: an epoch without a cache, a first one that fills an empty folder (its first steps
also prove, which computes their pictures twice), a second one that finds everything. Ratios are medians over rounds, of
the processor's time and of the clock's: other work on the machine moves the latter, waiting for a disk only the latter.
*tower* and *look-up* are the pass to the projector's output, apart, for one picture. The gradient's difference is a
share of its 2-norm.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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

ROUNDS: Final = 5
PICTURES, BATCH, WORDS = 8, 4, 48
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


def timed(act: Callable[[], T]) -> tuple[Tensor, T]:
    """Seconds of the processor and of the clock [2], and what came out."""
    began = (time.process_time(), time.perf_counter())
    result = act()
    ended = (time.process_time(), time.perf_counter())
    return torch.tensor(ended, dtype=torch.float64) - torch.tensor(began, dtype=torch.float64), result


@contextmanager
def prepared(host: Host) -> Iterator[list[dict[str, Tensor]]]:
    """The host with a patch on each linear layer of its decoder, once through an epoch."""
    attach(host.model, host.sites, [Part("lora", "language.*.{q,k,v,o,gate,up,down}", find("lora").configure({}))])
    rows = batches(host)
    epoch(host, rows)
    yield rows


def look(host: Host, rows: list[dict[str, Tensor]]) -> Tensor:
    """Seconds [2] of one picture's way to the projector's output."""
    model: Any = host.model
    with torch.no_grad():
        seconds, _ = timed(lambda: [model.model.get_image_features(r["pixel_values"]) for r in rows])
    return seconds / PICTURES


def middle(seconds: list[Tensor]) -> list[float]:
    """Medians of both columns."""
    return [round(value, 6) for value in torch.stack(seconds).quantile(0.5, 0).tolist()]


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
        "no cache s": middle(without)[0],
        "first epoch / no cache": middle(first)[0],
        "first by the clock": middle(first)[1],
        "second epoch / no cache": middle(second)[0],
        "second by the clock": middle(second)[1],
        "tower ms": round(1e3 * middle(towers)[0], 3),
        "look-up ms": round(1e3 * middle(looks)[0], 3),
        "look-up ms by the clock": round(1e3 * middle(looks)[1], 3),
        "bytes a picture": int(report["bytes_per_picture"]),
        "loss differs by": f"{max(loss for loss, _ in gaps):.1e}",
        "gradient differs by": f"{max(gradient for _, gradient in gaps):.1e}",
    }


def measure() -> Values:
    """Both models."""
    with threads(1):
        return {"mini-1": compare(open_base("mini-1")), "twins": compare(twins())}
