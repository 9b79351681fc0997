"""What each site is given when an adapter runs over its own probe.

Every adapter's folder holds a probe: a few rows that it was trained for. They are all the data that a merge looks at,
and nobody has to bring any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter.host import Host
from tarsia.adapter.value import Adapter, put
from tarsia.core.attach import activate, adapters, detach, slots
from tarsia.core.errors import MergeError
from tarsia.core.site import Component, Kind, Site

MOST: Final = 1024
"""Inputs that are kept of a site, evenly spaced among all: 16 MiB for a layer of 4096 inputs."""
_NAME: Final = "seen-by-merge"


@dataclass(frozen=True, eq=False)
class Watched:
    """An adapter on a bare or adapted host: nothing runs until something is asked for, and then once."""

    adapter: Adapter
    host: Host

    @cached_property
    def samples(self) -> Mapping[str, Tensor]:
        """Inputs [n, in] in float32, by path of every linear layer that was called, padding left out.

        Raises MergeError where the adapter has no probe, BaseMismatch where it belongs to another base.
        """
        probe = self.adapter.probe
        if probe is None:
            raise MergeError(
                "An adapter brings no probe, so nobody knows what its layers are given.",
                given=str(self.adapter.card.get("recipe", "an adapter without a probe"))[:80],
                do="save it with a probe, or merge by a way that looks at weights alone",
            )
        found: dict[str, Tensor] = {}
        mask = probe.inputs.get("attention_mask")
        with _acting(self.adapter, self.host), _hooked(self.host, found, mask), torch.no_grad():
            device = next(self.host.model.parameters()).device
            batch: dict[str, Any] = {key: value.to(device) for key, value in probe.inputs.items()}
            self.host.model(**batch, use_cache=False)
        return found

    def at(self, path: str) -> Tensor:
        """Inputs [n, in] of one site. Raises MergeError where the probe never came by."""
        if path not in self.samples:
            raise MergeError(
                f"The probe never calls {path}, so nobody knows what it is given.",
                do="merge by a way that looks at weights alone",
            )
        return self.samples[path]


@contextmanager
def _acting(adapter: Adapter, host: Host) -> Iterator[None]:
    """The adapter alone acts inside; who acted before, and modes, are as they were afterwards."""
    if _NAME in adapters(host.model):
        raise MergeError("An adapter has the name that a merge needs.", given=_NAME, do="detach it")
    before = {slot: slot.active for slot in slots(host.model)}
    training = {module: module.training for module in host.model.modules()}
    host.model.eval()
    try:
        if before:
            activate(host.model)
        put(host, adapter, _NAME)
        yield
    finally:
        if _NAME in adapters(host.model):
            detach(host.model, _NAME)
        for module, mode in training.items():
            module.training = mode
        for slot, names in before.items():
            slot.active = names


@contextmanager
def _hooked(host: Host, found: dict[str, Tensor], mask: Tensor | None) -> Iterator[None]:
    """Keep what every linear layer is given, inside."""
    handles = []
    for site in host.sites:
        if site.kind is Kind.WEIGHT:
            module = host.model.get_submodule(site.module)
            handles.append(module.register_forward_pre_hook(_keep(site, found, mask), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(site: Site, found: dict[str, Tensor], mask: Tensor | None) -> Any:
    def keep(module: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(keywords.values()))
        x = x.detach().float().cpu()
        if site.component is Component.LANGUAGE and mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask.bool()]
        x = x.reshape(-1, x.shape[-1])
        if site.path in found:
            x = torch.cat([found[site.path], x])
        found[site.path] = x[:: -(-len(x) // MOST)]

    return keep
