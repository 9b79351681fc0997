"""Who takes part in ``bench/cases/step.py``: the same step of the same model, in Tarsia and in what others use.

All load ``bench.smol``'s model, train low-rank updates of the same rank on the same sites from the same first values,
see the same batch, clip the gradient to 1 and step with AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.race import Step

IGNORED = -100
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
RATE = 2e-4


def batch(folder: Path, rows: int = 4, length: int = 256, labelled: float = 0.3) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels [rows, length]: a picture, a question, an answer; ``labelled`` is the answers' share."""
    from transformers import AutoTokenizer

    from bench.smol import IMAGE, PATCHES, TOWERS

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer((Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf8"))["input_ids"]
    picture = [tokenizer.convert_tokens_to_ids(IMAGE)] * PATCHES
    ids = torch.tensor([picture + text[n * length : (n + 1) * length - PATCHES] for n in range(rows)])
    labels = torch.full_like(ids, IGNORED)
    total, done = math.floor(labelled * rows * length), 0
    for row in range(rows):
        count = (total - done) // (rows - row)
        labels[row, -count:] = ids[row, -count:]
        done += count
    side = TOWERS[folder.name]["image_size"]
    pixels = torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs, labels


def first(shape: tuple[int, int], name: str) -> Tensor:
    """The first value of A [rank, in] at the site of this name, for every contestant the same."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])


_OPEN = ExitStack()


def _forever(context: AbstractContextManager[Any]) -> None:
    """Stay inside ``context`` as long as the process lasts."""
    _OPEN.enter_context(context)


def tarsia(folder: str, rank: int = 16, method: str = "lora", cache: str | None = None) -> Step:
    """What ``tarsia.train.loop`` does in one step, on a batch that is there."""
    from tarsia.adapter import open_base
    from tarsia.core.attach import Part, attach, patches
    from tarsia.core.method import find
    from tarsia.data import Batch
    from tarsia.train.exact import deterministic
    from tarsia.train.features import features
    from tarsia.train.heap import kept_heap
    from tarsia.train.lean import lean
    from tarsia.train.optimiser import adamw
    from tarsia.train.step import backward
    from tarsia.train.store import Store

    host = open_base(folder, processor=False)
    options: dict[str, Any] = {"rank": rank, "alpha": 2.0 * rank} if method == "lora" else {}
    select = f"language.*.{{{','.join(ROLES)}}}"
    attach(host.model, host.sites, [Part(method, select, find(method).configure(options))], name="bench")
    made = patches(host.model, "bench")
    if method == "lora":
        with torch.no_grad():
            for site, patch in made.items():
                held: Any = patch
                held.A.copy_(first(held.A.shape, site.path))
    named: Mapping[str, nn.Parameter] = {
        f"{site.path}/{key}": p for site, patch in made.items() for key, p in patch.named_parameters()
    }
    inputs, labels = batch(Path(folder))
    rows = len(labels)
    whole = Batch(inputs, labels, (1,) * rows, ("bench",) * rows, tuple(range(rows)))
    optimiser = adamw([named], [RATE], (0.9, 0.999), 0.0)
    host.model.train()
    if cache is not None:
        _forever(features(host, Store(Path(cache), 2**30)))
    _forever(lean(host.model))
    _forever(kept_heap())

    def step() -> float:
        with deterministic(torch.device("cpu")):
            losses = backward(host.model, [whole], 1)
            nn.utils.clip_grad_norm_(named.values(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return losses.loss

    return step


def peft(folder: str, rank: int = 16) -> Step:
    """PEFT over Transformers, whose model computes the loss from labels that it is given."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    names = "|".join({"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}.get(r, f"{r}_proj") for r in ROLES)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=rf".*language_model\..*\.({names})")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                site = name.removeprefix("base_model.model.").partition(".lora_A")[0]
                parameter.copy_(first(tuple(parameter.shape), site))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    inputs, labels = batch(Path(folder))
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    adapted.train()

    def step() -> float:
        loss = adapted(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def loss_layer(kind: str, rows: int = 2048, width: int = 576, vocabulary: int = 49152, labelled: float = 0.3) -> Step:
    """Head and loss alone, forward and backward: ``chunks`` of labelled positions, or ``all`` positions' logits."""
    from tarsia.train.loss import head_losses

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = 0.05 * torch.randn(vocabulary, width, generator=generator)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) > labelled] = IGNORED

    def step() -> float:
        hidden.grad = None
        if kind == "chunks":
            wanted = labels != IGNORED
            loss = head_losses(hidden[wanted], weight, None, labels[wanted]).mean()
        else:
            loss = nn.functional.cross_entropy(nn.functional.linear(hidden, weight), labels, ignore_index=IGNORED)
        loss.backward()
        return float(loss.detach())

    return step
