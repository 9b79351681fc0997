"""A result as a Markdown page and a picture. Nothing in them is typed by hand, nor depends on anything else."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jinja2

from tarsia.labs.frame.chapter import Chapter
from tarsia.labs.frame.result import Result, read, write
from tarsia.labs.frame.tables import markdown, part_of

INK: Final = "#23201c"
GREY: Final = "#9aa0a6"
COLOURS: Final = ("#2f6f5e", "#c4553b", "#4a6fa5", "#b58a2e", "#7a5c8e", "#9aa0a6")
LIST: Final = "README.md"
_ENDS: Final = {"page": "md", "picture": "png", "result": "json"}


def files(chapter: Chapter, out: Path) -> dict[str, Path]:
    """Where a chapter's page, picture and result lie in ``out``."""
    return {kind: out / f"{chapter.name}.{end}" for kind, end in _ENDS.items()}


def publish(chapter: Chapter, result: Result, out: Path) -> None:
    """Write picture, result and page. Raises ConfigError where ``out`` can not be written."""
    place = files(chapter, out)
    write(
        [
            (place["picture"], picture(chapter, result)),
            (place["result"], result.as_json(chapter).encode()),
            (place["page"], page(chapter, result).encode()),
        ]
    )


def page(chapter: Chapter, result: Result) -> str:
    """The page as Markdown."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = result.found.rows

    def value(row: str, column: str, form: str = ".4g") -> str:
        held = rows[row][column]
        return held if isinstance(held, str) else format(held, form)

    def table(part: str, corner: str = "") -> str:
        return markdown(part_of(rows, part), corner)

    body = environment.from_string(chapter.text).render(value=value, table=table, lacking=result.lacking)
    bounds = {
        bound.what: {
            "measured": bound.measured(result.found, result.lacking),
            "must be": bound.limits,
            "": str(bound.judge(result.found, result.lacking)),
        }
        for bound in chapter.bounds
    }
    return "\n".join(
        [
            f"# {chapter.title}\n",
            f"*{chapter.question}*\n",
            f"**{result.verdict(chapter)}**: {chapter.claim}\n",
            f"![{chapter.picture}]({chapter.name}.png)\n",
            f"{body.strip()}\n",
            "## The claim\n",
            markdown(bounds),
            _origin(chapter, result),
        ]
    )


def _origin(chapter: Chapter, result: Result) -> str:
    what = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    bases = "".join(f", {name} {digest.removeprefix('files:')[:12]}" for name, digest in result.found.bases.items())
    return (
        f"<sub>Written by `tarsia lab {chapter.name}`; every number is in [{chapter.name}.json]({chapter.name}.json): "
        f"{result.at[:10]}, {what}{bases}</sub>\n"
    )


def picture(chapter: Chapter, result: Result) -> bytes:
    """A PNG file: the same bytes for the same result and the same matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=chapter.size, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        chapter.draw(result.found, figure)
        held = io.BytesIO()
        figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def listing(chapters: Mapping[str, Chapter], out: Path) -> str:
    """The list of all chapters as Markdown, with the verdicts of those that have a result in ``out``."""
    lines = []
    for chapter in chapters.values():
        place = files(chapter, out)
        verdict = str(read(place["result"]).verdict(chapter)) if place["result"].is_file() else "not run"
        name = f"[{chapter.name}]({place['page'].name})" if place["page"].is_file() else chapter.name
        lines.append(f"| {name} | {chapter.question} | {chapter.claim} | {verdict} |\n")
    head = "| | asks | claims | |\n|---|---|---|---|\n"
    return f"{_HEAD}\n{head}{''.join(lines)}"


_LOOK: Final[Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
}
_HEAD: Final = """# The lab

Claims about adapters that everybody repeats, each as an experiment that can fail. `tarsia lab NAME` runs one and writes
its page, picture and numbers; `tarsia lab all` runs them all; `tarsia lab` says what there is. A claim that does
not hold ends with exit code 1, and its page says FAIL. This list is written by the same command.
"""
