"""A tokenizer of any size without training one, and a chat template that every family here can have."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

CONTROLS: Final = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
SPACE: Final = "Ġ"
"""How byte-level tokenizers spell a space."""

_TURN: Final = "{{ '<|im_start|>' + m['role'] + '\n' }}"
_PART: Final = "{% if c['type'] == 'image' %}MARK{% else %}{{ c['text'] }}{% endif %}"
TEMPLATE: Final = (
    "{% for m in messages %}"
    + _TURN
    + "{% for c in m['content'] %}"
    + _PART
    + "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML; a picture's marker stands where MARK does."""


def pieces(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """``count`` entries of a byte-level BPE above its bytes, and the merges that make them: pairs, then triples.

    Which pairs of pieces there are is drawn, always the same for one ``count``.
    """
    chance = random.Random(count)
    letters = [*string.ascii_lowercase, SPACE]
    merges = [(a, b) for a, b in product(letters, letters) if b != SPACE]
    known = [a + b for a, b in merges]
    chance.shuffle(merges)
    merges, made = merges[:count], {a + b for a, b in merges[:count]}
    while len(merges) < count:
        a, b = chance.choice(known), chance.choice(letters[:-1])
        if a + b not in made:
            merges.append((a, b))
            made.add(a + b)
            known.append(a + b)
    return [a + b for a, b in merges], merges


def tokenizer(size: int, marks: Sequence[str], named: Mapping[str, str], bos: bool) -> Any:
    """A byte-level BPE with exactly ``size`` entries, its controls and ``marks`` first.

    ``named`` are the tokenizer's special tokens by attribute, ``bos`` whether it begins a text with one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [*CONTROLS, *marks]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries, merges = pieces(size - len(special) - len(alphabet))
    vocabulary = {entry: number for number, entry in enumerate([*special, *alphabet, *entries])}
    if len(vocabulary) != size:
        raise ValueError(f"{len(vocabulary)} entries of {size}")
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.add_special_tokens(special)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    steps = [processors.ByteLevel(trim_offsets=False), *([first] if bos else [])]
    made.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=dict(named)
    )
