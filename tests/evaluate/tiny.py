"""A tiny random model with a real processor, and rows with 0, 1 and several pictures."""

from __future__ import annotations

from collections.abc import Sequence

from data.processors import made, picture
from families import CELL, FAMILIES

from tarsia.adapter import Host
from tarsia.data import PICTURE, Message, Picture, Sample

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
