"""Whether, and where, a PEFT folder has a place for each patch (peft 0.21.2).

It has one for LoRA at any linear layer, with a rank and a scale for each, for what can be written as LoRA (PiSSA as
one of twice the rank), for DoRA where all of an adapter's updates are DoRA's, and
for whole modules (``modules_to_save``): a projector, a norm, both expert tensors of a
mixture's layer, Gemma-3's projector module
with its bare tensor. It has none for a module that is trained in part (one expert tensor of two), for a bare
tensor of the model itself (LLaVA-NeXT's and OneVision's ``image_newline``, BLIP-2's ``query_tokens``), for an embedding
that is the head too (PEFT would replace the one and leave the other), nor for methods that it does not know. One
prompt or one prefix, alone, has a folder of its own kind (``tarsia.adapter.prompts``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tarsia.adapter.prompts import TYPES
from tarsia.adapter.prompts import obstacles as of_lead
from tarsia.core.method import find
from tarsia.core.site import Site
from tarsia.core.slot import Slot


@dataclass(frozen=True, slots=True)
class Layout:
    """How PEFT would hold an adapter.

    ``targets``: modules with a LoRA update. ``saved``: modules that are replaced whole (``modules_to_save``).
    ``places``: for each patched site the base's own parameter of each of the patch's tensors, where there is
    one. ``obstacles``: what PEFT has no place for, a sentence each; any makes it a folder that PEFT refuses.
    ``lead``: the shape of the site of a prompt or prefix that is all of the adapter; empty where there is none.
    """

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    places: Mapping[str, Mapping[str, str]]
    obstacles: tuple[str, ...]
    lead: tuple[int, ...] = ()


def layout(model: nn.Module, patched: Sequence[tuple[Site, str]]) -> Layout:
    """Find PEFT's place for each (site, method) of an adapter on ``model``."""
    modules = bare(model)
    leads = [(site, method) for site, method in patched if method in TYPES]
    places = {
        site.path: {"weight": site.weight} | ({} if site.bias is None else {"bias": site.bias})
        for site, method in patched
        if method == "full"
    }
    updates = {method for _, method in patched if find(method).thin or find(method).measured}
    known = updates | {"full", *TYPES}
    obstacles = [f"{site.path}: PEFT has no {method}" for site, method in patched if method not in known]
    obstacles += [why for site, method in leads for why in of_lead(site, method, len(patched) - 1)]
    targets = []
    for site, method in patched:
        if method not in updates:
            continue
        if isinstance(modules.get(site.path), nn.Linear):
            targets.append(site.path)
        else:
            obstacles.append(f"{site.path}: PEFT's LoRA has no place at a {type(modules.get(site.module)).__name__}")
    measured = sorted(method for method in updates if find(method).measured)
    if measured and len(updates) > len(measured):
        others = ", ".join(sorted(updates - set(measured)))
        obstacles.append(f"{others}: PEFT has {measured[0]} at all updates of an adapter or at none")
    for site, method in patched:
        if method == "full" and site.tied:
            obstacles.append(f"{site.path}: PEFT would leave {', '.join(site.tied)} as it is, which is the same tensor")
    saved, homeless = _saved(modules, {name for held in places.values() for name in held.values()})
    obstacles += homeless
    endings = {name[at + 1 :] for name in modules for at, letter in enumerate(name) if letter == "."}
    for path in targets:
        if path in endings:
            obstacles.append(f"{path}: PEFT would take other modules that end alike too")
        if any(re.match(rf"(^|.*\.){module}($|\..*)", path) for module in saved):
            obstacles.append(f"{path}: PEFT would leave it out for a module in modules_to_save")
    for path in saved:
        if any(other != path and other.endswith(path) for other in modules):
            obstacles.append(f"{path}: PEFT would replace other modules that end alike too")
    return Layout(tuple(targets), saved, places, tuple(obstacles), leads[0][0].shape if leads else ())


def bare(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by name, without slots and what is in them."""
    inlaid = tuple(name for name, module in model.named_modules() if isinstance(module, Slot))
    within = tuple(f"{name}." for name in inlaid)
    return {name: m for name, m in model.named_modules() if name not in inlaid and not name.startswith(within)}


def _saved(modules: Mapping[str, nn.Module], covered: set[str]) -> tuple[tuple[str, ...], list[str]]:
    """The smallest modules that hold exactly the ``covered`` parameters, and what fits into none."""
    held: dict[str, set[str]] = {name: set() for name in modules}
    buffers: dict[str, set[str]] = {name: set() for name in modules}
    for name, module in modules.items():
        own = {f"{name}.{key}" if name else key for key in module._parameters if module._parameters[key] is not None}
        kept = {key for key in module._buffers if key not in module._non_persistent_buffers_set}
        parents = [name]
        while parents[-1]:
            parents.append(parents[-1].rpartition(".")[0])
        for parent in parents:
            held[parent] |= own
            buffers[parent] |= kept
    chosen, obstacles = set(), []
    for parameter in sorted(covered):
        owner = parameter.rpartition(".")[0]
        partly = sorted(held[owner] - covered)
        if partly:
            obstacles.append(f"{parameter}: PEFT replaces whole modules, and {partly[0]} is not trained")
        elif buffers[owner]:
            obstacles.append(f"{parameter}: PEFT would look for the buffer {min(buffers[owner])} of its module")
        elif not owner:
            obstacles.append(f"{parameter}: PEFT can not replace the model itself")
        else:
            chosen.add(owner)
    outermost = {name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)}
    return tuple(sorted(outermost)), obstacles
