"""A base with its adapters, as the verbs that answer questions open it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tarsia.cli import output

if TYPE_CHECKING:
    from tarsia.adapter import Adapter, Host
    from tarsia.data import Sample


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the model, its adapters and where it runs."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or mini-1")
    parser.add_argument(
        "--adapter", metavar="FOLDER", action="append", default=[], help="an adapter to put in; may be given again"
    )
    parser.add_argument("--device", default="auto", help="where it runs (default: a GPU where there is one)")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="the base's (default: bfloat16 where the machine computes it)",
    )
    parser.add_argument(
        "--variable",
        metavar="NAME=TEXT",
        action="append",
        default=[],
        help="what the chat template leaves open, such as date_string=...; may be given again",
    )


def opened(args: argparse.Namespace) -> Host:
    """The base with every adapter put in and acting, each under its folder's name. Nothing is ever left out:
    an adapter that is missing, broken or of another base is refused, and so is one whose outputs are not those of
    the day it was saved."""
    from tarsia.adapter import load, open_base, prove, put
    from tarsia.core.attach import activate

    output.no_bars()
    names = named(args.adapter)
    variables = _variables(args.variable)
    host = open_base(args.model, dtype=args.precision, device=args.device, variables=variables)
    for name, folder in zip(names, args.adapter, strict=True):
        adapter = load(folder, host)
        put(host, adapter, name)
        _note_gate(name, adapter)
        if adapter.probe is None:
            continue
        if (why := adapter.probe.provable(host)) is None:
            prove(host, name, adapter.probe)
        else:
            print(f"tarsia: note: the adapter {name} is not proved here: {why}", file=sys.stderr)
    activate(host.model, *names)
    return host


def _note_gate(name: str, adapter: Adapter) -> None:
    """Say on stderr where an adapter was held to a limit on forgetting and did not pass it."""
    gate = adapter.card.get("gate")
    if not isinstance(gate, Mapping) or gate.get("passed") is True:
        return
    what = "exceeds its limit on forgetting" if gate.get("passed") is False else "was never held to its limit"
    print(f"tarsia: warning: the adapter {name} {what} (the gate in its card)", file=sys.stderr)


def warn_without_effect(host: Host, samples: Sequence[Sample]) -> dict[str, float]:
    """Say on stderr which adapters change nothing for these rows; returns how much each changes."""
    from tarsia.evaluate import effects

    found = effects(host, samples)
    for name, moved in found.items():
        if moved == 0:
            where = " or ".join(dict.fromkeys(sample.source for sample in samples))
            print(f"tarsia: warning: the adapter {name} changes nothing here ({where})", file=sys.stderr)
    return found


def _variables(given: Sequence[str]) -> dict[str, str]:
    from tarsia.core.errors import ConfigError

    pairs = [text.partition("=") for text in given]
    if wrong := next(("".join(pair) for pair in pairs if not pair[0].isidentifier() or not pair[1]), None):
        raise ConfigError("A variable of the chat template is written NAME=TEXT.", given=wrong)
    return {name: text for name, _, text in pairs}


def named(folders: Sequence[str]) -> list[str]:
    """One name for each adapter, from its folder, in their order. Raises ConfigError where two are the same."""
    from tarsia.core.errors import ConfigError

    names = [re.sub(r"[^A-Za-z0-9_-]+", "-", Path(folder).absolute().name) for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError(
            "Two adapters have one name.", given=", ".join(folders), do="give each once, in folders of different names"
        )
    return names
