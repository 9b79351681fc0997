"""Pictures that can not be read, or do not show a model what they show a person."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from tarsia.data.lint.finding import Severity
from tarsia.data.lint.looks import Look
from tarsia.data.lint.rule import Hit, rule
from tarsia.data.lint.survey import Survey

ELONGATED: Final = 8
"""Long side by short side from which on resizing to a square leaves little to see."""
TINY: Final = 8
"""Pixels of the shorter side below which nothing can be seen."""
DEEP: Final = ("I", "F")
"""PIL's modes of more than 8 bits a channel."""


def _pictures(survey: Survey, fits: Callable[[Look], object], what: str, do: str) -> Iterator[Hit]:
    """A hit for each source with rows whose pictures fit; ``what`` has {rows} and {first} to fill in."""
    chosen = {place for place, look in enumerate(survey.looks) if fits(look)}
    for source in survey.sources:
        rows = [row for row in source.rows if chosen & set(row.looks)]
        if rows:
            first = survey.looks[next(place for place in rows[0].looks if place in chosen)]
            yield Hit(what.format(rows=source.some(rows), first=_described(first)), do, source.where(rows), source.name)


def _described(look: Look) -> str:
    return look.refusal or f"{look.width} x {look.height}"


@rule("missing-picture", Severity.ERROR)
def missing(survey: Survey) -> Iterator[Hit]:
    """Files that are not there."""
    yield from _pictures(
        survey,
        lambda look: look.header.missing,
        "{rows}: a picture is not there (the first: {first}).",
        "put the files there (paths start from the source's folder), or take the rows out",
    )


@rule("bomb", Severity.ERROR)
def bombs(survey: Survey) -> Iterator[Hit]:
    """Pictures of so many pixels that decoding them is not safe."""
    yield from _pictures(
        survey,
        lambda look: look.header.bomb,
        "{rows}: a picture has so many pixels that decoding it is not safe (the first: {first}).",
        "scale it down, or take the rows out",
    )


@rule("deep-picture", Severity.ERROR)
def deep(survey: Survey) -> Iterator[Hit]:
    """Pictures of more than 8 bits a channel, which a careless conversion turns white."""
    yield from _pictures(
        survey,
        lambda look: look.refusal and _deep(look) and not look.header.bomb,
        "{rows}: a picture has more than 8 bits a channel (the first: {first}).",
        "convert them to 8 bits with a scaling that you choose",
    )


def _deep(look: Look) -> bool:
    return look.header.mode.partition(";")[0] in DEEP


@rule("unreadable-picture", Severity.ERROR)
def unreadable(survey: Survey) -> Iterator[Hit]:
    """Pictures that are broken, cut off, of zero size or in no known format."""
    yield from _pictures(
        survey,
        lambda look: look.refusal and not (look.header.missing or look.header.bomb or _deep(look)),
        "{rows}: a picture can not be read (the first: {first}).",
        "replace the files, or take the rows out",
    )


@rule("animated", Severity.WARNING)
def animated(survey: Survey) -> Iterator[Hit]:
    """Pictures of several frames: only the first is seen."""
    yield from _pictures(
        survey,
        lambda look: not look.refusal and look.header.frames > 1,
        "{rows}: of an animated picture only the first frame is seen.",
        "choose a frame, or give frames as pictures of their own",
    )


@rule("transparent", Severity.WARNING)
def transparent(survey: Survey) -> Iterator[Hit]:
    """Pictures with see-through pixels: they are seen as white, whatever lies under them."""
    yield from _pictures(
        survey,
        lambda look: not look.refusal and look.header.transparent,
        "{rows}: a picture has transparent pixels, which are seen as white.",
        "paste them on the ground that you want, and save without an alpha channel",
    )


@rule("elongated", Severity.WARNING)
def elongated(survey: Survey) -> Iterator[Hit]:
    """Pictures so long that resizing destroys them."""
    yield from _pictures(
        survey,
        lambda look: not look.refusal and max(look.width, look.height) >= ELONGATED * min(look.width, look.height),
        f"{{rows}}: a picture is at least {ELONGATED} times as long as it is wide ({{first}}); "
        "resized or cropped to a square, little is left of it.",
        "cut it into pieces that are nearer to a square",
    )


@rule("tiny-picture", Severity.WARNING)
def tiny(survey: Survey) -> Iterator[Hit]:
    """Pictures of a few pixels."""
    yield from _pictures(
        survey,
        lambda look: not look.refusal and min(look.width, look.height) < TINY,
        f"{{rows}}: a picture has a side of less than {TINY} pixels ({{first}}).",
        "give larger pictures, or take the rows out",
    )


@rule("flat-picture", Severity.WARNING)
def flat(survey: Survey) -> Iterator[Hit]:
    """Pictures of one colour."""
    yield from _pictures(
        survey,
        lambda look: not look.refusal and look.empty,
        "{rows}: a picture is almost nothing but one colour.",
        "check how it was made: an empty canvas, a failed download, a camera that was covered",
    )
