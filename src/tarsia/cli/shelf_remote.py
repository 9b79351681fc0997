"""What brings adapters into a library from elsewhere, and from there to elsewhere: import, push, pull."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tarsia.cli import output, shelf

if TYPE_CHECKING:
    from tarsia.library.remote import Remote


def _remote_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("remote", metavar="REMOTE", help="a folder, or an address that fsspec knows: s3://bucket/path")


def _publish_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tag", metavar="TAG", action="append", default=[], help="let this tag point at it; again: more"
    )
    parser.add_argument("--new-base", action="store_true", help="allow another base than the name's last version has")
    parser.add_argument("--who", metavar="NAME", help="who does it, for the journal (default: the user)")


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, or a hub id: owner/name")
    parser.add_argument("name", metavar="NAME", help="what to call it; a name that is there gets its next version")
    parser.add_argument("--base", metavar="MODEL", help="the base of an adapter that PEFT made: a folder or a hub id")
    parser.add_argument("--revision", metavar="REVISION", help="a commit, a branch or a tag of the hub's repository")
    parser.add_argument(
        "--allow", metavar="WHAT", action="append", default=[], help='"base name": the base has another name here'
    )
    _publish_options(parser)


def import_(args: argparse.Namespace) -> int:
    """Publish an adapter of PEFT's, from a folder or the hub, held to its base; or one of ours from the hub."""
    from tarsia.library import Library, default_root
    from tarsia.library.arrive import arrive

    library = Library.make(args.library or default_root())
    how = {"tags": args.tag, "new_base": args.new_base, "who": args.who}
    made = arrive(library, args.source, args.name, base=args.base, revision=args.revision, allow=args.allow, **how)
    shelf.published(library, made, as_json=args.json)
    return 0


def _push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("references", metavar="REFERENCE", nargs="+", help="NAME, NAME@3, NAME@TAG or NAME#HASH")
    parser.add_argument("--to", dest="remote", metavar="REMOTE", required=True, help="a folder, or s3://bucket/path")


def push(args: argparse.Namespace) -> int:
    """Bring versions to a remote: files first, the record last, and nothing that is there already."""
    from tarsia.library import Library, default_root

    library, remote = Library.open(args.library or default_root()), _remote(args)
    for reference in args.references:
        done = remote.push(library, reference)
        if args.json:
            values = {"remote": remote.said, "name": done.listed.name, "number": done.listed.number}
            output.line({**values, "hash": done.listed.hash, "fresh": done.fresh, "sent": done.sent})
        else:
            said = "" if done.fresh else ", was there already"
            print(f"{reference} is {done.listed.reference} at {remote.said}{said}; {shelf.size(done.sent)} sent")
    return 0


def _pull_options(parser: argparse.ArgumentParser) -> None:
    _remote_options(parser)
    parser.add_argument(
        "references", metavar="REFERENCE", nargs="*", help="NAME, NAME@3 or NAME#HASH (none: list them)"
    )
    parser.add_argument("--name", metavar="NAME", help="what to call it here")
    parser.add_argument("--cache", metavar="FOLDER", help="where what is fetched is kept (default: below TARSIA_CACHE)")
    parser.add_argument("--cache-limit", metavar="SIZE", default="10GiB", help="of that folder (default: 10GiB)")
    _publish_options(parser)


def pull(args: argparse.Namespace) -> int:
    """Publish versions of a remote here, every byte hashed; without a reference, say what the remote has."""
    from tarsia.core.errors import ConfigError
    from tarsia.library import Library, default_root

    remote = _remote(args)
    if not args.references:
        found = remote.list()
        if not found and not args.json:
            print(f"nothing there: {remote.said}")
        for one in found:
            values = {"name": one.name, "number": one.number, "hash": one.hash}
            output.line(values) if args.json else print(f"{one.reference}  {one.hash[:12]}")
        return 0
    if args.name is not None and len(args.references) > 1:
        raise ConfigError(
            "One name is for one version.", given=f"--name {args.name}, {len(args.references)} references"
        )
    library = Library.make(args.library or default_root())
    how = {"tags": args.tag, "new_base": args.new_base, "who": args.who}
    for reference in args.references:
        shelf.published(library, remote.pull(library, reference, args.name, **how), as_json=args.json)
    return 0


def _remote(args: argparse.Namespace) -> Remote:
    from pathlib import Path

    from tarsia.library.cache import Cache, default_cache, limit_of
    from tarsia.library.remote import Remote

    folder = getattr(args, "cache", None)
    limit = limit_of(getattr(args, "cache_limit", "10GiB"))
    return Remote(args.remote, Cache(Path(folder) if folder else default_cache(), limit))


Verb = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]

VERBS: Mapping[str, Verb] = {
    "import": ("publish an adapter of PEFT's, or one from the hub", _import_options, import_),
    "push": ("bring versions to a remote", _push_options, push),
    "pull": ("publish versions of a remote here", _pull_options, pull),
}
"""Help, options and action of each."""
