"""A tiny random model with a real processor, and rows with 0, 1 and several pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from data.processors import made, picture
from families import CELL, FAMILIES

from tarsia.adapter import Adapter, Host, open_base, save
from tarsia.core.attach import Part, attach, patches
from tarsia.data import PICTURE, Message, Picture, Sample
from tarsia.methods.lora import LoRAConfig

ANSWERS = ("a cat", "a dog", "red", "red and green", "a bird, a ship", "4", "")


def host(seed: int = 0, template: str = "chatml", **overrides: object) -> Host:
    """A LLaVA whose processor writes 16 image tokens a picture."""
    processor = made("llava", template)
    processor.patch_size = CELL
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    options = {"text_config": text, "image_token_index": processor.image_token_id, **overrides}
    model, _ = FAMILIES["llava"].build(seed, **options)
    return Host.of(model, processor=processor)


def write_base(folder: Path, host: Host) -> None:
    """Write the model with its processor, as a base that commands open."""
    host.model.save_pretrained(folder)
    host.processor.save_pretrained(folder)


def write_adapter(base: Path, folder: Path, size: float) -> None:
    """A LoRA on the language model; ``size`` 0 is one that was never trained."""
    host = open_base(str(base))
    part = Part("lora", "language.*.{q,v}", LoRAConfig(rank=2, alpha=4))
    attach(host.model, host.sites, [part], name="made", seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for patch in patches(host.model, "made").values():
            for parameter in patch.parameters():
                if not parameter.any():
                    parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    save(Adapter.of(host, "made", [part]), folder)


def sample(question: str, answer: str, pictures: int = 0, row: int = 0, source: str = "tests") -> Sample:
    """One row of one turn, its pictures all different."""
    shown = tuple(Picture(picture(shade=7 * row + i + 1), f"drawn {i}", source, row) for i in range(pictures))
    asked = Message("user", (*(PICTURE for _ in shown), question))
    return Sample((asked, Message("assistant", (answer,))), shown, source, row)


def rows(count: int = 7, pictures: Sequence[int] = (0, 1, 3, 1), source: str = "tests") -> tuple[Sample, ...]:
    """Questions of unequal length, answers from ANSWERS but the empty one."""
    return tuple(
        sample("what is this? " * (1 + i % 3), ANSWERS[i % (len(ANSWERS) - 1)], pictures[i % len(pictures)], i, source)
        for i in range(count)
    )
