"""Keep adapters as carefully as code: versions that never change, tags that move, every byte checked.

A version is NAME (its current one), NAME@3, NAME@TAG or NAME#HASH. The library is the folder of --library, else
TARSIA_LIBRARY, else tarsia/library in the user's data directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tarsia.cli import output, shelf, shelf_remote, shelved
from tarsia.cli.adapted import OF_A_RUN
from tarsia.core.visible import visible

if TYPE_CHECKING:
    from tarsia.library import Library
    from tarsia.library.journal import Entry

HELP = "adapters kept with versions, tags and hashes"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia library``."""
    verbs = parser.add_subparsers(metavar="WHAT", required=True)
    for name, (help_, declare, act) in VERBS.items():
        sub = verbs.add_parser(name, help=help_, description=act.__doc__)
        declare(sub)
        sub.add_argument("--library", metavar="FOLDER", help="the library (default: TARSIA_LIBRARY, or the user's own)")
        sub.add_argument("--json", action="store_true", help="JSON objects, one a line, instead of text")
        sub.set_defaults(act=act)


def run(args: argparse.Namespace) -> int:
    """Do one of the things; 1 where ``verify`` finds a fault."""
    code: int = args.act(args)
    return code


def _library(args: argparse.Namespace, make: bool = False) -> Library:
    from tarsia.library import Library, default_root

    root = args.library or default_root()
    return Library.make(root) if make else Library.open(root)


def _why(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--why", metavar="TEXT", default="", help="a reason, for the journal")
    parser.add_argument("--who", metavar="NAME", help="who does it, for the journal (default: the user)")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="ADAPTER", help=f"an adapter's folder, that of a run, {shelved.FORMS}")
    parser.add_argument("name", metavar="NAME", help="what to call it; a name that is there gets its next version")
    parser.add_argument(
        "--tag", metavar="TAG", action="append", default=[], help="let this tag point at it; again: more"
    )
    parser.add_argument("--new-base", action="store_true", help="allow another base than the name's last version has")
    _why(parser)


def add(args: argparse.Namespace) -> int:
    """Publish an adapter's folder as the next version of a name, which becomes the current one."""
    folder, library = _of_adapter(args.folder), _library(args, make=True)
    how = {"tags": args.tag, "note": args.why, "who": args.who, "new_base": args.new_base}
    shelf.published(library, library.publish(folder, args.name, **how), as_json=args.json)
    return 0


def _of_adapter(given: str) -> Path:
    """The adapter's own folder, where that of its run, or a version of the library, was given."""
    from tarsia.library.content import FILES

    folder = shelved.folder(given)
    inside = folder / OF_A_RUN
    alone = not any((folder / name).exists() for name in FILES)
    return inside if alone and inside.is_dir() else folder


def _list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help="names: cats, 'cat*'")
    parser.add_argument("--tag", metavar="TAG", help="what this tag points at")
    parser.add_argument("--base", metavar="TEXT", help="what the base is called, or how the hash of its weights begins")
    parser.add_argument("--hash", metavar="HEX", help="how the hash of the content begins")
    parser.add_argument("--all", action="store_true", help="every version, not each name's current one alone")


def list_(args: argparse.Namespace) -> int:
    """What there is: each name's current version, or every version that the options choose."""
    library = _library(args)
    found = library.search(args.pattern, tag=args.tag, base=args.base, digest=args.hash, every=args.all)
    if args.json:
        shelf.lines(found)
        return 0
    if not found:
        chosen = any((args.pattern, args.tag, args.base, args.hash))
        said = "no version fits; tarsia library list says what there is" if chosen else "the library is empty"
        print(f"nothing there: {said} ({visible(str(library.places.root))})")
        return 0
    rows = []
    for v in found:
        tags = " ".join(tag for tag in v.tags if args.all or tag != "current")
        when, base = v.at[:16].replace("T", " "), v.base or "(in memory)"
        rows.append((v.name, str(v.number), tags, v.hash[:12], v.methods, shelf.size(v.bytes), when, base))
    shelf.columns(("name", "version", "tags", "hash", "methods", "size", "published", "base"), rows, right=(1, 5))
    return 0


def _one(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REFERENCE", help="NAME, NAME@3, NAME@TAG or NAME#HASH")


def show(args: argparse.Namespace) -> int:
    """The card of a version: recipe, data, results, forgetting, base; and what became of its tags."""
    from dataclasses import asdict

    from tarsia.library import card

    library = _library(args)
    version, held = card.read(library, args.reference)
    if args.json:
        output.line({**shelf.plain(version), "folder": str(library.folder(version)), "card": asdict(held)})
        return 0
    shelf.show(version, held, library.folder(version))
    return 0


def _two(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a version")
    parser.add_argument("second", metavar="B", help="another")
    parser.add_argument("--cards", action="store_true", help="compare what is written of them alone, not their tensors")


def diff(args: argparse.Namespace) -> int:
    """What lies between two versions: recipe, data, results, sites, and how far apart their tensors are."""
    from dataclasses import asdict

    from tarsia.library.differ import differ

    found = differ(_library(args), args.first, args.second, tensors=not args.cards)
    if args.json:
        output.line({**asdict(found), "versions": [shelf.plain(version) for version in found.versions]})
        return 0
    shelf.difference(found)
    return 0


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("references", metavar="REFERENCE", nargs="*", help="versions (none: everything)")
    parser.add_argument("--repair", action="store_true", help="first put right what can be made anew from the rest")


def verify(args: argparse.Namespace) -> int:
    """Hash every file of every content, and hold index, records, tags and journal to one another; 1 where one fails."""
    from tarsia.library import default_root
    from tarsia.library.places import Places
    from tarsia.library.repair import repair
    from tarsia.library.verify import verify as look

    if args.repair:  # of what may have lost even the file that says that it is a library
        mended = repair(Places(Path(args.library or default_root())))
        for kind, texts in (("repaired", mended.done), ("lost", mended.lost)):
            for text in texts:
                output.line({kind: text}) if args.json else print(f"{kind}: {visible(text)}")
    library = _library(args)
    found = look(library.places, args.references)
    for fault in found.faults:
        values = {"file": str(fault.file), "fault": fault.what}
        output.line(values) if args.json else print(f"FAULT {visible(str(fault))}")
    counts = {"versions": found.versions, "objects": found.objects, "bytes": found.bytes}
    if args.json:
        output.line({**counts, "faults": len(found.faults), "garbage": [str(path) for path in found.garbage]})
    else:
        looked = f"{found.versions} versions, {found.objects} contents, {shelf.size(found.bytes)}"
        print(f"{looked}: {len(found.faults) or 'no'} fault{'s' if len(found.faults) != 1 else ''}")
        if found.garbage:
            print(f"{len(found.garbage)} things belong to no version: tarsia library gc removes them")
        shelf.remedy(library.places, found.faults)
    return int(bool(found.faults))


def _tag_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REFERENCE", help="a version; with --remove a name")
    parser.add_argument("tag", metavar="TAG", help="stable, for one")
    parser.add_argument("--remove", action="store_true", help="take the tag away from the name")
    _why(parser)


def tag(args: argparse.Namespace) -> int:
    """Let a tag point at a version, wherever it pointed before."""
    library = _library(args)
    if args.remove:
        return _moved(args, library.untag(args.reference, args.tag, why=args.why, who=args.who))
    return _moved(args, library.tag(args.reference, args.tag, why=args.why, who=args.who))


def _rollback_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME[@TAG]", help="the name's current version, or one of its tags")
    parser.add_argument("--to", metavar="N", type=int, help="the version (default: where it was before)")
    _why(parser)


def rollback(args: argparse.Namespace) -> int:
    """Let a name's current version, or a tag, be an earlier one again."""
    from tarsia.core.errors import LibraryError
    from tarsia.library import Reference

    asked = Reference.parse(args.name)
    if asked.tag is None:
        raise LibraryError("A tag is rolled back, not a version.", given=args.name, allowed="NAME or NAME@TAG")
    return _moved(args, _library(args).rollback(asked.name, asked.tag, to=args.to, why=args.why, who=args.who))


def _moved(args: argparse.Namespace, entry: Entry) -> int:
    if args.json:
        from dataclasses import asdict

        output.line({key: value for key, value in asdict(entry).items() if key != "ends"})
        return 0
    was, is_ = (f"version {n}" if n is not None else "nothing" for n in (entry.before, entry.after))
    print(f"{entry.name}@{entry.tag}: {is_} (was {was})")
    return 0


def _gc_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retire",
        metavar="NAME@N",
        action="append",
        default=[],
        help="give up this version first, for good; again: more",
    )
    _why(parser)


def gc(args: argparse.Namespace) -> int:
    """Remove what no version refers to, and what killed processes left; never what another is publishing."""
    from tarsia.core.errors import LibraryError
    from tarsia.library import Reference
    from tarsia.library.sweep import sweep

    library = _library(args)
    asked = [Reference.parse(text) for text in args.retire]
    for one in asked:
        if one.number is None:
            raise LibraryError("A version to give up is named by its number.", given=str(one), allowed="NAME@N")
    for one in asked:
        library.retire(one.name, one.number or 0, why=args.why, who=args.who)
    swept = sweep(library.places)
    if args.json:
        retired = [str(one) for one in asked]
        sizes = {"stages": swept.stages, "bytes": swept.bytes}
        output.line({"retired": retired, "objects": list(swept.objects), "records": list(swept.records), **sizes})
        return 0
    counts = {"content": len(swept.objects), "record": len(swept.records), "dead stage": swept.stages}
    told = ", ".join(f"{n} {what}{'' if n == 1 else 's'}" for what, n in counts.items())
    print(f"removed {told}: {shelf.size(swept.bytes)}")
    return 0


Verb = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]

VERBS: Mapping[str, Verb] = {
    "add": ("publish an adapter's folder as the next version of a name", _add_options, add),
    "list": ("what there is", _list_options, list_),
    "show": ("the card of a version", _one, show),
    "diff": ("what lies between two versions", _two, diff),
    "verify": ("look at every byte", _verify_options, verify),
    "tag": ("let a tag point at a version", _tag_options, tag),
    "rollback": ("let a name or a tag be an earlier version again", _rollback_options, rollback),
    "gc": ("remove what belongs to no version", _gc_options, gc),
    **shelf_remote.VERBS,
}
"""What ``tarsia library`` can do: help, options and action of each."""
