"""A vision-language model of 65 to 70 billion parameters by its configuration, processor and one row: no weights."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.grid.rows import drawn
from bench.grid.words import TEMPLATE, tokenizer
from bench.grid.worlds import FAMILIES, World

LLAMA_70B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
CLIP_L: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def base(folder: Path, text: Mapping[str, Any] = LLAMA_70B, tower: Mapping[str, Any] = CLIP_L) -> Path:
    """LLaVA's configuration and processor with a language model and a tower of these sizes, in ``folder``/base."""
    import transformers

    family = FAMILIES["llava"]
    words = tokenizer(text["vocab_size"], family.marks, family.named, family.bos)
    world = World("llava", text["vocab_size"], 64, 64, 2, 2, 2, 64, 2, 2, 336, tied=False)
    processor = family.processor(world, words)
    side = tower["image_size"]
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    processor.chat_template = TEMPLATE.replace("MARK", family.marker)
    config = transformers.LlavaConfig(
        vision_config=dict(tower),
        text_config={**text, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // tower["patch_size"]) ** 2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder / "base"


def recipe(folder: Path, tokens: int = 1024, **values: Any) -> Path:
    """One QLoRA recipe on ``base``: batch 1, one picture, about ``tokens`` tokens in a row."""
    import yaml

    chance = random.Random(0)
    drawn(chance, 336).save(folder / "picture.png")
    answer = " ".join("a" for _ in range(max(1, tokens - 576 - 30)))
    line = {"images": ["picture.png"], "question": "what is this", "answer": answer}
    (folder / "rows.jsonl").write_text(json.dumps(line) + "\n", encoding="utf8")
    whole = {
        "model": str(folder / "base"),
        "parts": [{"method": "lora", "select": "language", "rank": 16, "lr": 1e-4}],
        "data": {"train": [{"path": str(folder / "rows.jsonl")}]},
        "four_bits": {"kind": "nf4", "nested": True},
        "precision": "bfloat16",
        "batch": 1,
        "steps": 3,
        "device": "cpu",
        "out": str(folder / "out"),
        **values,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf8")
    return path
