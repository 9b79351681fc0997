"""All lifecycle, once: what stands between a frozen module and its patches.

A slot is a child module named ``slot`` of the module that it serves, and chains whatever that module's
``forward`` was. Keys and types of the base stay as they were. Where accelerate has hooked the module,
the slot stands inside the hook, whichever came first: it sees loaded weights and moved inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tarsia.core.along import along, send
from tarsia.core.compose import Acting, Average, Stack, members
from tarsia.core.errors import AttachError, RouteError
from tarsia.core.mean import Given, Mean, Once
from tarsia.core.packed import Packed
from tarsia.core.patch import Base, Forward, Ground, Keywords, Outside, Over, Patch, named
from tarsia.core.segments import Route, Segments
from tarsia.core.sequence import Decoder
from tarsia.core.site import Kind, Site

_HOOKED = "_old_forward"  # where accelerate keeps the forward that its hook calls


class Slot(nn.Module):
    """The patches of one module, by adapter and by tensor, and which of them act."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.patches = nn.ModuleDict()
        self.sites: dict[str, Site] = {}
        self.active: tuple[Acting, ...] = ()
        self.route: Route | None = None
        self.kept: dict[str, nn.Parameter | None] | None = None
        self.folded: dict[str, nn.Parameter | None] = {}
        seat = _HOOKED if _HOOKED in module.__dict__ else "forward"
        self.chained = seat in module.__dict__
        self.below: Forward = getattr(module, seat)
        self.takes = [*inspect.signature(type(module).forward).parameters][1:]
        # a list hides the parent from nn.Module, which would otherwise register it as a child
        self.parent = [module]
        module.slot = self
        module.__dict__[seat] = self.run

    def act(self, parts: tuple[Acting, ...]) -> None:
        """Let these act on every row."""
        # nn.Module looks whether what is set is a parameter or a module, which takes most of a switch's time
        self.__dict__["active"] = parts

    def add(self, name: str, site: Site, patch: Patch) -> None:
        """Put ``patch`` in for adapter ``name``."""
        if name not in self.patches:
            self.patches[name] = nn.ModuleDict()
        self.patches[name].add_module(site.key, patch)
        patch.adapter = name
        # what a module hands on comes after what its weights do
        self.sites = dict(sorted({**self.sites, site.key: site}.items(), key=lambda held: not held[1].tensors))

    def held(self, name: Acting | None) -> dict[str, Patch]:
        """The patches of one adapter, by tensor; none for what is no adapter's name."""
        children = self.patches[name]._modules if isinstance(name, str) and name in self.patches else {}
        return {key: patch for key, patch in children.items() if isinstance(patch, Patch)}

    def pile(self, parts: Sequence[Acting | None], ground: Ground | Given) -> Base:
        """The patches of ``parts`` for the ground's tensor, each over the one before; the ground where none has one."""
        base: Any = ground
        for part in parts:
            base = self._over(part, base, ground.site)
        found: Base = base
        return found

    def _patches(self, part: Acting | None, site: Site) -> list[Patch]:
        """All patches that the part has at the site, whatever their order."""
        return [patch for name in members(part) if (patch := self._patch(name, site)) is not None]

    def _over(self, part: Acting | None, base: Base, site: Site) -> Base:
        if isinstance(part, Stack):
            for one in part.parts:
                base = self._over(one, base, site)
            return base
        if isinstance(part, Average):
            once = Once(base)
            piles = [self._over(one, once, site) for one in part.parts]
            return base if all(pile is once for pile in piles) else Mean(piles, part.weights, site.kind)
        patch = self._patch(part, site)
        return base if patch is None else Over(patch, base)

    def _patch(self, name: Acting | None, site: Site) -> Patch | None:
        """One adapter's patch for a tensor: at every call of every module, so without a dictionary of them all."""
        held = self.patches._modules.get(name) if isinstance(name, str) else None
        patch = None if held is None else held._modules.get(site.key)
        return patch if isinstance(patch, Patch) else None

    def run(self, *args: Any, **keywords: Any) -> Any:
        """The module's forward with its active, or routed, patches."""
        if self.kept is not None:
            return self.below(*args, **keywords)
        if Kind.SEQUENCE.value in self.sites:
            return self._led(dict(zip(self.takes, args, strict=False)) | keywords)
        if not args and self.takes and self.takes[0] in keywords:
            args = (keywords.pop(self.takes[0]),)
        if self.route is not None:
            return self._routed(self.route, args, keywords)
        return self._pass(self.active, args, keywords)

    def _pass(
        self, parts: Sequence[Acting | None], args: tuple[Any, ...], keywords: Keywords, sites: Sequence[Site] = ()
    ) -> Any:
        """Through every tensor's pile, or those of ``sites``; a module with several runs one inside the other."""
        call = self.below
        for site in sites or self.sites.values():
            ground = Ground(self.parent[0], site, call, args, keywords)
            pile = self.pile(parts, ground)
            call = call if pile is ground else _Call(pile, ground)
        out = call(*args, **keywords)
        if Kind.STREAM.value in self.sites:
            send(_first(out), ground.sent)
        return out

    def _routed(self, route: Route, args: tuple[Any, ...], keywords: Keywords) -> Any:
        if len(route.order) == 1 or not any(name in self.patches for part in route.order for name in members(part)):
            return self._pass(route.order[:1], args, keywords)
        if Kind.STREAM.value in self.sites:
            return self._handed(route, args, keywords)
        return self._rows(route, args, keywords)

    def _handed(self, route: Route, args: tuple[Any, ...], keywords: Keywords) -> Any:
        """What the module hands on, each row's changed by its own adapter; it runs once for all that allow it."""
        site = self.sites[Kind.STREAM.value]
        out = self._rows(route, args, keywords) if len(self.sites) > 1 else self.below(*args, **keywords)
        x, y, sent = args[0], _first(out), dict[str, Tensor]()
        for part, index in route.groups(site, len(y)):
            patches, index = self._patches(part, site), index.to(y.device)
            if not patches or not len(index):
                continue
            if all(isinstance(patch, Outside) for patch in patches):
                own = Given(site, y[index])
                changed = _first(self.pile([part], own)(x[index] if len(x) == len(y) else x[:0]))
            else:
                whole = _first(self._pass([part], args, keywords))
                sent |= along(whole)
                changed = whole[index]
            y = y.index_copy(0, index, changed)
        send(y, sent)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _led(self, call: dict[str, Any]) -> Any:
        """The decoder's call with each row's prompt or prefix before it."""
        module, site, route = self.parent[0], self.sites[Kind.SEQUENCE.value], self.route
        decoder = Decoder(module, site, self.below, lambda name: self.held(name).get(site.key), self._only)
        if route is None:
            return decoder.run(call, [self.active], lambda count: [0] * count)
        whose = [route.order.index(name) for name in route.names]
        owners = route.segments.owners
        return decoder.run(
            call, [(part,) for part in route.order], lambda count: [whose[i] for i in owners(site, count).tolist()]
        )

    @contextmanager
    def _only(self, parts: Sequence[Acting | None]) -> Iterator[None]:
        """Let these, which are one where rows are routed, act on every row in the slots below this one."""
        inner = [slot for slot in self.parent[0].modules() if isinstance(slot, Slot) and slot is not self]
        outer = [slot.route for slot in inner]
        try:
            for slot in inner if self.route is not None else ():
                slot.route = Route((parts[0],), Segments({}))
            yield
        finally:
            for slot, route in zip(inner, outer, strict=True):
                slot.route = route

    def _rows(self, route: Route, args: tuple[Any, ...], keywords: Keywords) -> Any:
        """Each adapter's rows through the patches of the module's weights, apart."""
        site = next(iter(self.sites.values()))
        if not args or not isinstance(args[0], Tensor) or not all(map(_plain, (*args[1:], *keywords.values()))):
            raise RouteError(
                f"{site.path} takes more than one input, so rows of different adapters can not share a pass.",
                given=", ".join(sorted(str(part) for part in route.order)),
                do="give these rows one adapter, or run them apart",
            )
        x: Tensor = args[0]
        groups = [(part, index.to(x.device)) for part, index in route.groups(site, len(x)) if len(index)]
        if not groups:
            return self.below(*args, **keywords)
        fast = self._batched(site, groups, args, keywords)
        if fast is not None:
            return fast
        owned = [s for s in self.sites.values() if s.kind is not Kind.STREAM]  # what is handed on is changed later
        outs = [self._pass([part], (x[index], *args[1:]), keywords, owned) for part, index in groups]
        for (_, index), out in zip(groups, outs, strict=True):
            if not isinstance(out, Tensor) or len(out) != len(index):
                raise RouteError(
                    f"{site.path} does not give one output for each input, so its rows can not be told apart.",
                    given=f"{len(index)} inputs, output {tuple(getattr(out, 'shape', ()))}",
                    do="give these rows one adapter, or run them apart",
                )
        return torch.cat(outs)[torch.cat([index for _, index in groups]).argsort()]

    def _batched(
        self, site: Site, groups: Sequence[tuple[Acting | None, Tensor]], args: tuple[Any, ...], keywords: Keywords
    ) -> Tensor | None:
        """The method's own batched path where all patches here are of one kind that has it, each alone on its rows."""
        if len(self.sites) != 1 or site.kind is not Kind.WEIGHT:
            return None
        ground = Ground(self.parent[0], site, self.below, args, keywords)
        pairs = []
        for part, index in groups:
            pile = self.pile([part], ground)
            if pile is ground:
                continue
            if not isinstance(pile, Over) or pile.base is not ground:
                return None
            pairs.append((pile.patch, index))
        kinds = {type(patch) for patch, _ in pairs}
        batched = getattr(kinds.pop(), "batched", None) if len(kinds) == 1 else None
        # an offloaded patch is loaded only while it is called
        if batched is None or any(p.is_meta for patch, _ in pairs for p in patch.parameters()):
            return None
        result: Tensor = batched(pairs, args[0], ground)
        return result

    def merge(self) -> None:
        """Put the folded tensors in place of the module's own, which are kept untouched."""
        module = self.parent[0]
        folded: dict[str, Tensor | None] = {}
        for site in self.sites.values():
            ground = Ground(module, site, self.below)
            pile = self.pile(self.active, ground)
            if pile is not ground:
                with torch.no_grad():
                    folded |= named(module, site, *pile.dense())
        for name, value in folded.items():
            own = module._parameters[name]
            wanted = value if own is None else own
            if value is None or wanted is None:
                continue
            if wanted.is_meta or (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
                raise AttachError(
                    f"The folded {name} of {type(module).__name__} can not take the place of its own.",
                    given=f"{value.dtype} {tuple(value.shape)}",
                    allowed=f"{wanted.dtype} {tuple(wanted.shape)} in memory, not {wanted.device}",
                    do="merge before the weights are offloaded",
                )
        self.kept = {name: module._parameters[name] for name in folded}
        self.folded = {
            name: None if value is None else nn.Parameter(value.detach(), requires_grad=False)
            for name, value in folded.items()
        }
        module._parameters.update(self.folded)

    def unmerge(self) -> None:
        """Put the module's own tensors back: the same objects, so every bit is as it was."""
        module = self.parent[0]
        for name, own in (self.kept or {}).items():
            now = module._parameters[name]
            if now is not self.folded[name]:
                raise AttachError(
                    f"Something has since replaced the merged {name} of {type(module).__name__}.",
                    do="undo that first, for instance with accelerate's remove_hook_from_submodules(model)",
                )
            if own is not None and now is not None and own.device != now.device:
                _move(own, now.device)  # the model was moved meanwhile
        module._parameters.update(self.kept or {})
        self.kept, self.folded = None, {}

    def remove(self, name: str) -> None:
        """Take the adapter ``name`` out, and the slot itself with its last adapter."""
        seat = self.seat()
        del self.patches[name]
        self.sites = {k: s for k, s in self.sites.items() if any(k in self.held(n) for n in self.patches)}
        if not self.patches:
            module = self.parent[0]
            if self.chained or seat == _HOOKED:
                module.__dict__[seat] = self.below
            else:
                del module.__dict__[seat]
            del module._modules["slot"]

    def seat(self) -> str:
        """The attribute of the module that calls this slot. Raises AttachError where something else wraps it."""
        held = self.parent[0].__dict__
        for name in (_HOOKED, "forward"):
            if held.get(name) == self.run:
                return name
        raise AttachError(
            "The patches can not be changed: something else wraps this module's forward now.",
            given=repr(held.get("forward"))[:120],
            do="remove that first",
        )


def _first(out: Any) -> Tensor:
    """The hidden states among what a module hands on."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


class _Call:
    """A pile of patches, called as the forward that it stands for: what is called below gets the call's arguments."""

    __slots__ = ("ground", "pile")

    def __init__(self, pile: Base, ground: Ground) -> None:
        self.pile, self.ground = pile, ground

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.ground.args, self.ground.keywords = args, keywords
        x: Any = args[0] if args else None
        return self.pile(x)


def _move(own: nn.Parameter, device: torch.device) -> None:
    """Bring a tensor to ``device``: the same object, which for a packed one is more than its data."""
    if isinstance(own, Packed):
        torch.utils.swap_tensors(own, nn.Parameter(own.detach().to(device), requires_grad=False))
    else:
        own.data = own.data.to(device)


def _plain(value: Any) -> bool:
    """Whether a further argument is the same for every row."""
    return value is None or isinstance(value, bool | int | float | str)
