"""``tarsia plan --fit``: the recipes that fit into so much memory, as a table and as files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarsia.cli import output

if TYPE_CHECKING:
    from tarsia.plan.fit import Found
    from tarsia.plan.proposal import Proposal
    from tarsia.plan.time import Speeds
    from tarsia.train.recipe import Recipe


def fitted(recipe: Recipe, given: str, speeds: Speeds | None, write: Path | None, as_json: bool) -> int:
    """Search, print and write; 1 where nothing fits. ``speeds`` are for a size: a card has its own."""
    from rich.console import Console
    from rich.progress import Progress

    from tarsia.plan.fit import budget, fitting
    from tarsia.plan.proposal import write as write_files
    from tarsia.plan.time import OfCard
    from tarsia.plan.variants import EFFORT

    size, card = budget(given)
    speeds = speeds if card is None else OfCard(card)
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("rehearsing", total=EFFORT.rehearsals)
        found = fitting(
            recipe,
            size,
            speeds=speeds,
            show=lambda number, what: bar.update(task, completed=number, description=f"rehearsing: {what}"),
        )
    files = [] if write is None or not found.proposals else write_files(found.proposals, write, size, found.basis)
    if as_json:
        output.line(_plain(found, files))
    else:
        _show(found, files, measured=speeds is not None)
    return 0 if found.proposals else 1


def _show(found: Found, files: list[Path], measured: bool) -> None:
    if found.proposals:
        seconds = ("s a step",) if measured else ()
        columns = ("", "what changes", "what it gives up", "GB", *seconds, "time")
        rows = [
            (
                str(number),
                proposal.text,
                ".\n".join(proposal.gives_up) or "nothing",
                giga(proposal.figures.total),
                *((f"{proposal.figures.seconds:.3g}",) if measured else ()),
                f"x {proposal.slower:.2f}",
            )
            for number, proposal in enumerate(found.proposals, 1)
        ]
        title = f"Fits into {giga(found.budget)} GB, best first (planned, at most {giga(_limit(found))} GB)"
        output.table(title, columns, rows, right=("GB", "s a step", "time"))
    else:
        for line in nothing(found):
            print(line)
    print()
    for line in about(found):
        print(line)
    for number, path in enumerate(files, 1):
        print(f"{number}: {path}", file=sys.stderr)
    if found.proposals and found.proposals[0].changes:
        best = files[0] if files else None
        print(f"tarsia train {best}" if best else "--write DIR writes each as a recipe that `tarsia train` takes")


def nothing(found: Found) -> list[str]:
    """That nothing fits: the smallest, what it has too much, and what takes it."""
    least = found.smallest
    figures = least.figures
    most = sorted(figures.parts.items(), key=lambda item: -item[1])[:4]
    held = ", ".join(f"{name} {giga(size)} GB" for name, size in most)
    return [
        f"Nothing that was looked at fits into {giga(found.budget)} GB (planned, at most {giga(_limit(found))} GB).",
        f"As it is, the recipe needs {giga(found.as_it_is.figures.total)} GB.",
        f"The smallest needs {giga(figures.total)} GB, {giga(found.missing)} GB too much: {_changes(least)}.",
        f"It is highest in {figures.phase}: {held}.",
    ]


def about(found: Found) -> list[str]:
    """What the search looked at, what it left out, and what times rest on."""
    more = found.all - found.tried
    stopped = f"; {found.stopped} ended the search, so there may be better ones" if found.stopped else ""
    lines = [
        f"{found.tried} of {found.all} combinations were rehearsed, {max(0, more)} were not{stopped}.",
        f"A run may come up to {found.margin:.0%} above its plan: that much is left free.",
    ]
    if found.useless:
        lines.append(f"Of no use here: {', '.join(found.useless)}.")
    lines += [f"Not possible here: {text}" for text in found.refused]
    lines.append(f"Times rest on: {found.basis}.")
    return lines


def _changes(proposal: Proposal) -> str:
    return "; ".join(change.text for change in proposal.changes) or "the recipe as it is"


def _plain(found: Found, files: list[Path]) -> dict[str, Any]:
    return {
        "budget": found.budget,
        "limit": _limit(found),
        "as_it_is": found.as_it_is.figures.total,
        "proposals": [
            _one(proposal) | ({"file": str(files[number])} if files else {})
            for number, proposal in enumerate(found.proposals)
        ],
        "smallest": _one(found.smallest),
        "missing": max(0, found.missing),
        "tried": found.tried,
        "all": found.all,
        "stopped": found.stopped,
        "refused": list(found.refused),
        "useless": list(found.useless),
        "basis": found.basis,
    }


def _one(proposal: Proposal) -> dict[str, Any]:
    figures = proposal.figures
    return {
        "changes": [change.text for change in proposal.changes],
        "gives_up": list(proposal.gives_up),
        "bytes": figures.total,
        "phase": figures.phase,
        "step": figures.seconds,
        "times": round(proposal.slower, 4),
        "recipe": dict(proposal.values),
    }


def _limit(found: Found) -> int:
    return int(found.budget / (1 + found.margin))


def giga(size: int) -> str:
    """Bytes in GB, with three digits that count."""
    return f"{size / 1e9:.3g}"
