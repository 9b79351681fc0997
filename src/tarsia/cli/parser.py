"""The verbs put together. Nothing here, nor at the top of a verb's file, imports torch."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn

import tarsia
from tarsia.cli import (
    advise,
    ask,
    demo,
    doctor,
    evaluate,
    export,
    fold,
    forgetting,
    lab,
    library,
    lint,
    merge,
    plan,
    quantise,
    sites,
    train,
)

VERBS = (
    demo,
    sites,
    advise,
    lint,
    plan,
    quantise,
    train,
    evaluate,
    forgetting,
    merge,
    fold,
    export,
    library,
    ask,
    lab,
    doctor,
)


class Parser(argparse.ArgumentParser):
    """argparse, with refusals as ConfigError and no guessing of shortened options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the nearest word where one was misspelt."""
        from tarsia.core.errors import ConfigError

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


def parser() -> Parser:
    """The whole command line."""
    top = Parser(prog="tarsia", description=tarsia.__doc__)
    top.add_argument("--version", action="version", version=f"tarsia {tarsia.__version__}")
    verbs = top.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    for verb in VERBS:
        sub = verbs.add_parser(verb.NAME, help=verb.HELP, description=verb.__doc__)
        verb.options(sub)
        sub.set_defaults(run=verb.run)
    return top
