"""A base with its adapters, as the verbs that answer questions open it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tarsia.cli import output, shelved

if TYPE_CHECKING:
    from tarsia.adapter import Adapter, FourBits, Host
    from tarsia.core.compose import Composition
    from tarsia.core.errors import TarsiaError
    from tarsia.data import Sample

AS_TRAINED = "as trained"
OF_A_RUN = "adapter"
"""The folder that training leaves an adapter in, inside that of the run."""


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the model, its adapters and where it runs."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or mini-1")
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        action="append",
        default=[],
        help=f"an adapter to put in, {shelved.FORMS}; may be given again, each then acts over those before it",
    )
    parser.add_argument(
        "--compose",
        metavar="HOW",
        help="how the adapters act together, by the names of their folders: 'Average(a, b)', 'Stack(b, Average(a, c, "
        "weights=(0.3, 0.7)))', or a .json file of it (default: a Stack, the first lowest)",
    )
    parser.add_argument("--device", default="auto", help="where it runs (default: a GPU where there is one)")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="the base's (default: bfloat16 where the machine computes it)",
    )
    parser.add_argument(
        "--four-bits",
        metavar="FORM",
        default=AS_TRAINED,
        help="the base in 4 bits: nf4, fp4 or int4, or as a recipe has it ('{kind: nf4, nested: false}'); none, to "
        "judge an adapter over the files' own numbers on purpose (default: as the adapters were trained)",
    )
    resolution_option(parser)
    parser.add_argument(
        "--variable",
        metavar="NAME=TEXT",
        action="append",
        default=[],
        help="what the chat template leaves open, such as date_string=...; may be given again",
    )


def resolution_option(parser: argparse.ArgumentParser) -> None:
    """Declare how large pictures are shown."""
    parser.add_argument(
        "--resolution",
        metavar="N",
        default=AS_TRAINED,
        help="most pixels along a picture's longer side: larger ones are shrunk; none: they are shown as they are "
        "(default: as the adapters were trained)",
    )


def opened(args: argparse.Namespace) -> Host:
    """The base with every adapter put in, named by `named`, and acting as composed. Nothing is ever left out:
    an adapter that is missing, broken or of another base is refused, and so is one whose outputs are not those of
    the day it was saved."""
    from tarsia.adapter import load, open_base, prove, put
    from tarsia.adapter.host import QuantisedAlready
    from tarsia.core.attach import activate
    from tarsia.core.errors import ConfigError

    output.no_bars()
    names = named(args.adapter)
    folders = {given: shelved.folder(given) for given in args.adapter}
    acting = _acting(args.compose, names)
    variables = _variables(args.variable)
    form, chosen = _form(args, folders)
    place = {"dtype": args.precision, "device": args.device}
    size = resolution(folders, args.resolution)
    try:
        host = open_base(args.model, **place, variables=variables, four_bits=form, resolution=size)
    except QuantisedAlready as error:
        if chosen:
            raise
        raise _trained_elsewhere(folders.values(), error) from None
    if args.four_bits == "none" and host.quantisation is not None:
        raise ConfigError(
            "The base's files hold 4 bits: there are no other numbers to open.",
            given=f"--four-bits none, {args.model}",
            do="leave --four-bits out, or give the base in 16 bits",
        )
    for name, folder in zip(names, folders.values(), strict=True):
        adapter = load(folder, host)
        activate(host.model)
        put(host, adapter, name, allow=("quantisation",) if chosen else ())
        _note_gate(name, adapter)
        if _other_form(host, name, adapter) or adapter.probe is None:
            continue
        if (why := adapter.probe.provable(host)) is None:
            prove(host, name, adapter.probe)
        else:
            print(f"tarsia: note: the adapter {name} is not proved here: {why}", file=sys.stderr)
    activate(host.model, *acting)
    return host


def _acting(text: str | None, names: Sequence[str]) -> Sequence[Composition | None]:
    """What acts: the adapters one over another, or as ``text`` has it.

    Raises ConfigError where it names one that is not there, leaves one out, or tells rows apart.
    """
    from tarsia.adapter.compositions import read
    from tarsia.core.compose import Parallel, Switch, members
    from tarsia.core.errors import ConfigError
    from tarsia.core.select import near
    from tarsia.core.written import parsed

    if text is None:
        return names
    composition = read(Path(text)) if text.endswith(".json") else parsed(text)
    used = members(composition)
    unknown = [name for name in used if name not in names]
    if unknown:
        raise ConfigError(
            f"No adapter {unknown[0]!r} is there.",
            given=f"--compose {composition}",
            allowed=", ".join(names) or "(none)",
            do=near(unknown[0], names) if names else "give --adapter FOLDER",
        )
    if isinstance(composition, Switch | Parallel):
        some, every = ", ".join(used), len(used) > 1
        raise ConfigError(
            f"A {type(composition).__name__} tells the rows of one batch apart, and here all rows are alike.",
            given=f"--compose {composition}",
            do=f"write Stack({some}), or Average({some})" if every else f"write {some}" if some else "leave it out",
        )
    left = [name for name in names if name not in used]
    if left:
        raise ConfigError(
            f"The adapter {left[0]} has no part in the composition.",
            given=f"--compose {composition}",
            do="name it there, or leave its --adapter out",
        )
    return [composition]


def _form(args: argparse.Namespace, folders: Mapping[str, Path]) -> tuple[FourBits | None, bool]:
    """The form to open the base in, and whether it was chosen here, whatever the adapters say of themselves."""
    from tarsia.adapter import FourBits, recorded
    from tarsia.core.errors import ConfigError

    if args.four_bits == "none":
        return None, True
    if args.four_bits != AS_TRAINED:
        return described(args.four_bits), True
    known = {given: found for given, folder in folders.items() if (found := recorded(folder)) is not None}
    forms = {given: FourBits.of(found.quantisation) for given, found in known.items()}
    if len(set(forms.values())) > 1:
        raise ConfigError(
            "The adapters were trained over bases in different forms.",
            given="; ".join(f"{given}: {'16 bits' if f is None else f.text}" for given, f in forms.items()),
            do="choose one for all on purpose: --four-bits none, or --four-bits nf4",
        )
    return next(iter(forms.values()), None), False


def resolution(folders: Mapping[str, Path], asked: str) -> int | None:
    """The most pixels along a picture's longer side; what is not as the base alone would see it is said on stderr.

    ``folders`` are the adapters', by what was given for each.
    Raises ConfigError where it is no number, or the adapters were trained at different ones and none is chosen.
    """
    from tarsia.adapter import resolution_of
    from tarsia.adapter.resolution import one_resolution
    from tarsia.core.errors import ConfigError

    if asked == AS_TRAINED:
        do = "choose one for all on purpose: --resolution 336, say, or --resolution none"
        found = next(iter(one_resolution(folders, do)), None)
        if found is not None:
            print(
                f"tarsia: note: pictures have at most {found} pixels along the longer side, as in the adapter's "
                "training (--resolution)",
                file=sys.stderr,
            )
        return found
    if asked != "none" and not (asked.isdecimal() and int(asked)):
        raise ConfigError(
            "That is no resolution.", given=f"--resolution {asked}", allowed="a whole number above 0, or none"
        )
    chosen = None if asked == "none" else int(asked)
    for given, folder in folders.items():
        for found in resolution_of(folder):
            if found != chosen:
                print(
                    f"tarsia: warning: the adapter in {given} was trained at resolution {found or 'none'}, and is "
                    f"shown pictures at {chosen or 'none'}, as asked for",
                    file=sys.stderr,
                )
    return chosen


def _trained_elsewhere(folders: Iterable[Path], error: TarsiaError) -> TarsiaError:
    """The refusal of adapters that were trained over a rounded base, where the files hold the 4 bits."""
    from tarsia.adapter import load
    from tarsia.core.errors import BaseMismatch

    bases = sorted({base for folder in folders if (base := load(folder).base) is not None})
    return BaseMismatch(
        "The adapter was trained over a base that was rounded as it was opened, and this one's files are in 4 bits.",
        given=error.given,
        do=f"open the base that it was trained on{': ' if bases else ''}{', '.join(bases)}",
    )


def described(text: str) -> FourBits:
    """A form as it is written on the command line. Raises ConfigError where it is none."""
    from tarsia.adapter.four_bits import described
    from tarsia.core.errors import ConfigError
    from tarsia.train.reading import parse_value

    do = "write --four-bits nf4, or --four-bits '{kind: nf4, nested: false}'"
    try:
        value = parse_value(text)
    except ConfigError as error:
        raise ConfigError("That is no form of 4 bits.", given=f"--four-bits {error.given}", do=do) from None
    try:
        return described(value if isinstance(value, dict) else {"kind": value})
    except ConfigError as error:
        raise ConfigError(error.what, given=f"--four-bits {text!r}", allowed=error.allowed, do=do) from None


def _other_form(host: Host, name: str, adapter: Adapter) -> bool:
    """Say on stderr where an adapter is judged over another form of its base than it was trained over."""
    trained = adapter.fingerprint
    if trained is None or trained.quantisation == host.fingerprint.quantisation:
        return False
    print(
        f"tarsia: warning: the adapter {name} was trained over another form of this base, as asked for: "
        "its outputs are not those of its training, and are not proved",
        file=sys.stderr,
    )
    return True


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
    """One name for each adapter, in their order: its folder's, or its run's where training named the folder, or its
    name in the library.

    A name that two would have, or that a model can not hold, is made longer by the folder above, or by the version.
    Raises ConfigError where an adapter is given twice, or two have one name all the way up.
    """
    from tarsia.core.errors import ConfigError

    known = [_names(folder) for folder in folders]
    lengths = [1] * len(known)
    while True:
        names = [held[min(length, len(held)) - 1] for held, length in zip(known, lengths, strict=True)]
        poor = [i for i, name in enumerate(names) if names.count(name) > 1 or not _usable(name)]
        if not poor:
            return names
        if all(lengths[i] >= len(known[i]) for i in poor):
            raise ConfigError(
                "Two adapters have one name.",
                given=", ".join(folders[i] for i in poor),
                do="give each once, in folders of different names",
            )
        for i in poor:
            lengths[i] += 1


def _names(given: str) -> list[str]:
    """What an adapter may be called, the shortest first: its folder's name, the same with the folder above, ...

    Where every run has a folder of this name, the run's instead.
    """
    if (names := shelved.names(given)) is not None:
        return [_plain(name) for name in names]
    parts = [part for text in os.path.abspath(given).split(os.sep) if (part := _plain(text))]
    parts = parts[:-1] if parts[-1:] == [OF_A_RUN] and len(parts) > 1 else parts or [OF_A_RUN]
    return ["-".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


def _usable(name: str) -> bool:
    """Whether a model has no use of its own for the name."""
    from torch import nn

    return not hasattr(nn.ModuleDict(), name)
