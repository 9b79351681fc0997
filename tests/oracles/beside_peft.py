"""What the oracles of PEFT share: a base, an adapter that was moved and saved, and its outputs in PEFT and here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from families import Family
from torch import Tensor, nn

from tarsia.adapter import Adapter, Host, load, put, save
from tarsia.core.attach import Part, attach, patches

LIMIT = 1e-5
MOVED = 0.1
SOME = ["llava", "qwen2_5_vl", "gemma3"]
"""Families for what knows no family, such as how a file is written."""


def batch(family: Family) -> dict[str, Tensor]:
    """Rows of the family with one picture and more, and without one where it takes that."""
    found: dict[str, Tensor] = family.batch((1, 2) if not family.text_only else (0, 1, 3))
    return found


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def move(tensors: Iterable[Tensor], size: float = 0.05) -> None:
    """Add noise, as a training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))


def learnt(host: Host, name: str = "default") -> list[nn.Parameter]:
    return [p for patch in patches(host.model, name).values() for p in patch.parameters()]


class Saved(NamedTuple):
    """An adapter whose files were written: the base's logits on the inputs, and the adapted ones."""

    inputs: dict[str, Tensor]
    base: Tensor
    adapted: Tensor
    adapter: Adapter


def saved(family: Family, parts: Sequence[Part], folder: Path, size: float = 0.05) -> Saved:
    """Attach, which changes nothing yet, move every trained tensor, and save."""
    host, inputs = Host.of(family.build()[0]), batch(family)
    base = logits(host.model, inputs)
    attach(host.model, host.sites, parts)
    assert (logits(host.model, inputs) - base).abs().max() <= 1e-6
    move(learnt(host), size)
    adapter = Adapter.of(host, "default", parts)
    save(adapter, folder)
    return Saved(inputs, base, logits(host.model, inputs), adapter)


def in_peft(family: Family, folder: Path) -> Any:
    """The family's model with the folder's adapter in it, by PEFT."""
    return peft.PeftModel.from_pretrained(family.build()[0], folder).eval()


def here(family: Family, folder: Path) -> Any:
    """The family's model with the folder's adapter in it, by Tarsia."""
    host = Host.of(family.build()[0])
    put(host, load(folder, host), "read")
    return host.model
