"""What each site is given when an adapter runs over its own probe.

Every adapter's folder holds a probe: a few rows that it was trained for. They are all the data that a merge looks at,
and nobody has to bring any.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter.host import Host
from tarsia.adapter.proof import Probe
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
        """Inputs [n, in] in float32, by path of every linear layer that was called, in the order of calls.

        Raises MergeError where the adapter has no probe, BaseMismatch where it belongs to another base.
        """
        with quiet(self.host):
            try:
                put(self.host, self.adapter, _NAME)
                return self.run()
            finally:
                if _NAME in adapters(self.host.model):
                    detach(self.host.model, _NAME)

    @property
    def probe(self) -> Probe:
        """Raises MergeError where the adapter has none."""
        if self.adapter.probe is None:
            raise MergeError(
                "An adapter brings no probe, so nobody knows what its layers are given.",
                given=f"an adapter at {len(self.adapter.patches)} sites of {self.adapter.base or 'a base in memory'}",
                do="save it with a probe, or merge by a way that looks at weights alone",
            )
        return self.adapter.probe

    def run(self) -> dict[str, Tensor]:
        """What every linear layer is given as the model now is, [n, in] in float32, padding left out."""
        found: dict[str, Tensor] = {}
        sites = [site for site in self.host.sites if site.kind is Kind.WEIGHT]
        device = next(self.host.model.parameters()).device
        batch: dict[str, Any] = {key: value.to(device) for key, value in self.probe.inputs.items()}
        with _hooked(self.host, sites, _keeper(found, batch.get("attention_mask"))), torch.no_grad():
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


@dataclass(frozen=True, slots=True)
class Seen:
    """One site as an adapter sees it; called, it gives the inputs [n, in]."""

    watched: Watched
    path: str

    def __call__(self) -> Tensor:
        return self.watched.at(self.path)


@contextmanager
def quiet(host: Host) -> Iterator[None]:
    """Nobody acts inside, in evaluation mode; who acted before, and modes, are as they were afterwards."""
    if _NAME in adapters(host.model):
        raise MergeError("An adapter has the name that a merge needs.", given=_NAME, do="detach it")
    before = {slot: slot.active for slot in slots(host.model)}
    training = {module: module.training for module in host.model.modules()}
    host.model.eval()
    try:
        if before:
            activate(host.model)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for slot, names in before.items():
            slot.active = names


@contextmanager
def _hooked(host: Host, sites: Collection[Site], keep: Callable[[Site], Any]) -> Iterator[None]:
    """Let what ``keep`` makes for each site be called before its module is, inside."""
    handles = []
    try:
        for site in sites:
            module = host.model.get_submodule(site.module)
            handles.append(module.register_forward_pre_hook(keep(site), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeper(found: dict[str, Tensor], mask: Tensor | None) -> Callable[[Site], Any]:
    def keeper(site: Site) -> Any:
        def keep(module: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            x = args[0] if args else next(iter(keywords.values()))
            x = x.detach().float()
            if site.component is Component.LANGUAGE and mask is not None and x.shape[:-1] == mask.shape:
                x = x[mask.bool()]
            x = x.reshape(-1, x.shape[-1]).cpu()
            if site.path in found:
                x = torch.cat([found[site.path], x])
            found[site.path] = x[:: -(-len(x) // MOST)].clone()

        return keep

    return keeper
