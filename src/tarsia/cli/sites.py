"""Print what a model is made of: where patches can go, where no gradient can reach, and what is on no site."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from tarsia.cli import output

if TYPE_CHECKING:
    from torch import nn

    from tarsia.anatomy import Anatomy
    from tarsia.core.site import Site

NAME = "sites"
HELP = "what a model is made of"
COLUMNS = ("component", "role", "kind", "layers", "sites", "shape", "parameters", "share", "dead")


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia sites``."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or mini-1; no weights are loaded")
    parser.add_argument("--json", action="store_true", help="one JSON object a site instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the sites of a model that has its shapes only."""
    anatomy, model = outline(args.model)
    sites, untouched = anatomy.sites(model), anatomy.untouched(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if args.json:
        for site in sites:
            output.line({**asdict(site), "parameters": sum(sizes[name] for name in site.tensors)})
        for name, why in untouched.items():
            output.line({"untouched": name, "why": why})
        return 0
    total = sum(sizes.values())
    title = f"{args.model} ({anatomy.name}): {len(sites)} sites, {total:,} parameters"
    output.table(title, COLUMNS, rows(sites, sizes), right=("sites", "parameters", "share"))
    for name, why in untouched.items():
        print(f"untouched: {name} ({why})")
    return 0


def outline(name: str) -> tuple[Anatomy, nn.Module]:
    """The anatomy and the model on the meta device. Raises ConfigError where there is no such model."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tarsia import base
    from tarsia.anatomy import anatomy_of
    from tarsia.core.errors import ConfigError

    try:
        config = AutoConfig.from_pretrained(base.resolve(name))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "There is no model of this name, or its configuration can not be read.",
            given=f"{name} ({str(error).splitlines()[0]})",
            allowed=f"a folder with a config.json, a hub id, {', '.join(base.NAMES)}",
        ) from error
    anatomy = anatomy_of(config)
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(config)
    return anatomy, model


def rows(sites: Sequence[Site], sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Lines of the table: sites alike in all but the number of their layer stand on one."""
    total = sum(sizes.values())
    groups: dict[tuple[str, str, str, str, str, bool], list[Site]] = {}
    for site in sites:
        shape = " x ".join(map(str, site.shape))
        groups.setdefault(
            (site.component, site.role, site.kind, shape, site.dead or "", site.layer is None), []
        ).append(site)
    lines: list[tuple[str, ...]] = []
    for (component, role, kind, shape, dead, _), members in groups.items():
        count = sum(sizes[name] for site in members for name in site.tensors)
        layers = spans({site.layer for site in members if site.layer is not None})
        lines.append(
            (component, role, kind, layers, str(len(members)), shape, f"{count:,}", f"{count / total:.2%}", dead)
        )
    return lines


def spans(layers: Collection[int]) -> str:
    """Layer numbers as a selection would write them: "0..3, 7"."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in parts)
