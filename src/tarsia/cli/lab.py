"""Run a chapter of the lab: an experiment that ends with PASS or FAIL of a claim, and writes a page about it."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tarsia.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tarsia.labs.frame.chapter import Chapter, Show, Verdict
    from tarsia.labs.frame.result import Result

HELP = "claims of the field as experiments that can fail"
ALL = "all"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia lab``."""
    parser.add_argument("names", metavar="CHAPTER", nargs="*", help="which to run, or all; none: say what there is")
    parser.add_argument("--out", metavar="FOLDER", default="lab-out", help="where pages go (default: lab-out)")
    parser.add_argument(
        "--with", dest="places", metavar="NAME=FOLDER", action="append", default=[], help="smol=FOLDER or data=FOLDER"
    )
    parser.add_argument("--redraw", action="store_true", help="measure nothing: page and picture from --out's result")


def run(args: argparse.Namespace) -> int:
    """List the chapters, or run some; 1 where a claim fails."""
    from tarsia.labs.chapters import CHAPTERS
    from tarsia.labs.frame import places

    if not args.names:
        contents(CHAPTERS)
        return 0
    output.no_bars()
    chosen = choose(args.names, CHAPTERS)
    have = places.find(folders(args.places))
    skipped = []
    if ALL in args.names and not args.redraw:
        skipped = [c for c in chosen if set(c.needs) - set(have)]
        chosen = [c for c in chosen if c not in skipped]
    for chapter in chosen:
        places.require(chapter.name, () if args.redraw else chapter.needs, have)
    verdicts = [one(chapter, Path(args.out), have, args.redraw) for chapter in chosen]
    contents_page(CHAPTERS, Path(args.out))
    for chapter in skipped:
        print(f"SKIPPED {chapter.name}: needs {', '.join(chapter.needs)} (see --with)")
    return int(any(verdict == "FAIL" for verdict in verdicts))


def contents(chapters: Mapping[str, Chapter]) -> None:
    """What there is: each chapter with its question."""
    rows = [
        (c.name, c.question, f"{c.minutes:g} min", ", ".join([*c.needs, *(f"({name})" for name in c.uses)]))
        for c in chapters.values()
    ]
    output.table("chapters of the lab (what they can also use in brackets)", ("", "asks", "takes", "needs"), rows)


def choose(names: Sequence[str], chapters: Mapping[str, Chapter]) -> list[Chapter]:
    """The chapters of these names, in the order of reading. Raises ConfigError for a name that is none."""
    from tarsia.core.errors import ConfigError

    for name in names:
        if name not in chapters and name != ALL:
            near = difflib.get_close_matches(name, chapters, 1, 0.4)
            raise ConfigError(
                "The lab has no chapter of this name.",
                given=name,
                allowed=", ".join([*chapters, ALL]),
                do=f"did you mean {near[0]}?" if near else None,
            )
    return [c for c in chapters.values() if c.name in names or ALL in names]


def folders(given: Sequence[str]) -> dict[str, Path]:
    """Folders by name from NAME=FOLDER. Raises ConfigError where one is not of this form."""
    from tarsia.core.errors import ConfigError

    pairs = [text.partition("=") for text in given]
    for name, _, folder in pairs:
        if not name or not folder:
            raise ConfigError("A folder is given with its name.", given=f"--with {name}", allowed="--with NAME=FOLDER")
    return {name: Path(folder) for name, _, folder in pairs}


def one(chapter: Chapter, out: Path, have: Mapping[str, Path], redraw: bool) -> Verdict:
    """Run one chapter, or read its result, write its page and say what became of its claim."""
    from tarsia.labs.frame import page, result
    from tarsia.labs.frame.chapter import Desk

    place = page.files(chapter, out)
    if redraw:
        made = result.read(place["result"])
    else:
        with progress(chapter.name) as show:
            known = {name: folder for name, folder in have.items() if name in (*chapter.needs, *chapter.uses)}
            made = result.perform(chapter, Desk(out / ".work" / chapter.name, known, show))
    page.publish(chapter, made, out)
    return report(chapter, made, place["page"])


def report(chapter: Chapter, made: Result, page: Path) -> Verdict:
    """Print every bound and the verdict."""
    output.table(
        chapter.title,
        ("", "measured", "must be", ""),
        [
            (b.what, b.measured(made.found, made.lacking), b.limits, str(b.judge(made.found, made.lacking)))
            for b in chapter.bounds
        ],
        right=("measured",),
    )
    for name in made.lacking:
        print(f"not measured: what needs {name} (see --with)")
    verdict = made.verdict(chapter)
    print(f"{verdict} {chapter.name}: {chapter.claim}\npage: {page}")
    return verdict


def contents_page(chapters: Mapping[str, Chapter], out: Path) -> None:
    """Write the list of chapters beside their pages."""
    from tarsia.labs.frame import page, result

    result.write([(out / page.LIST, page.listing(chapters, out).encode())])


@contextmanager
def progress(title: str) -> Iterator[Show]:
    """A bar on stderr, or a line a step where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)

        def show(share: float, what: str) -> None:
            bar.update(task, completed=share, description=f"{title}: {what}")
            if not console.is_terminal:
                print(f"{title} {share:4.0%} {what}", file=sys.stderr, flush=True)

        yield show
