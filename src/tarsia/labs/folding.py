"""Adapters of mini-1 that are trained once, kept, and folded: what the chapters `fold` and `delta` stand on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter import Adapter, Host, load, open_base, probe
from tarsia.adapter.files import OURSELVES
from tarsia.core.attach import Part, attach, patches
from tarsia.core.method import METHODS
from tarsia.data.encode import Encoder
from tarsia.labs import jobs, parity, replay, sources
from tarsia.labs.experiment import samples

JOBS: Final = ("infrared", "blueprints")
"""Jobs with short answers."""
LINEAR: Final = "language.*.{q,k,v,o,gate,up,down}"


def learnt(job: str, kind: str, out: Path) -> Adapter:
    """The adapter of a job, trained where it is not there: over the files' numbers (LoRA), or 4 bits (QLoRA)."""
    kept = out / "adapters" / f"{job}-{kind}"
    if not (kept / OURSELVES).is_file():
        with replay.claimed(out / f"{job}-{kind}", wait=True):
            if not (kept / OURSELVES).is_file():
                made = parity.recipe(parity.Run(job, kind, 1), out)
                found = jobs.learn(made).folder
                kept.parent.mkdir(parents=True, exist_ok=True)
                fresh = kept.with_name(f"{kept.name}.new")
                shutil.copytree(found, fresh, dirs_exist_ok=True)
                fresh.rename(kept)
                shutil.rmtree(made.out)
    return load(kept)


def shown(host: Host, work: Path, count: int = 4) -> dict[str, Tensor]:
    """Rows of mini-1's own world with a picture each, as the model takes them."""
    path = work / "shown.parquet"
    if not path.is_file():
        sources.write(path, sources.WORLD["scenes"](count, "held-out"))
    rows = samples({"shown": path})["shown"]
    return dict(Encoder(host.processor).batch(rows).inputs)


def moved(method: str, options: Mapping[str, Any], select: str, work: Path) -> Adapter:
    """An adapter of mini-1 whose every trained tensor is moved at random, as far as a training might."""
    host = open_base("mini-1")
    part = Part(method, select, METHODS[method].configure(options))
    attach(host.model, host.sites, [part], name="moved")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for patch in patches(host.model, "moved").values():
            for parameter in patch.parameters():
                size = float(parameter.square().mean().sqrt()) or 1.0
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05 * min(size, 1.0))
    return Adapter.of(host, "moved", [part], probe=probe(host, shown(host, work)))


def selects(names: Sequence[str]) -> dict[str, str]:
    """Where each method goes: where it may, and nearly all do."""
    special = {"ia3": "language.*.{k,v,down}", "bitfit": "vision", "full": "language.*.{q,v}"}
    return {name: special.get(name, LINEAR) for name in names}
