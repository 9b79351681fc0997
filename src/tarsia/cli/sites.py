"""Print what a model is made of: where patches can go, where no gradient can reach, and what is on no site."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from tarsia.cli import output

if TYPE_CHECKING:
    from tarsia.adapter import Outline
    from tarsia.core.site import Site

HELP = "what a model is made of"
COLUMNS = ("component", "role", "kind", "layers", "sites", "shape", "parameters", "share", "dead")


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia sites``."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or mini-1; no weights are loaded")
    parser.add_argument("--json", action="store_true", help="one JSON object a site instead of a table")
    parser.add_argument(
        "--four-bits",
        metavar="FORM",
        help="what would be in 4 bits: nf4, say, or as a recipe has it; and why not the rest",
    )


def run(args: argparse.Namespace) -> int:
    """Print the sites of a model that has its shapes only."""
    from tarsia.adapter import open_outline

    base = open_outline(args.model, processor=False)
    sites, untouched = base.sites, base.anatomy.untouched(base.model)
    if args.four_bits is not None:
        return _rounded(args, base)
    sizes = {name: parameter.numel() for name, parameter in base.model.named_parameters()}
    if args.json:
        for site in sites:
            output.line({**asdict(site), "parameters": sum(sizes[name] for name in site.tensors)})
        for name, why in untouched.items():
            output.line({"untouched": name, "why": why})
        return 0
    total = sum(sizes.values())
    title = f"{args.model} ({base.anatomy.name}): {len(sites)} sites, {total:,} parameters"
    output.table(title, COLUMNS, rows(sites, sizes), right=("sites", "parameters", "share"))
    for name, why in untouched.items():
        print(f"untouched: {name} ({why})")
    return 0


def _rounded(args: argparse.Namespace, base: Outline) -> int:
    """Print which weights the form would round, and why it leaves the others."""
    from tarsia.adapter.four_bits import choose
    from tarsia.cli import adapted, rounded

    report = choose(adapted.described(args.four_bits), base.model, base.sites).report(base.sites)
    if args.json:
        output.line(report)
    else:
        rounded.show(report)
    return 0


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
