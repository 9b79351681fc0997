"""All lifecycle, once: what stands between a frozen module and its patches.

A slot is a child module named ``slot`` of the module that it serves, and chains whatever that module's
``forward`` was. Keys and types of the base stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tarsia.core.errors import AttachError, RouteError
from tarsia.core.patch import Base, Ground, Over, Patch
from tarsia.core.segments import Route
from tarsia.core.site import Kind, Site


class Slot(nn.Module):
    """The patches of one module, by adapter and by tensor, and which of them act."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if "slot" in module._modules or hasattr(module, "slot"):
            raise AttachError("The module has a child of its own that is called `slot`.", given=type(module).__name__)
        self.patches = nn.ModuleDict()
        self.sites: dict[str, Site] = {}
        self.active: tuple[str, ...] = ()
        self.route: Route | None = None
        self.kept: dict[str, nn.Parameter | None] | None = None
        self.chained = "forward" in module.__dict__
        self.below: Callable[..., Any] = module.forward
        # a list hides the parent from nn.Module, which would otherwise register it as a child
        self.parent = [module]
        module.slot = self
        module.forward = self.run

    def add(self, name: str, site: Site, patch: Patch) -> None:
        """Put ``patch`` in for adapter ``name`` and let it act."""
        key = site.weight.rpartition(".")[2]
        held = self.patches[name] if name in self.patches else nn.ModuleDict()
        if key in held:
            raise AttachError(f"{site.path} already has a patch of the adapter {name!r}.", given=name)
        held[key] = patch
        self.patches[name] = held
        self.sites[key] = site
        if name not in self.active:
            self.active = (*self.active, name)

    def over(self, names: Sequence[str], ground: Callable[[Site], Base]) -> dict[str, Base]:
        """The pile of patches of ``names`` by tensor, each on its own ground."""
        piles: dict[str, Base] = {}
        for name in names:
            for key, patch in self.patches[name].items() if name in self.patches else ():
                piles[key] = Over(patch, piles.get(key) or ground(self.sites[key]))
        return piles

    def run(self, *args: Any, **keywords: Any) -> Any:
        """The module's forward with its active, or routed, patches."""
        if self.kept is not None or (self.route is None and not self.active):
            return self.below(*args, **keywords)
        if self.route is not None:
            return self._routed(self.route, *args, **keywords)
        return self._pass(self.active, *args, **keywords)

    def _pass(self, names: Sequence[str], *args: Any, **keywords: Any) -> Any:
        """Through every tensor's pile; a module with several sites runs one inside the other."""
        call, module = self.below, self.parent[0]
        x = args[0] if args else None
        for key in self.sites:

            def ground(site: Site, call: Callable[..., Any] = call) -> Base:
                return Ground(module, site, call, args[1:], keywords, bool(args))

            pile = self.over([n for n in names if n in self.patches and key in self.patches[n]], ground).get(key)
            if pile is not None:
                call = _Call(pile, x)
        return call(*args, **keywords)

    def _routed(self, route: Route, *args: Any, **keywords: Any) -> Any:
        site = next(iter(self.sites.values()))
        if len(args) != 1 or keywords or not isinstance(args[0], Tensor):
            names = set(route.names)
            if len(names) == 1:
                return self._pass([n for n in names if n is not None], *args, **keywords)
            raise RouteError(
                f"{site.path} takes more than one input, so rows of different adapters can not share a pass.",
                given=", ".join(sorted(str(n) for n in names)),
                do="give these rows one adapter, or run them apart",
            )
        x: Tensor = args[0]
        groups = [(name, index.to(x.device)) for name, index in route.groups(site, len(x)) if len(index)]
        if not groups:
            return self.below(x)
        fast = self._batched(site, groups, x)
        if fast is not None:
            return fast
        parts = [self._pass([] if name is None else [name], x[index]) for name, index in groups]
        return torch.cat(parts)[torch.cat([index for _, index in groups]).argsort()]

    def _batched(self, site: Site, groups: Sequence[tuple[str | None, Tensor]], x: Tensor) -> Tensor | None:
        """The method's own batched path where all patches here are of one kind that has it."""
        if len(self.sites) != 1 or site.kind is not Kind.WEIGHT:
            return None
        key = next(iter(self.sites))
        pairs = [(self.patches[n][key], index) for n, index in groups if n in self.patches and key in self.patches[n]]
        kinds = {type(patch) for patch, _ in pairs}
        if len(kinds) != 1 or not hasattr(next(iter(kinds)), "batched"):
            return None
        result: Tensor = next(iter(kinds)).batched(pairs, x, Ground(self.parent[0], site, self.below))
        return result

    def merge(self) -> None:
        """Put the folded tensors in place of the module's own, which are kept untouched."""
        if self.kept is not None:
            raise AttachError("The patches are already merged.", do="unmerge first")
        module, kept = self.parent[0], {}
        for key, pile in self.over(self.active, lambda site: Ground(self.parent[0], site, self.below)).items():
            with torch.no_grad():
                weight, bias = pile.dense()
            site = self.sites[key]
            folded = {key: weight} | ({} if bias is None else {(site.bias or "bias").rpartition(".")[2]: bias})
            for name, value in folded.items():
                if name not in module._parameters:
                    raise AttachError(f"{site.path} has no place for a folded {name}.", given=type(module).__name__)
                kept[name] = module._parameters[name]
                module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
        self.kept = kept

    def unmerge(self) -> None:
        """Put the module's own tensors back: the same objects, so every bit is as it was."""
        if self.kept is not None:
            self.parent[0]._parameters.update(self.kept)
            self.kept = None

    def remove(self, name: str) -> None:
        """Take the adapter ``name`` out, and the slot itself with its last adapter."""
        self.check_outermost()
        self.unmerge()
        self.active = tuple(n for n in self.active if n != name)
        if name in self.patches:
            del self.patches[name]
        self.sites = {k: s for k, s in self.sites.items() if any(k in held for held in self.patches.values())}
        if not self.patches:
            module = self.parent[0]
            if self.chained:
                module.forward = self.below
            else:
                del module.__dict__["forward"]
            del module._modules["slot"]

    def check_outermost(self) -> None:
        """Raise AttachError where something else has since wrapped the module's forward."""
        if self.parent[0].__dict__.get("forward") != self.run:
            raise AttachError(
                "The patches can not be removed: something else wraps this module's forward now.",
                given=repr(self.parent[0].__dict__.get("forward"))[:120],
                do="remove that first, for instance with accelerate's remove_hook_from_submodules(model)",
            )


class _Call:
    """A pile of patches as the forward that lies below the next tensor's pile."""

    __slots__ = ("pile", "x")

    def __init__(self, pile: Base, x: Any) -> None:
        self.pile, self.x = pile, x

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.pile(args[0] if args else self.x)
