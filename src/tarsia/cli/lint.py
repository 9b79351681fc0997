"""Look at the rows of a recipe as training would read them, without loading weights, and say what would spoil it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.text import Text

    from tarsia.data.lint import Finding, Findings, Given, View
    from tarsia.data.lint.report import Numbers
    from tarsia.data.lint.survey import Progress
    from tarsia.train.recipe import Recipe

HELP = "look at a recipe's rows before training on them"
ROWS: Final = 5000
SHOWN: Final = 400
"""Tokens of a row that a terminal is shown; the page shows all."""
COLOURS: Final = {"error": "bold red", "warning": "yellow", "note": "cyan"}
BARS: Final = " ▁▂▃▄▅▆▇█"
COLUMNS: Final = (
    "source", "for", "rows", "looked at", "fail", "tokens", "95 %", "most", "", "learnt", "pictures", "tokens each",
    "share", "walks",
)  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia lint``."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as steps=300 or max_length=512")
    parser.add_argument("--page", metavar="FILE.html", type=Path, help="write what was found as a page of its own")
    parser.add_argument(
        "--rows", metavar="N", type=int, default=ROWS,
        help=f"rows of each source to look at, spread over it (default: {ROWS}; 0: all)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object a finding")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")


def run(args: argparse.Namespace) -> int:
    """Print what was found: 1 where there are errors (with --strict warnings), else 0."""
    from tarsia.cli import output
    from tarsia.core.errors import ConfigError
    from tarsia.data.lint.page import write_page
    from tarsia.train.recipe import Recipe

    if args.rows < 0:
        raise ConfigError("That is no number of rows.", given=f"--rows {args.rows}", allowed="0 (all) or more")
    recipe = Recipe.load(args.recipe, args.overrides)
    output.no_bars()
    with _bar() as progress:
        findings = lint_recipe(recipe, args.rows or None, progress)
    if args.page is not None:
        write_page(findings, args.page, args.recipe)
    if args.json:
        for finding in findings.findings:
            output.line(finding.plain())
    else:
        _print(findings, args.recipe)
        if args.page is not None:
            print(f"page: {args.page}")
    return int(bool(findings.errors) or (args.strict and bool(findings.warnings)))


def lint_recipe(recipe: Recipe, rows: int | None = ROWS, progress: Progress | None = None) -> Findings:
    """Open what a recipe names, all but the weights, and lint it; ``rows`` of a source (None: all).

    Raises as ``Recipe.load``, ``open_outline`` and ``read`` do; a row never raises.
    """
    from tarsia.adapter import open_outline
    from tarsia.core.attach import Part
    from tarsia.data import Encoder
    from tarsia.data.lint import Aim, lint

    given = sources(recipe)
    base = open_outline(recipe.model)
    encoder = Encoder(base.processor, recipe.max_length, variables=recipe.variables, resolution=recipe.resolution)
    parts = tuple(Part(part.method, part.select, part.configure()) for part in recipe.parts)
    return lint(given, encoder, rows=rows, context=base.context, aim=Aim(base.sites, parts), progress=progress)


def sources(recipe: Recipe) -> tuple[Given, ...]:
    """The sources of a recipe, and how many rows the run will draw from each."""
    from tarsia.data import read
    from tarsia.data.lint import Given

    opened = [read(source) for source in recipe.data.train]
    step = recipe.batch * recipe.accumulate
    steps = recipe.steps_for(sum(map(len, opened)))
    fixed = recipe.data.rows_of_step(step)
    weights = [recipe.data.weights[source.title] for source in recipe.data.train]
    drawn = [steps * float(n) for n in (fixed or [step * weight for weight in weights])]
    trained = [
        Given(source.title, rows, True, weight, expected)
        for source, rows, weight, expected in zip(recipe.data.train, opened, weights, drawn, strict=True)
    ]
    names = {source.name for source in trained}
    evaluated = []
    for source in recipe.data.eval:
        name = source.title
        while name in names:
            name += " (eval)"
        names.add(name)
        evaluated.append(Given(name, read(source), trained=False))
    return (*trained, *evaluated)


@contextmanager
def _bar() -> Iterator[Progress | None]:
    """Progress on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield None
        return
    with Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
    ) as bar:
        tasks: dict[str, object] = {}

        def progress(source: str, done: int, total: int) -> None:
            if source not in tasks:
                tasks[source] = bar.add_task(source, total=total)
            bar.update(tasks[source], completed=done)  # type: ignore[arg-type]

        yield progress


def _print(findings: Findings, title: str) -> None:
    from rich.console import Console
    from rich.text import Text

    from tarsia.cli import output

    survey = findings.survey
    known = "an unknown number of" if survey.context is None else f"{survey.context:,}"
    end = "learnt" if survey.encoder.closes else "not learnt"
    output.table(
        f"{title}: max_length {survey.max_length or 'not set'}, positions for {known} tokens, an answer's end is {end}",
        COLUMNS,
        [_line(numbers) for numbers in findings.numbers],
        right=set(COLUMNS) - {"source", "for", ""},
    )
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(Text.assemble("\nwhat the loss sees: ", ("learnt", _style(True)), " ", ("read", _style(False)), " ",
        ("<control>", _style(False, "control")), " ", ("[picture]", _style(False, "picture")), " ",
        ("cut by max_length", "strike red")))  # fmt: skip
    for view in findings.views():
        console.print(_row(view))
    for finding in reversed(findings.findings):  # the worst last, where a screen stops
        console.print(_told(finding))
    notes = len(findings.findings) - len(findings.errors) - len(findings.warnings)
    parts = [(len(findings.errors), "error"), (len(findings.warnings), "warning"), (notes, "note")]
    console.print("\n" + ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for n, name in parts), style="bold")


def _line(n: Numbers) -> tuple[str, ...]:
    from tarsia.data.lint.view import visible

    top = max(*n.histogram, 1)
    bars = "".join(BARS[-(-8 * count // top)] for count in n.histogram)
    each = f"{n.per_picture:g}" if n.pictures else ""
    share, walks = ("" if v is None else f"{v:{f}}" for v, f in ((n.share, ".1%"), (n.walks, ".2f")))
    return (
        visible(n.name), "train" if n.trained else "eval", f"{n.rows:,}", f"{n.looked:,}", f"{n.failed:,}",
        f"{n.median:,}", f"{n.most:,}", f"{n.longest:,}", bars, f"{n.labelled:.1%}", f"{n.pictures:,}", each, share,
        walks,
    )  # fmt: skip


def _style(learnt: bool, what: str = "text", cut: bool = False) -> str:
    colour = {"text": "", "control": "magenta", "picture": "blue"}[what]
    return " ".join(filter(None, ["bold green" if learnt else colour or "dim", "strike red" if cut else ""]))


def _row(view: View) -> Text:
    from rich.text import Text

    from tarsia.data.lint.view import ends, visible

    head = f"\n{visible(str(view.where))}"
    count = f"  {view.tokens} tokens, {view.labelled} learnt" if view.tokens else ""
    text = Text.assemble(
        (head, "bold"), (count, "dim"), ("  " + " ".join(view.codes) if view.codes else "", "red"), "\n"
    )
    beginning, left, end = ends(view.runs, SHOWN)
    for run in beginning:
        text.append(visible(run.text), _style(run.learnt, run.what.value, run.cut))
    text.append(f" … {left:,} more tokens … " if left else "", "bold yellow")
    for run in end:
        text.append(visible(run.text), _style(run.learnt, run.what.value, run.cut))
    return text.append(visible(view.error), "red") if view.error else text


def _told(finding: Finding) -> Text:
    from rich.text import Text

    from tarsia.data.lint.view import visible

    colour = COLOURS[finding.severity.value]
    text = Text.assemble(("\n" + finding.severity.value, colour), " ", (finding.code, "bold"))
    text.append(f"  {visible(finding.source)}" if finding.source else "", "dim")
    text.append(f"\n  {visible(finding.what)}")
    text.append(f"\n  rows:  {visible(finding.named)}" if finding.rows else "", "dim")
    return text.append(f"\n  to do: {visible(finding.do)}", "green")
