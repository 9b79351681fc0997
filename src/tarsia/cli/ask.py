"""Ask a model one question, with pictures and adapters if there are any, and print its answer."""

from __future__ import annotations

import argparse
from pathlib import Path

from tarsia.cli import adapted, output

HELP = "ask a model a question"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia ask``."""
    adapted.options(parser)
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help="a picture, shown before the question; may be repeated",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    parser.add_argument("--json", action="store_true", help="one JSON object: answer, adapters, base, digest, form")


def run(args: argparse.Namespace) -> int:
    """Print the answer."""
    from tarsia.core.errors import ConfigError, DataError
    from tarsia.data import PICTURE, Message, Picture, Sample
    from tarsia.evaluate import generate

    if args.max_new_tokens < 1:
        raise ConfigError("An answer has at least one token.", given=f"--max-new-tokens {args.max_new_tokens}")
    pictures = tuple(Picture(Path(name), name, "the question", 0) for name in args.image)
    for picture in pictures:
        if not Path(picture.name).is_file():
            raise DataError("There is no such picture.", given=picture.name, do="check the path")
        picture.load()  # a missing file is told before a large model is read
    asked = Message("user", (*(PICTURE for _ in pictures), args.question))
    sample = Sample((asked,), pictures, "the question", 0)
    host = adapted.opened(args)
    effects = adapted.warn_without_effect(host, [sample])
    answer = generate(host, [sample], args.max_new_tokens)[0]
    if args.json:
        base = {"base": host.name, "digest": host.fingerprint.weights, "form": host.form}
        output.line({"answer": answer, "adapters": effects, **base})
    else:
        print(answer)
    return 0
