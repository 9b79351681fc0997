"""Adapters of every method for tiny models, trained by nobody and far enough from the base to be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from adapted_families import move
from families import FAMILIES

from tarsia.adapter import Adapter, Host
from tarsia.adapter.proof import probe
from tarsia.core.attach import Part, activate, attach, detach
from tarsia.core.method import METHODS

OPTIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("*", {"rank": 4, "alpha": 4.0}),
    "rslora": ("*", {"rank": 3, "alpha": 4.0}),
    "loraplus": ("*", {"rank": 2, "alpha": 4.0}),
    "pissa": ("language", {"rank": 4, "alpha": 4.0}),
    "dora": ("*", {"rank": 4, "alpha": 4.0}),
    "vera": ("language", {"rank": 8}),
    "ia3": ("*", {}),
    "bitfit": ("*", {}),
    "full": ("projector; language.1..1", {}),
    "oft": ("language", {"block": 8}),
    "houlsby": ("*", {"reduction": 4}),
    "pfeiffer": ("*", {"reduction": 4, "norm": True}),
    "parallel": ("language", {"reduction": 4, "activation": "silu"}),
    "scaled_parallel": ("language", {"reduction": 4, "bias": False}),
    "prompt": ("language", {"length": 3}),
    "prefix": ("language", {"length": 5}),
    "prefix_mlp": ("language", {"length": 4, "inner": 8}),
    "vpt": ("vision", {"length": 12}),
    "vpt_deep": ("vision", {"length": 12}),
}
"""What each method is put on, and how; ``loftq`` is for a base in 4 bits alone."""


@cache
def bare(family: str = "llava") -> Host:
    """A tiny model of a family, to which nobody puts anything that he does not take out."""
    return Host.of(FAMILIES[family].build()[0])


@cache
def workshop(family: str = "llava") -> Host:
    """The same model, another object: adapters are made with it while others are served."""
    return Host.of(FAMILIES[family].build()[0])


def adapter(host: Host, method: str, seed: int = 0, *, proven: Any = None, **options: Any) -> Adapter:
    """An adapter of one method, moved away from the base; ``proven`` is the batch that its probe is made with."""
    origin = options.pop("origin", None)
    select, usual = OPTIONS.get(method, ("*", {}))
    select = options.pop("select", select)
    parts = [Part(method, select, METHODS[method].config(**(dict(usual) | options)))]
    attach(host.model, host.sites, parts, name="made", seed=seed, origin=origin)
    try:
        torch.manual_seed(seed)
        move(host, "made", 0.15)
        with torch.no_grad():
            from tarsia.core.attach import patches

            for patch in patches(host.model, "made").values():
                for parameter in patch.parameters():
                    parameter.mul_(1 + 0.05 * torch.randn(parameter.shape))
        kept = None if proven is None else probe(host, proven)
        return Adapter.of(host, "made", parts, {"seed": seed, "method": method}, probe=kept)
    finally:
        detach(host.model, "made")


def logits(host: Host, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Of a plain call of the model, without a cache."""
    with torch.no_grad():
        found: torch.Tensor = host.model(**inputs, use_cache=False).logits
    return found


__all__ = ["OPTIONS", "activate", "adapter", "bare", "logits"]
