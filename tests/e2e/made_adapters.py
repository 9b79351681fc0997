"""A tiny base in a folder, and adapters of it that move its outputs, saved with their probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tarsia.adapter import Adapter, Host, probe, save
from tarsia.core.attach import Part, attach, detach, patches
from tarsia.core.method import METHODS

Parts = Sequence[tuple[str, str, Mapping[str, Any]]]
"""Method, selection and options of each part."""


def batch(host: Host) -> dict[str, Any]:
    """One row with a picture and one without, as the processor gives them."""
    shown = Image.new("RGB", (16, 16), (200, 40, 90))
    texts = [f"{host.processor.image_token} what is this ?", "which colour is it ?"]
    return dict(host.processor(text=texts, images=[shown], return_tensors="pt", padding=True))


def made(host: Host, parts: Parts, seed: int = 0, size: float = 0.1, probed: bool = True) -> Adapter:
    """An adapter whose every tensor was moved, out of ``host``, which is left bare."""
    every = [Part(method, select, METHODS[method].config(**options)) for method, select, options in parts]
    attach(host.model, host.sites, every, name="made")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for patch in patches(host.model, "made").values():
            for parameter in patch.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    adapter = Adapter.of(host, "made", every, probe=probe(host, batch(host)) if probed else None)
    detach(host.model, "made")
    return adapter


def saved(host: Host, folder: Path, parts: Parts, seed: int = 0, size: float = 0.1, probed: bool = True) -> Path:
    """The same, written into ``folder``."""
    save(made(host, parts, seed, size, probed), folder)
    return folder
