"""Serve one base with many adapters over HTTP, in the form of OpenAI's chat completions, until interrupted."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarsia.serve.http.settings import Settings
    from tarsia.serve.wire import Configure

HELP = "serve a base and a library of adapters over HTTP"
SIZES = ("cache_bytes", "picture_bytes", "adapter_bytes")
COUNTS = ("threads", "readers", "max_rows", "chunk", "max_tokens", "resolution")
FORMS = ("nf4", "fp4", "int4")


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia serve``."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder, a hub id, or mini-1")
    _of_the_worker(parser.add_argument_group("the base and its adapters").add_argument)
    _of_http(parser.add_argument_group("who may ask for what").add_argument)
    add = parser.add_argument
    add("--new-key", metavar="NAME", help="make a key: the secret, told once, and what to write in the file of --keys")
    add("--drain", metavar="SECONDS", type=float, default=30.0, help="time for what runs at the end (default: 30)")
    add("--log", metavar="FILE", type=Path, help="a line of JSON for every request goes there (default: stderr)")
    add("--json", action="store_true", help="when ready, one JSON object instead of text")


def _of_the_worker(add: Any) -> None:
    add("--library", metavar="DIR", type=Path, help="of adapters (default: the user's, where there is one)")
    add("--unproved", choices=("refuse", "allow"), default="refuse", help="adapters that nothing proves: refuse, allow")
    add("--precision", "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="the base's")
    add("--device", default="auto", help="where it runs (default: a GPU where there is one)")
    add(
        "--four-bits", metavar="FORM", help=f"the base in 4 bits: {', '.join(FORMS)}, or '{{kind: nf4, nested: false}}'"
    )
    add("--resolution", metavar="N", type=int, help="most pixels along a picture's longer side")
    add("--threads", metavar="N", type=int, help="that compute (default: all cores)")
    add("--readers", metavar="N", type=int, default=2, help="threads that decode pictures (default: 2)")
    add("--cache-bytes", metavar="SIZE", default="1GiB", help="keys and values kept (default: 1GiB)")
    add("--picture-bytes", metavar="SIZE", default="256MiB", help="encoded pictures kept (default: 256MiB)")
    add("--adapter-bytes", metavar="SIZE", default="1GiB", help="adapters kept in memory (default: 1GiB)")
    add("--max-rows", metavar="N", type=int, default=32, help="answers written at once (default: 32)")
    add("--chunk", metavar="TOKENS", type=int, default=512, help="of prompts read in one step (default: 512)")


def _of_http(add: Any) -> None:
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="to listen at (default: 127.0.0.1, this machine alone)")
    add("--port", metavar="N", type=int, default=8000, help="(default: 8000; 0: one that is free)")
    add("--name", metavar="NAME", help="what the base is asked for by (default: as MODEL has it)")
    add("--keys", metavar="FILE", type=Path, help="keys and what each may ask for; needed where others can ask")
    add("--called", metavar="HOST", action="append", help="a name by which clients reach the server; again: more")
    add("--max-tokens", metavar="N", type=int, default=4096, help="longest answer (default: 4096)")
    add(
        "--allow-host",
        metavar="HOST",
        action="append",
        default=[],
        help="pictures may be fetched from there; again: more",
    )
    add("--loading", action="store_true", help="adapters may be loaded by request, from the library")
    add("--allow-load", metavar="DIR", type=Path, action="append", default=[], help="and from below DIR; again: more")
    add("--no-docs", action="store_true", help="no pages at /docs and /openapi.json")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted; 1 where requests were given up at the end."""
    if args.new_key is not None:
        return _new_key(args.new_key)
    from tarsia.cli import serving

    asked = serving.Asked(
        configure=configure(args), settings=settings(args), host=args.host, port=args.port, drain=args.drain,
        log=args.log, as_json=args.json,
    )  # fmt: skip
    return serving.serve(asked)


def configure(args: argparse.Namespace) -> Configure:
    """What the worker is told. Raises TarsiaError for what makes no sense."""
    from tarsia.core.errors import ConfigError
    from tarsia.library.cache import limit_of
    from tarsia.library.places import Places, default_root
    from tarsia.serve.wire import Configure

    if args.model is None:
        raise ConfigError("Which base is to be served?", do="tarsia serve MODEL; mini-1 is there without a download")
    for name in COUNTS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError("This is too small.", given=f"{_option(name)} {value}", allowed="at least 1")
    sizes = {name: limit_of(getattr(args, name)) for name in SIZES}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(
                "This is too small.", given=f"{_option(name)} {getattr(args, name)}", allowed="1 byte or more"
            )
    library = args.library or default_root()
    if not Places(library).marker.is_file():
        if args.library is not None:
            raise ConfigError(
                "There is no library.", given=library, do=f"tarsia library add ADAPTER NAME --library {library}"
            )
        library = None
    return Configure(
        model=args.model,
        library=None if library is None else str(library),
        dtype=args.precision,
        device=args.device,
        four_bits=_four_bits(args.four_bits),
        resolution=args.resolution,
        threads=args.threads or 0,
        readers=args.readers,
        rows=args.max_rows,
        chunk=args.chunk,
        unproved=args.unproved == "allow",
        cache_bytes=sizes["cache_bytes"],
        picture_bytes=sizes["picture_bytes"],
        adapter_bytes=sizes["adapter_bytes"],
    )


def _four_bits(text: str | None) -> dict[str, Any] | None:
    """A form of 4 bits as the worker takes it; whether it is one is told there."""
    import yaml

    from tarsia.core.errors import ConfigError

    if text is None:
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, str | dict):
        raise ConfigError("That is no form of 4 bits.", given=f"--four-bits {text}", allowed=", ".join(FORMS))
    return value if isinstance(value, dict) else {"kind": value}


def settings(args: argparse.Namespace) -> Settings:
    """What the HTTP side may do. Raises TarsiaError for what makes no sense."""
    from tarsia.core.errors import ConfigError
    from tarsia.serve.http.keys import Keyring
    from tarsia.serve.http.listen import check_host
    from tarsia.serve.http.settings import Limits, Remote, Settings

    if not 0 <= args.port < 65536:
        raise ConfigError("There is no such port.", given=f"--port {args.port}", allowed="0 to 65535")
    if not 0 <= args.drain < float("inf"):
        raise ConfigError("That is no time.", given=f"--drain {args.drain}", allowed="seconds, 0 or more")
    for folder in args.allow_load:
        if not folder.is_dir():
            raise ConfigError("There is no such folder.", given=f"--allow-load {folder}", do="check the path")
    made = Settings(
        name=args.name,
        keys=None if args.keys is None else Keyring.read(args.keys),
        hosts=None if args.called is None else tuple(args.called),
        limits=replace(Limits(), tokens=args.max_tokens),
        remote=Remote(tuple(args.allow_host)),
        loading=args.loading or bool(args.allow_load),
        sources=tuple(str(folder.resolve()) for folder in args.allow_load),
        docs=not args.no_docs,
    )
    check_host(args.host, made)
    return made


def _new_key(name: str) -> int:
    from pydantic import ValidationError

    from tarsia.core.errors import ConfigError
    from tarsia.serve.http.keys import new_key

    try:
        secret, entry = new_key(name, name)
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"]
        raise ConfigError("This is no name for a key.", given=f"--new-key {name!r}", allowed=why) from None
    print(f"secret, which nobody can tell again: {secret}", file=sys.stderr)
    print(f"# below keys: in the file of --keys; adapters: ['*'] for all\n{entry}", end="")
    return 0


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
