"""Put an adapter's patches into a model, and take them out without a trace."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tarsia.core.errors import AttachError, RouteError
from tarsia.core.method import find
from tarsia.core.patch import Ground, Patch
from tarsia.core.segments import Route, Segments
from tarsia.core.select import select
from tarsia.core.site import Component, Role, Site
from tarsia.core.slot import Slot


@dataclass(frozen=True, slots=True)
class Part:
    """One method on one selection of sites, with its configuration."""

    method: str
    select: str
    config: Any


@dataclass(frozen=True, slots=True)
class Covered:
    """One line of the coverage: the sites of one component and role that one method trains."""

    method: str
    component: Component
    role: Role
    sites: int
    trained: int
    """Parameters that are trained at these sites."""
    share: float
    """``trained`` as a share of all parameters of the base model, 0..1."""


def attach(
    model: nn.Module, sites: Sequence[Site], parts: Sequence[Part], *, name: str = "default", seed: int = 0
) -> tuple[Covered, ...]:
    """Create the patches of ``parts`` and let them act; the base is frozen.

    Returns the coverage. Nothing is changed where a part's selection fails, or two parts claim one site.
    """
    if not parts:
        raise AttachError("An adapter needs at least one part.", do='for example method "lora" on "language.*.{q,v}"')
    claimed: dict[str, str] = {}
    chosen: list[tuple[Part, Site]] = []
    for part in parts:
        method = find(part.method)
        for site in select(part.select, sites, method.kinds, method.roles):
            if site.path in claimed:
                raise AttachError(
                    f"Two parts claim {site.path}.",
                    given=f"{claimed[site.path]!r} and {part.select!r}",
                    do="make the selections disjoint",
                )
            claimed[site.path] = part.select
            chosen.append((part, site))
    generator = torch.Generator().manual_seed(seed)
    made = []
    for part, site in chosen:
        module = model.get_submodule(site.module)
        below = Ground(module, site, module.forward)
        made.append((site, part.method, find(part.method).patch.create(site, part.config, below, generator)))
    install(model, [(site, patch) for site, _, patch in made], name=name)
    return _coverage(model, made)


def install(model: nn.Module, patches: Sequence[tuple[Site, Patch]], *, name: str) -> None:
    """Put finished patches in under ``name``. Freezes the base; refuses a name that is taken."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AttachError("That is no adapter name.", given=repr(name), allowed="letters, digits, - and _")
    if name in adapters(model):
        raise AttachError(f"An adapter {name!r} is attached already.", do="choose another name, or detach it first")
    for site, _ in patches:
        held = model.get_submodule(site.module)._modules.get("slot")
        if isinstance(held, Slot):
            held.check_outermost()
    if not slots(model):
        frozen = [n for n, p in model.named_parameters() if p.requires_grad]
        model.__dict__["tarsia_frozen"] = tuple(frozen)
        model.requires_grad_(False)
    for site, patch in patches:
        module = model.get_submodule(site.module)
        held = module._modules.get("slot")
        slot = held if isinstance(held, Slot) else Slot(module)
        patch.train(module.training)
        device = next((p.device for p in module.parameters(recurse=False) if not p.is_meta), torch.device("cpu"))
        slot.add(name, site, patch.to(device))


def slots(model: nn.Module) -> tuple[Slot, ...]:
    """Every slot of the model, in module order."""
    return tuple(module for module in model.modules() if isinstance(module, Slot))


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the attached adapters, in the order in which they were attached."""
    return tuple(dict.fromkeys(name for slot in slots(model) for name in slot.patches))


def patches(model: nn.Module, name: str) -> dict[Site, Patch]:
    """Site to patch of one adapter, in module order. Raises AttachError where there is none."""
    _known(model, [name])
    return {
        slot.sites[key]: patch for slot in slots(model) if name in slot.patches for key, patch in slot.patches[name].items()
    }


def _known(model: nn.Module, names: Sequence[str]) -> None:
    unknown = sorted(set(names) - set(adapters(model)))
    if unknown:
        raise AttachError(
            f"No adapter {unknown[0]!r} is attached.", given=", ".join(unknown), allowed=", ".join(adapters(model)) or "(none)"
        )


def activate(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters act on every row, the first lowest. No name: the bare base."""
    _known(model, names)
    for slot in slots(model):
        slot.active = tuple(name for name in names if name in slot.patches)


@contextmanager
def routed(model: nn.Module, names: Sequence[str | None], segments: Segments) -> Iterator[None]:
    """Give each row of the batch its own adapter (None: the base) for the calls inside.

    Raises RouteError for merged patches and AttachError for a name that is not attached.
    """
    _known(model, [name for name in names if name is not None])
    held = slots(model)
    if any(slot.kept is not None for slot in held):
        raise RouteError("Merged patches act on every row.", do="unmerge first")
    try:
        for slot in held:
            slot.route = Route(tuple(names), segments)
        yield
    finally:
        for slot in held:
            slot.route = None


def merge(model: nn.Module) -> None:
    """Fold the active patches into the weights in memory; ``unmerge`` restores every bit."""
    done = []
    for slot in slots(model):
        for name in slot.active:
            for patch in slot.patches[name].values():
                if type(patch).fold is Patch.fold:
                    raise AttachError(f"The method of {type(patch).__name__} does not fold.", given=name)
    try:
        for slot in slots(model):
            slot.merge()
            done.append(slot)
    except BaseException:
        for slot in done:
            slot.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Put every original tensor back."""
    for slot in slots(model):
        slot.unmerge()


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter out. With the last one every trace goes, and what was trainable is so again."""
    _known(model, [name])
    held = [slot for slot in slots(model) if name in slot.patches]
    for slot in held:
        slot.check_outermost()
    for slot in held:
        slot.remove(name)
    if not slots(model):
        parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
        for key in model.__dict__.pop("tarsia_frozen", ()):
            parameters[key].requires_grad_(True)


def _coverage(model: nn.Module, made: Sequence[tuple[Site, str, Patch]]) -> tuple[Covered, ...]:
    ours = {id(p) for _, _, patch in made for p in patch.parameters()}
    total = sum(p.numel() for n, p in model.named_parameters() if id(p) not in ours and ".slot." not in n)
    groups: dict[tuple[str, Component, Role], list[Patch]] = {}
    for site, method, patch in made:
        groups.setdefault((method, site.component, site.role), []).append(patch)
    lines = []
    for (method, component, role), members in groups.items():
        trained = sum(p.numel() for patch in members for p in patch.parameters())
        lines.append(Covered(method, component, role, len(members), trained, trained / total))
    return tuple(lines)
