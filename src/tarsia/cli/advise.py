"""Say what to begin with: rate, size, place and length of a training, each with the evidence behind it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from tarsia.cli import output

if TYPE_CHECKING:
    from tarsia.train.guidance import Advice

HELP = "what to begin a training with, and why"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia advise``."""
    parser.add_argument("--method", metavar="METHOD", default="lora", help="how to train (default: lora)")
    parser.add_argument("--rows", type=int, metavar="N", help="how many rows there are to train on")
    parser.add_argument("--model", metavar="MODEL", help="a folder, a hub id, or mini-1; no weights are loaded")
    parser.add_argument("--component", metavar="NAME", help="vision, projector or language: train only this")
    parser.add_argument("--task", metavar="KIND", help="format: new answers; visual: new pictures")
    parser.add_argument("--json", action="store_true", help="one JSON object a figure instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the figures with their evidence, and a recipe that has them."""
    from tarsia.core.errors import ConfigError
    from tarsia.core.site import Component
    from tarsia.train.guidance import EVIDENCE, KNOWN, TASKS, advise

    if args.method not in KNOWN:
        _known(args.method)
    if args.rows is not None and args.rows < 1:
        raise ConfigError("There are no rows to train on.", given=args.rows, do="give --rows a number of at least 1")
    for option, value, allowed, what in (
        ("component", args.component, tuple(Component), "component"),
        ("task", args.task, tuple(TASKS), "kind of task"),
    ):
        if value is not None and value not in allowed:
            do = f"give --{option} one of these, or leave it out"
            raise ConfigError(
                f"There is no such {what}.", given=f"--{option} {value}", allowed=", ".join(allowed), do=do
            )
    base = _base(args.model)
    component = None if args.component is None else Component(args.component)
    found = advise(
        args.method,
        rows=args.rows,
        parameters=None if base is None else base["parameters"],
        component=component,
        task=args.task,
    )
    found, sites = _fitted(found, base)
    if args.json:
        for figure in found.figures:
            output.line({"key": figure.key, "value": figure.value, "evidence": EVIDENCE[figure.evidence]})
        return 0
    rows = [(f.key, str(f.value), EVIDENCE[f.evidence]) for f in found.figures]
    output.table(_title(args, base, sites), ("key", "value", "because"), rows)
    print()
    print(recipe(found, args.model))
    return 0


def _base(model: str | None) -> dict[str, Any] | None:
    """What the model is made of, without its weights."""
    if model is None:
        return None
    from tarsia.adapter import open_outline

    outline = open_outline(model, processor=False)
    count = sum(parameter.numel() for parameter in outline.model.parameters())
    return {"parameters": count, "sites": outline.sites, "family": outline.anatomy.name}


def _known(method: str) -> None:
    """Raise ConfigError, naming the nearest, where there is no such method at all."""
    import tarsia.methods  # noqa: F401 (fills the registry)
    from tarsia.core.method import find

    find(method)


def _fitted(found: Advice, base: dict[str, Any] | None) -> tuple[Advice, int | None]:
    """The advice with those terms of its selection where the model has what the method trains, and their sites' number.

    Raises SelectionError where there is none.
    """
    if base is None:
        return found, None
    import tarsia.methods  # noqa: F401 (fills the registry)
    from tarsia.core.errors import SelectionError
    from tarsia.core.method import find
    from tarsia.core.select import select

    method = find(found.method)

    def sites(selection: str) -> int:
        return len(select(selection, base["sites"], method.kinds, method.roles, method.patch.lacks))

    kept, refusal = [], None
    for term in found["select"].split("; "):
        try:
            sites(term)
            kept.append(term)
        except SelectionError as error:
            refusal = error
    if refusal is not None and not kept:
        raise refusal
    if refusal is not None:
        print(f"tarsia: left out: {refusal.what}", file=sys.stderr)
    return found.elsewhere("; ".join(kept)), sites("; ".join(kept))


def _title(args: argparse.Namespace, base: dict[str, Any] | None, sites: int | None) -> str:
    where = "" if base is None else f" on {args.model} ({base['parameters']:,} parameters, {sites} sites)"
    return f"{args.method}{where}, {'some' if args.rows is None else f'{args.rows:,}'} rows"


def recipe(found: Advice, model: str | None) -> str:
    """A recipe with these figures, as a YAML file holds it."""
    import yaml

    values = {
        "model": model or "MODEL",
        "parts": [found.part],
        "data": {"train": [{"path": "rows.jsonl"}]},
        **found.run,
        "out": f"runs/{found.method}",
    }
    text: str = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)
    return text.rstrip()
