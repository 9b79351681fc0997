"""Bases on disk, and adapters on them that move their outputs."""

from __future__ import annotations

from pathlib import Path

import torch
from families import FAMILIES, VARIANTS

from tarsia.adapter import Adapter, FourBits, open_base, probe
from tarsia.core.attach import Part, attach, patches
from tarsia.core.method import METHODS

LORA = Part("lora", "language.*.{q,v}", METHODS["lora"].config(rank=4, alpha=8.0))
FULL = Part("full", "projector", METHODS["full"].config())
PARTS = (LORA, FULL)


def family(name):
    return FAMILIES.get(name) or VARIANTS[name]


def saved(folder: Path, name="llava", dtype=None, shard=None, **overrides) -> Path:
    """A tiny model of a family, written by Transformers."""
    model, _ = family(name).build(**overrides)
    options = {} if shard is None else {"max_shard_size": shard}
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, **options)
    return folder


def counts(name):
    """Pictures by row: some of what the family takes."""
    made = family(name)
    return tuple(min(max(n, made.min_pictures), made.max_pictures or n) for n in (1, 2))


def trained(base: Path, parts=PARTS, name="llava", form: FourBits | None = None, size=0.2, seed=0, **options):
    """An adapter of the base, as a training would leave it, with its probe."""
    host = open_base(str(base), processor=False, four_bits=form, **options)
    attach(host.model, host.sites, parts, name="a", origin=host.origin)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for patch in patches(host.model, "a").values():
            for parameter in patch.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    card = {} if host.quantisation is None else {"four_bits": host.quantisation.report(host.sites)}
    return Adapter.of(host, "a", parts, card, probe=probe(host, family(name).batch(counts(name))))
