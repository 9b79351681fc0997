"""Adapters to merge, of every method, on a tiny model; and deltas that are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from families import FAMILIES
from torch import Tensor

from tarsia.adapter import Adapter, Host
from tarsia.core.attach import Part, attach, detach, patches
from tarsia.core.method import METHODS
from tarsia.merge.delta import Delta

FAMILY = "llava"
Spec = tuple[str, str, Mapping[str, Any]]
"""A method, a selection and options."""
EVERY: Mapping[str, Sequence[Spec]] = {
    "lora": [("lora", "language.*.{q,v}; projector", {"rank": 3, "alpha": 4.0, "dropout": 0.1})],
    "unequal": [("lora", "language.*.{q,k}", {"rank": 5, "alpha": 2.0, "ranks": {"*.1.*": 2}})],
    "rslora": [("rslora", "language.*.{q,v}", {"rank": 4, "alpha": 3.0})],
    "loraplus": [("loraplus", "language.*.{q,v}", {"rank": 2})],
    "dora": [("dora", "language.*.{q,v}", {"rank": 3, "alpha": 4.0})],
    "pissa": [("pissa", "language.*.{q,v}", {"rank": 2, "alpha": 2.0})],
    "vera": [("vera", "language.*.{q,v}", {"rank": 6})],
    "ia3": [("ia3", "language.*.{k,v,down}", {})],
    "oft": [("oft", "language.*.{q,v}", {"block": 8})],
    "bitfit": [("bitfit", "vision", {})],
    "full": [("full", "projector; vision.0", {})],
    "both": [("lora", "language.*.{q,v}", {"rank": 3}), ("full", "projector", {})],
    "houlsby": [("houlsby", "language", {"reduction": 4})],
    "normed": [("houlsby", "language", {"reduction": 8, "norm": True})],
    "pfeiffer": [("pfeiffer", "language", {"reduction": 8, "bias": False})],
    "parallel": [("parallel", "language", {"reduction": 4})],
    "scaled_parallel": [("scaled_parallel", "language", {"reduction": 4, "scale": 3.0})],
    "prompt": [("prompt", "language", {"length": 3})],
    "prefix": [("prefix", "language", {"length": 2})],
    "prefix_mlp": [("prefix_mlp", "language", {"length": 2})],
    "vpt": [("vpt", "vision", {"length": 2})],
    "vpt_deep": [("vpt_deep", "vision", {"length": 2})],
}
"""An adapter of every method that goes over a base of whole numbers, and of variants; loftq needs 4 bits."""
THIN = ("lora", "unequal", "rslora", "loraplus", "pissa", "vera")
FOLDING = (*THIN, "dora", "ia3", "oft", "bitfit", "full", "both")
BOTTLENECKS = ("houlsby", "normed", "pfeiffer", "parallel", "scaled_parallel")


@cache
def host() -> Host:
    """The tiny model, bare; nobody leaves anything in it."""
    return Host.of(FAMILIES[FAMILY].build()[0])


@cache
def inputs() -> Mapping[str, Tensor]:
    return FAMILIES[FAMILY].batch((1, 2))


@cache
def adapter(what: str, seed: int = 0, size: float = 0.1) -> Adapter:
    """The adapter of this name in ``EVERY``, its tensors moved by noise from ``seed``."""
    return trained(host(), EVERY[what], seed, size)


def trained(base: Host, specs: Sequence[Spec], seed: int = 0, size: float = 0.1) -> Adapter:
    """Attach, move every trained number, and take out: the base is left bare."""
    parts = [Part(method, chosen, METHODS[method].config(**options)) for method, chosen, options in specs]
    attach(base.model, base.sites, parts, name="one", seed=seed, origin=_origin)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for patch in patches(base.model, "one").values():
            for parameter in patch.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    made = Adapter.of(base, "one", parts, {"seed": seed})
    detach(base.model, "one")
    return made


def _origin(site: Any) -> Tensor:
    """The weight as it was before it was packed: the tiny models of one family are the same numbers."""
    return host().model.get_parameter(site.weight).detach()


def drawn(seed: int, ranks: Sequence[int], out: int = 12, into: int = 9) -> list[Delta]:
    """Factored deltas of these ranks; rank 0 is a whole one. Each can tell inputs of its own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def delta(rank: int) -> Delta:
        made: dict[str, Any] = (
            {"up": noise(out, rank), "down": noise(rank, into)} if rank else {"whole": noise(out, into)}
        )
        seen = noise(15, into).float()
        return Delta(**made, inputs=lambda: seen)

    return [delta(rank) for rank in ranks]


def gap(given: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number wanted (of 1, where all is smaller)."""
    return float((given - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
