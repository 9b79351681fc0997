"""The verbs put together. Nothing here, nor at the top of a verb's file, imports torch."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NoReturn

import tarsia

VERBS: Mapping[str, str] = {
    "demo": "demo",
    "sites": "sites",
    "advise": "advise",
    "lint": "lint",
    "plan": "plan",
    "quantise": "quantise",
    "train": "train",
    "eval": "evaluate",
    "forgetting": "forgetting",
    "merge": "merge",
    "fold": "fold",
    "export": "export",
    "library": "library",
    "ask": "ask",
    "lab": "lab",
    "serve": "serve",
    "bench": "bench",
    "doctor": "doctor",
}
"""The file of each verb, in the order of the help."""


class Parser(argparse.ArgumentParser):
    """argparse, with refusals as ConfigError and no guessing of shortened options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what is not known is refused by the verb that does not know it."""
        known, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        return known, extra

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the nearest word where one was misspelt."""
        from tarsia.core.errors import ConfigError

        unknown = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown is not None:
            option = next((word for word in unknown[1].split() if word.startswith("-")), "")
            near = difflib.get_close_matches(option.partition("=")[0], self._option_string_actions, 1, 0.6)
            raise ConfigError(
                f"{self.prog} does not take this.",
                given=unknown[1],
                do=f"did you mean {near[0]}?" if near else f"see {self.prog} --help",
            )
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from ([^)]*)\)", message)
        help_ = f"see {self.prog} --help"
        if wrong is None:
            raise ConfigError(f"{message[:1].upper()}{message[1:]}.", do=help_)
        allowed = re.findall(r"[\w-]+", wrong[2])
        near = difflib.get_close_matches(wrong[1], allowed, 1, 0.4)
        raise ConfigError(
            f"There is no {message.split(':')[0].removeprefix('argument ')} of this name.",
            given=wrong[1],
            allowed=", ".join(allowed),
            do=f"did you mean {near[0]}?" if near else help_,
        )


def parser(verb: str | None = None) -> Parser:
    """The whole command line; of the verbs only ``verb`` where that is one, and no other's file is read."""
    top = Parser(prog="tarsia", description=tarsia.__doc__)
    top.add_argument("--version", action="version", version=f"tarsia {tarsia.__version__}")
    verbs = top.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    asked = {name: file for name, file in VERBS.items() if name == verb}
    for name, file in (asked or VERBS).items():
        module = import_module(f"tarsia.cli.{file}")
        sub = verbs.add_parser(name, help=module.HELP, description=module.__doc__)
        module.options(sub)
        sub.set_defaults(run=module.run)
    return top
