"""Adapters that nobody trained: small folders of files like those that training leaves, made in a millisecond."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

RANK, WIDTH, SCALE = 4, 32, 2.0
PATHS = tuple(f"model.language_model.layers.{n}.self_attn.{role}_proj" for n in range(4) for role in "qv")


def adapter(folder: Path, seed: int, base: str = "base-0", rows: int = 100) -> Path:
    """Write a LoRA of rank 4 at 8 sites of 32 x 32, every number of which follows from ``seed``.

    ``base`` names the base and makes its fingerprint; ``rows`` is what the card says of its data.
    """
    random = Random(seed)
    tensors = {}
    for path in PATHS:
        for name, shape in (("lora_A", (RANK, WIDTH)), ("lora_B", (WIDTH, RANK))):
            tensors[f"base_model.model.{path}.{name}.weight"] = shape
    folder.mkdir(parents=True)
    _write(folder / "adapter_model.safetensors", _safetensors(tensors, random))
    _write(folder / "adapter_config.json", _json(_config(base)))
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    _write(
        folder / "tarsia.json", _json(_described(base, seed, rows) | {"sha256": {"adapter_model.safetensors": digest}})
    )
    return folder


def _safetensors(tensors: dict[str, tuple[int, int]], random: Random) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (high, wide) in tensors.items():
        table[key] = {"dtype": "BF16", "shape": [high, wide], "data_offsets": [end, end + 2 * high * wide]}
        end += 2 * high * wide
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    # bfloat16 of about 2^-6 to 2^-5 and either sign: an exponent that all share, mantissas that are random
    body = bytearray(random.randbytes(end))
    body[1::2] = bytes(0x3C | (byte & 0x80) for byte in body[1::2])
    return len(head).to_bytes(8, "little") + head + bytes(body)


def _config(base: str) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "lora_alpha": SCALE * RANK,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": list(PATHS),
    }


def _described(base: str, seed: int, rows: int) -> dict[str, Any]:
    keys = {
        path: {"A": f"base_model.model.{path}.lora_A.weight", "B": f"base_model.model.{path}.lora_B.weight"}
        for path in PATHS
    }
    digest = {
        part: hashlib.sha256(f"{part} of {base}".encode()).hexdigest()
        for part in ("weights", "architecture", "processor", "template")
    }
    config = {"rank": RANK, "alpha": SCALE * RANK, "dropout": 0.0}
    return {
        "format": 1,
        "tarsia": "made",
        "parts": [{"method": "lora", "select": "language.*.{q,v}", "config": config}],
        "patches": {
            path: {"method": "lora", "constants": {"scale": SCALE, "dropout": 0.0}, "tensors": keys[path]}
            for path in PATHS
        },
        "layout": {
            "targets": list(PATHS),
            "saved": [],
            "places": {path: {} for path in PATHS},
            "obstacles": [],
            "lead": [],
        },
        "base": base,
        "fingerprint": {**digest, "weights": f"files:{digest['weights']}", "quantisation": "none"},
        "card": {
            "recipe": {
                "model": base,
                "steps": 100,
                "seed": seed,
                "batch": 8,
                "parts": [{"method": "lora", "lr": 2e-4}],
            },
            "data": {
                "rows": {"sha256": hashlib.sha256(str(rows).encode()).hexdigest(), "rows": rows, "final_loss": 0.5}
            },
            "loss": {"first": 2.0, "final": 0.5, "over_last_steps": 10},
            "gate": {"passed": seed % 10 != 0, "max_forgetting": 1.0, "judged": "mean"},
            "seconds": float(seed % 97),
        },
        "probe": None,
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
