"""Put an adapter's patches into a model, and take them out without a trace."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tarsia.core.compose import NAME, Acting, Composition, Parallel, Switch, members, parts_of, stacked, without
from tarsia.core.errors import AttachError, CompositionError
from tarsia.core.method import METHODS, find
from tarsia.core.packed import Packed
from tarsia.core.patch import Ground, Origin, Patch, Tied, Tokenize
from tarsia.core.segments import Route, Segments
from tarsia.core.select import named, near
from tarsia.core.site import Component, Kind, Role, Site
from tarsia.core.slot import Slot
from tarsia.core.together import check, over


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
    dead: int = 0
    """Further sites that the selection names and that are left out, as no gradient can reach them."""
    lacking: int = 0
    """Further ones that have nothing of what the method trains, a layer without a bias for one."""


@torch.inference_mode(False)
def attach(
    model: nn.Module,
    sites: Sequence[Site],
    parts: Sequence[Part],
    *,
    name: str = "default",
    seed: int = 0,
    origin: Origin | None = None,
    tokenize: Tokenize | None = None,
) -> tuple[Covered, ...]:
    """Create the patches of ``parts`` and let them act; the base is frozen.

    ``origin`` gives a packed weight as it was, for methods that start from there, ``tokenize`` the ids of a text, for
    prompts that do. Returns the coverage. Nothing is
    changed where a part's selection fails, or two parts claim one site.
    """
    if not parts:
        raise AttachError("An adapter needs at least one part.", do='for example method "lora" on "language.*.{q,v}"')
    claimed = _choose(sites, parts)
    chosen = [(part, site) for part, site in claimed if _lives(part, site)]
    _check(model, [site for _, site in chosen], name)
    _numbers(model, chosen)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for part, site in chosen:
        module = model.get_submodule(site.module)
        ground = Ground(module, site, module.forward, source=origin, tokenize=tokenize)
        made.append((site, part.method, find(part.method).patch.create(site, part.config, ground, generator)))
    install(model, [(site, patch) for site, _, patch in made], name=name)
    return _coverage(model, made, [(part.method, site) for part, site in claimed if not _lives(part, site)])


def _lives(part: Part, site: Site) -> bool:
    """Whether a gradient reaches the site and it has what the part's method trains."""
    return site.dead is None and find(part.method).patch.lacks(site) is None


def _choose(sites: Sequence[Site], parts: Sequence[Part]) -> list[tuple[Part, Site]]:
    """The sites of every part, left-out ones too. Raises where two parts claim one, or a configuration fits none."""
    claimed: dict[str, str] = {}
    chosen = []
    for part in parts:
        method = find(part.method)
        selected = named(part.select, sites, method.kinds, method.roles, method.patch.lacks)
        for site in selected:
            why = method.patch.misfit(site)
            if why is not None:
                raise AttachError(
                    f"{part.method} has no place at {site.path}: {why}.", given=part.select, do=_fitting(part, sites)
                )
        if hasattr(part.config, "check"):
            part.config.check([site for site in selected if _lives(part, site)])
        for site in selected:
            if site.path in claimed:
                raise AttachError(
                    f"Two parts claim {site.path}.",
                    given=f"{claimed[site.path]!r} and {part.select!r}",
                    do="make the selections disjoint",
                )
            claimed[site.path] = part.select
            chosen.append((part, site))
    return chosen


def _fitting(part: Part, sites: Sequence[Site]) -> str:
    """What to select in place of sites among which some do not fit."""
    method = find(part.method)
    usual = [s for s in sites if s.kind in method.kinds and (method.roles is None or s.role in method.roles)]
    fit = [
        c
        for c in Component
        if (own := [s for s in usual if s.component is c and s.dead is None])
        and all(method.patch.misfit(s) is None for s in own)
    ]
    return f'leave that site out: select: "{"; ".join(fit)}"' if fit else "leave that site out"


def install(model: nn.Module, patches: Sequence[tuple[Site, Patch]], *, name: str, more: bool = False) -> None:
    """Put finished patches in under ``name`` and let them act over those that act now. Freezes the base.

    With ``more`` they are further ones of the adapter ``name``, which may be there. Refuses a name that is taken
    without it, and patches that would replace what acts now.
    """
    _check(model, [site for site, _ in patches], name, more)
    acting = active(model)
    over(model, acting, patches, name)
    for site, patch in patches:
        if site.tied and type(patch).fold is Patch.fold:
            raise AttachError(
                f"{site.path} is used again as {', '.join(site.tied)}, where only a patch that folds can act.",
                given=type(patch).__name__,
                do="choose a method that folds, or other sites",
            )
    if not slots(model):
        model.__dict__["tarsia_frozen"] = tuple(n for n, p in model.named_parameters() if p.requires_grad)
        model.requires_grad_(False)
    for site, patch in patches:
        places = [second(site, tied) for tied in site.tied]
        for place, piece in ((site, patch), *((place, patch.again(place)) for place in places)):
            module = model.get_submodule(place.module)
            held = module._modules.get("slot")
            slot = held if isinstance(held, Slot) else Slot(module)
            slot.train(module.training)
            slot.add(name, place, piece.train(module.training).to(_device(module, place)))
    for slot in slots(model):
        slot.active = acting if name in acting else (*acting, name)


def second(site: Site, tied: str) -> Site:
    """The site as it is seen where its weight is used a second time, under the name ``tied``."""
    return replace(site, path=tied.rpartition(".")[0], kind=Kind.TENSOR, weight=tied, bias=None, tied=())


def _device(module: nn.Module, site: Site) -> torch.device:
    """Where ``module`` computes; for what it hands on, where the first of its own does."""
    here = [p.device for p in module.parameters(recurse=not site.tensors) if not p.is_meta]
    hooked = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return here[0] if here else torch.device("cpu" if hooked is None else hooked)  # 0 is the first accelerator


def _check(model: nn.Module, sites: Sequence[Site], name: str, more: bool = False) -> None:
    """Raise AttachError for whatever would stop ``install`` half-way, or make a patch that does not act."""
    if not NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise AttachError(
            "That is no adapter name.",
            given=repr(name),
            allowed="letters, digits, - and _, but no name that torch's ModuleDict has a use for",
            do=f"for example {re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-') or 'mine'}-1",
        )
    held = slots(model)
    if name in _names(held) and not more:
        raise AttachError(f"An adapter {name!r} is attached already.", do="choose another name, or detach it first")
    _unmerged(held)
    modules = dict(model.named_modules())
    names: dict[int, set[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(key)
    for site in sites:
        if not site.tensors:
            if site.module not in modules:
                raise AttachError(f"This model has no module {site.module}.", do="take the sites from its own anatomy")
            _free(modules[site.module])
            continue
        for weight in (site.weight, *site.tied):
            module = modules.get(weight.rpartition(".")[0])
            own = None if module is None else module._parameters.get(weight.rpartition(".")[2])
            if module is None or own is None:
                raise AttachError(f"This model has no parameter {weight}.", do="take the sites from its own anatomy")
            _free(module)
            others = names[id(own)] - {site.weight, *site.tied}
            if others:
                raise AttachError(
                    f"{weight} is the same tensor as {', '.join(sorted(others))}, where the patch would not act.",
                    do="name these in the site's `tied`, or choose other sites",
                )


def _numbers(model: nn.Module, chosen: Sequence[tuple[Part, Site]]) -> None:
    """Raise AttachError where a method needs a weight's own numbers and it is packed, or the reverse."""
    for part, site in chosen:
        packed = bool(site.weight) and isinstance(model.get_parameter(site.weight), Packed)
        if find(part.method).corrects and not packed:
            raise AttachError(
                f"{site.path} is not quantised: there is no error to correct.",
                given=part.method,
                allowed=", ".join(sorted(name for name, method in METHODS.items() if not method.corrects)),
                do="add four_bits: nf4 to the recipe, which opens the base in 4 bits, or choose one of these",
            )
        if find(part.method).replaces and packed:
            raise AttachError(
                f"{site.path} is quantised: there are no numbers of its own to train.",
                given=part.method,
                allowed=", ".join(sorted(name for name, method in METHODS.items() if not method.replaces)),
                do="choose one of these, or load these sites in 16 bits",
            )


def _free(module: nn.Module) -> None:
    held = getattr(module, "slot", None)
    if isinstance(held, Slot):
        held.seat()
    elif held is not None:
        raise AttachError("The module has something of its own that is called `slot`.", given=type(module).__name__)


def _unmerged(held: Sequence[Slot]) -> None:
    if any(slot.kept is not None for slot in held):
        raise AttachError("The patches are merged into the weights in memory.", do="unmerge first")


def slots(model: nn.Module) -> tuple[Slot, ...]:
    """Every slot of the model, in module order. None lies inside another, so what slots hold is not walked through."""
    found: list[Slot] = []
    seen: set[int] = set()
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, Slot):
            found.append(module)
        else:
            waiting.extend([c for c in reversed(module._modules.values()) if c is not None and c._modules])
    return tuple(found)


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the attached adapters, in the order in which the model's modules meet them."""
    return _names(slots(model))


def _names(held: Sequence[Slot]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for slot in held for name in slot.patches))


def patches(model: nn.Module, name: str) -> dict[Site, Patch]:
    """Site to patch of one adapter, in module order. Raises AttachError where there is none."""
    held = slots(model)
    _known(held, [name])
    return {
        slot.sites[key]: patch for slot in held for key, patch in slot.held(name).items() if not isinstance(patch, Tied)
    }


def _known(among: Sequence[Slot], names: Sequence[str]) -> None:
    wanted = set(names)
    for slot in among:
        if not wanted:
            return
        wanted.difference_update(slot.patches)
    if wanted:
        held, unknown = _names(among), sorted(wanted)
        raise AttachError(
            f"No adapter {unknown[0]!r} is attached.",
            given=", ".join(unknown),
            allowed=", ".join(held) or "(none)",
            do=near(unknown[0], held) if held else "put it in first: put(host, load(folder), name)",
        )


def active(model: nn.Module) -> tuple[Acting, ...]:
    """What acts on every row, the first lowest: names, and whatever else `activate` was given."""
    return next((slot.active for slot in slots(model)), ())


def activate(model: nn.Module, *parts: Composition | None) -> None:
    """Let exactly these act on every row, the first lowest: names, a Stack, an Average. Nothing: the bare base.

    Raises CompositionError, with nothing changed, for what can not act together.
    """
    for part in parts:
        if isinstance(part, Switch | Parallel):
            raise CompositionError(
                f"A {type(part).__name__} speaks of the rows of one batch, not of all that come.",
                given=repr(part),
                do="enter routed(model, it, segments), or give it to generate()",
            )
    whole = stacked([part for part in parts if part is not None and not isinstance(part, Switch | Parallel)])
    held = slots(model)
    _known(held, members(whole))
    _unmerged(held)
    check(held, [whole])
    acting = tuple(parts_of(whole))
    for slot in held:
        slot.act(acting)


@contextmanager
def routed(model: nn.Module, rows: Sequence[Acting | None] | Switch | Parallel, segments: Segments) -> Iterator[None]:
    """Give each row of the batch its own adapter, Stack or Average (None: the base) for the calls inside.

    ``segments`` are the batch's; a Parallel's is the batch once, and the model is given what ``repeated`` makes of it.
    The route belongs to the model: call it from one thread at a time, and go backward inside where activations are
    checkpointed. Raises RouteError where the segments are not of these rows, CompositionError for what can not act
    together, and AttachError for merged patches or a name that is not attached.
    """
    route = Route.of(rows, segments)
    held = slots(model)
    for part in route.order:
        _known(held, members(part))
    _unmerged(held)
    for part in route.order:
        check(held, [part])
    before = [(slot, slot.route) for slot in held]
    try:
        for slot, _ in before:
            slot.route = route
        yield
    finally:
        for slot, outer in before:
            slot.route = outer


def merge(model: nn.Module) -> None:
    """Fold the active patches into the weights in memory; ``unmerge`` restores every bit.

    Raises AttachError, with nothing changed, where that can not be.
    """
    held = slots(model)
    _unmerged(held)
    for slot in held:
        if slot.route is not None:
            raise AttachError("Rows are routed to adapters of their own.", do="merge outside `routed`")
        for name in members(stacked(slot.active)):
            for patch in slot.held(name).values():
                if type(patch).fold is Patch.fold:
                    raise AttachError(f"The method of {type(patch).__name__} does not fold.", given=name)
    try:
        for slot in held:
            slot.merge()
    except BaseException:
        unmerge(model)
        raise


def unmerge(model: nn.Module) -> None:
    """Put every original tensor back. Does nothing where nothing is merged."""
    for slot in slots(model):
        slot.unmerge()


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter out; whatever is merged is unmerged first.

    With the last one every trace goes, and what was trainable is so again. Raises AttachError, with
    the adapter in place, where something else wraps a patched module.
    """
    every = slots(model)
    _known(every, [name])
    held = [slot for slot in every if name in slot.patches]
    left = [one for part in active(model) if (one := without(part, name)) is not None]
    for slot in held:
        slot.seat()
    unmerge(model)
    for slot in every:
        slot.active = tuple(left)
    for slot in held:
        slot.remove(name)
    if not slots(model):
        for key in model.__dict__.pop("tarsia_frozen", ()):
            model.get_parameter(key).requires_grad_(True)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by name: all but those of patches."""
    ours = {id(parameter) for slot in slots(model) for parameter in slot.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in ours}


def _coverage(
    model: nn.Module, made: Sequence[tuple[Site, str, Patch]], out: Sequence[tuple[str, Site]]
) -> tuple[Covered, ...]:
    total = sum(parameter.numel() for parameter in base_parameters(model).values())
    groups: dict[tuple[str, Component, Role], list[Patch]] = {}
    for site, method, patch in made:
        groups.setdefault((method, site.component, site.role), []).append(patch)
    left = Counter((method, site.component, site.role) for method, site in out)
    unreached = Counter((method, site.component, site.role) for method, site in out if site.dead)
    lines = []
    for key in dict.fromkeys([*groups, *left]):
        members = groups.get(key, [])
        trained = sum(p.numel() for patch in members for p in patch.parameters())
        lines.append(Covered(*key, len(members), trained, trained / total, unreached[key], left[key] - unreached[key]))
    return tuple(lines)
