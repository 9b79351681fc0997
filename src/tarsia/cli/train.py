"""Train an adapter by a recipe. A run that was stopped goes on from its newest checkpoint by itself."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tarsia import cli
from tarsia.cli import gate, rows

if TYPE_CHECKING:
    from tarsia.adapter import Host
    from tarsia.train.events import Event
    from tarsia.train.loop import Evaluator
    from tarsia.train.recipe import Recipe

HELP = "train an adapter by a recipe"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia train``."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as steps=300 or parts.0.lr=1e-4")
    gate.options(parser)
    rows.general_option(parser)
    parser.add_argument(
        "--page", metavar="FILE.html", type=Path, help="with a limit: write what was forgotten as a page"
    )
    parser.add_argument("--no-plan", action="store_true", help="do not foretell the run's memory (some seconds)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="print the adapter's folder and nothing else")
    shown.add_argument("--json", action="store_true", help="one JSON object an event")


def run(args: argparse.Namespace) -> int:
    """Train, and print each event as it comes; 1 where a limit on forgetting was given and is exceeded."""
    from tarsia.cli import output, progress
    from tarsia.cli.foreseen import Foreseen
    from tarsia.cli.gated import Gated
    from tarsia.core.errors import ConfigError
    from tarsia.train.loop import fit
    from tarsia.train.recipe import Recipe

    limited = gate.wanted(args)
    if not limited and (args.general or args.page):
        raise ConfigError(
            "General sources are for a limit on forgetting, and none is given.", do="add --max-forgetting POINTS"
        )
    recipe = Recipe.load(args.recipe, args.overrides)
    if args.quiet or args.json or not sys.stderr.isatty():
        output.no_bars()
    measure = evaluator(recipe)
    show = progress.Lines() if args.json else progress.Quiet() if args.quiet else progress.Screen()
    going = Going()
    with stoppable():
        with telling("interrupted before the first step: nothing is trained yet, run the same command to begin"):
            foreseen = Foreseen(None) if args.no_plan else Foreseen.of(recipe, quiet=args.quiet)
            gated = Gated.before(recipe, args) if limited else None
        with going, show:
            host, card = (None, None) if gated is None else (gated.host, gated.pending)
            for event in fit(recipe, measure, host=host, card=card):
                going.see(event)
                show(event)
                foreseen.see(event)
        if gated is None:
            return 0
        with telling(
            "interrupted while the adapter was measured: run the same command to measure it, nothing is trained again "
            f"(it is saved in {gated.folder})"
        ):
            return gated.after()


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM ends the run as Ctrl-C does, with 143 in place of 130. (Signals are the main thread's.)"""

    def stop(*_: object) -> NoReturn:
        raise cli.Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Inside, an interruption says what it interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (what,)
        raise


class Going:
    """How far a run is; where one that has begun is interrupted, the interruption says so."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.saved = 0

    def see(self, event: Event) -> None:
        """Take note of an event."""
        from tarsia.train.events import Saved, Started, Step

        if isinstance(event, Started):
            self.step = self.saved = event.resumed
        elif isinstance(event, Step):
            self.step = event.step
        elif isinstance(event, Saved):
            self.saved = event.step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt) and self.step is not None:
            kept = (
                f"its checkpoint is of step {self.saved}" if self.saved else "it has no checkpoint yet, and begins anew"
            )
            error.args = (f"interrupted after step {self.step}: run the same command to go on ({kept})",)


def evaluator(recipe: Recipe) -> Evaluator | None:
    """What measures the recipe's ``data.eval`` during the run; None where it names nothing.

    Raises ConfigError where two sources have one name, or a rhythm is given and nothing to evaluate.
    """
    from tarsia.core.errors import ConfigError
    from tarsia.data import read
    from tarsia.evaluate import evaluate

    wanted = recipe.data.eval
    if not wanted and recipe.eval_every is not None:
        raise ConfigError(
            "The recipe says how often to evaluate, and not on what.",
            given=f"eval_every {recipe.eval_every}",
            do="name sources in data.eval, or remove eval_every",
        )
    sources = {source.title: read(source) for source in wanted}
    if len(sources) < len(wanted):
        raise ConfigError(
            "Two sources of data.eval have one name.",
            given=", ".join(source.title for source in wanted),
            do="give each source a name of its own",
        )

    def measured(host: Host, _: int) -> Mapping[str, Any]:
        report = evaluate(host, sources, batch=recipe.batch)
        brief: dict[str, Any] = report.model_dump(mode="json", exclude={"results": {"__all__": {"rows"}}})
        return brief

    return measured if sources else None
