"""Adapters made of nothing but numbers: no model is built for them."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from tarsia.adapter import Adapter, Fingerprint, Patched, Probe
from tarsia.adapter.layout import Layout
from tarsia.core.attach import Part
from tarsia.methods.lora import LoRAConfig

SITES = tuple(f"model.language_model.layers.{n}.self_attn.{kind}_proj" for n in (0, 1) for kind in "qv")
OWN = "PEFT has no place for it"


def fingerprint(mark: str = "a") -> Fingerprint:
    """Of a base that is nowhere."""
    return Fingerprint("files:" + mark * 64, mark * 64, "none", mark * 64, mark * 64)


def adapter(seed: int = 0, *, peft: bool = True, probed: bool = True, card: dict[str, Any] | None = None) -> Adapter:
    """LoRA of rank 2 at four sites of width 8, in the form that PEFT reads or in our own."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    patches = {
        path: Patched(
            "lora",
            MappingProxyType({"scale": 2.0 + seed, "dropout": 0.05}),
            MappingProxyType({"A": drawn(2, 8), "B": drawn(8, 2)}),
        )
        for path in SITES
    }
    probe = Probe(
        {"input_ids": torch.arange(6)[None]}, torch.arange(24).view(1, 6, 4), drawn(1, 6, 4), 0.5, 9.0, "float32"
    )
    return Adapter(
        parts=(Part("lora", "language.*.{q,v}", LoRAConfig(rank=2, alpha=4.0)),),
        patches=MappingProxyType(patches),
        layout=Layout(SITES if peft else (), (), {}, () if peft else (OWN,)),
        base="owner/base",
        fingerprint=fingerprint(),
        card=MappingProxyType({"note": "ärmel", "seed": seed, **(card or {})}),
        probe=probe if probed else None,
    )


def same(a: Adapter, b: Adapter) -> bool:
    """Whether two adapters are one value, to the bit."""
    if (a.parts, dict(a.card), a.base, a.fingerprint) != (b.parts, dict(b.card), b.base, b.fingerprint):
        return False
    if a.patches.keys() != b.patches.keys() or (a.probe is None) != (b.probe is None):
        return False
    return all(
        (one.method, dict(one.constants)) == (b.patches[path].method, dict(b.patches[path].constants))
        and one.tensors.keys() == b.patches[path].tensors.keys()
        and all(torch.equal(value, b.patches[path].tensors[name]) for name, value in one.tensors.items())
        for path, one in a.patches.items()
    )
