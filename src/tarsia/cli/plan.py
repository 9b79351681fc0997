"""Foretell what a recipe takes of memory and time, from a rehearsal of its run: no weight is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tarsia.cli import output
from tarsia.cli.fitted import fitted

if TYPE_CHECKING:
    from tarsia.plan import Plan
    from tarsia.plan.history import Entry, Pair
    from tarsia.plan.time import Speeds
    from tarsia.train.recipe import Recipe

WORKS = ("evaluate", "generate", "fold")
HELP = "what a recipe takes of memory and time, before anything is loaded"


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia plan``."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as batch=4 or parts.0.rank=8")
    parser.add_argument("--picture", metavar="FILE.png", type=Path, help="draw what lives in memory, moment by moment")
    parser.add_argument("--card", metavar="NAME", help="tell the time on this card, such as 'RTX 4090'")
    parser.add_argument("--fit", metavar="SIZE|CARD", help="the recipes that fit into 24GB or an 'RTX 4090'")
    parser.add_argument("--write", metavar="DIR", type=Path, help="with --fit: write each of them as a recipe")
    parser.add_argument(
        "--for",
        dest="work",
        metavar="WORK",
        choices=("train", *WORKS),
        default="train",
        help="train (the default), evaluate, generate (the cache of keys and values too) or fold",
    )
    parser.add_argument("--calibrate", action="store_true", help="measure this machine for a minute, for times")
    parser.add_argument(
        "--wall",
        metavar="MODEL",
        nargs="?",
        const="",
        help="what full training takes and what QLoRA does, as sums with their formulas; for a size such as 13B",
    )
    parser.add_argument("--history", action="store_true", help="earlier runs: what was planned, what was measured")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of tables")


def run(args: argparse.Namespace) -> int:
    """Print the plan; or earlier plans beside what their runs took."""
    from tarsia.core.errors import ConfigError

    _check_together(args)
    if args.history:
        return _history(args)
    if args.wall is not None:
        return _wall(args)
    if args.recipe is None and args.calibrate:
        return _calibrate()
    if args.recipe is None:
        raise ConfigError("There is nothing to plan.", do="give a recipe: tarsia plan recipes/belt.yaml")
    if args.write is not None and args.fit is None:
        raise ConfigError("There is nothing to write.", given=f"--write {args.write}", do="add --fit 24GB, say")
    from tarsia.plan import plan
    from tarsia.plan.fit import budget
    from tarsia.train.exact import threads
    from tarsia.train.recipe import Recipe

    output.no_bars()
    on_card = args.card is not None or (args.fit is not None and budget(args.fit)[1] is not None)
    recipe = Recipe.load(args.recipe, [*args.overrides, *(["device=cuda"] if on_card else [])])
    with threads(recipe.threads):  # a calibration holds for one number of them
        if args.calibrate:
            _calibrate()
        speeds = _speeds(args)
    if args.fit is not None:
        if args.picture is not None:
            raise ConfigError("A picture is of one plan.", given="--picture and --fit", do="leave one of them out")
        return fitted(recipe, args.fit, speeds, args.write, args.json)
    if args.work != "train":
        return _other(recipe, args)
    found = plan(recipe)
    if args.picture is not None:
        _draw(found, args.picture)
    if args.json:
        output.line(found.as_json() | {"time": None if speeds is None else seconds(found, speeds)})
    else:
        _show(found, speeds)
    return 0


def _other(recipe: Recipe, args: argparse.Namespace) -> int:
    """What comes after training: tensors, phase by phase."""
    from tarsia.plan import Outline, answering
    from tarsia.plan.foretell import peaks

    rehearse = {"evaluate": answering.evaluating, "generate": answering.generating, "fold": answering.folding}
    found = peaks(rehearse[args.work](recipe, Outline.of(recipe.model)))
    if args.json:
        output.line({"work": args.work, "live": max(found.values()), "phases": found})
        return 0
    title = f"{recipe.model}, {args.work}: what lives in memory at most, phase by phase"
    output.table(title, ("phase", "MB"), [(name, mega(size)) for name, size in found.items()], right=("MB",))
    most = mega(max(found.values()))
    print(f"\nTensors alone, at most {most} MB; the process around them is told by a plan of training.")
    return 0


def _check_together(args: argparse.Namespace) -> None:
    """Raise ConfigError for what is not of one recipe beside what is: nothing that was asked for is left out.

    And for a picture that would not be called what it is.
    """
    from tarsia.core.errors import ConfigError

    if args.picture is not None and args.picture.suffix.lower() != ".png":
        name = args.picture.with_suffix(".png") if args.picture.name else "plan.png"
        raise ConfigError(
            "A plan is drawn as a PNG.", given=f"--picture {args.picture}", allowed="*.png", do=f"--picture {name}"
        )
    given = {"--history": args.history, "--wall": args.wall is not None}
    apart = [name for name, asked in given.items() if asked]
    beside = {
        "--for": args.work != "train",
        "--calibrate": args.calibrate,
        "--fit": args.fit,
        "--card": args.card,
        "--picture": args.picture,
    }
    others = [name for name, asked in beside.items() if asked] + ([args.recipe] if args.recipe is not None else [])
    if apart and len(apart + others) > 1:
        raise ConfigError(
            "These are no two sides of one plan.", given=", ".join((*apart, *others)), do=f"ask for {apart[0]} alone"
        )


def _wall(args: argparse.Namespace) -> int:
    from tarsia.plan.assumptions import assume
    from tarsia.plan.wall import rows

    figures = rows(assume(args.wall)) if args.wall else rows()
    for figure in figures:
        if args.json:
            lines = [{"what": line.what, "formula": line.formula, "bytes": line.bytes} for line in figure.lines]
            about = {"name": figure.name, "text": figure.text, "assumed": dict(figure.assumed), "lines": lines}
            output.line(about | {"bytes": figure.bytes, "printed": figure.printed, "verdict": figure.verdict})
            continue
        assumed = ", ".join(f"{key} {value}" for key, value in figure.assumed.items())
        rows_ = [(line.what, line.formula, f"{line.bytes / 1e9:.2f}") for line in figure.lines]
        output.table(f"{figure.name} ({assumed})", ("what", "formula", "GB"), rows_, right=("GB",))
        said = f"; {figure.source}: {figure.printed}, which {figure.verdict}" if figure.printed else ""
        print(f"in all {figure.gigabytes:.2f} GB{said}" + (f". {figure.note}" if figure.note else "") + "\n")
    return 0


def _show(plan: Plan, speeds: Speeds | None) -> None:
    recipe, rehearsal = plan.recipe, plan.rehearsal
    methods = " + ".join(part.method for part in recipe.parts)
    dtype = str(rehearsal.dtype).removeprefix("torch.")
    print(fits(plan))
    print()
    title = f"{recipe.model}, {methods}, {dtype}: what lives in tensors at most, phase by phase"
    output.table(title, ("phase", "MB"), [(name, mega(size)) for name, size in plan.phases.items()], right=("MB",))
    print()
    rows = [(str(category), mega(size), f"{size / plan.step.peak:.0%}") for category, size in plan.categories.items()]
    output.table(
        f"At the peak of the steps, {mega(plan.step.peak)} MB in {plan.step.phase}",
        ("for", "MB", "share"),
        rows,
        right=("MB", "share"),
    )
    print()
    for line in (*rests_on(plan), *times(plan, speeds), whole(plan)):
        print(line)


def fits(plan: Plan) -> str:
    """Whether the run has room on this machine, as far as it can be told."""
    from tarsia.cli.machine import available_memory

    need = f"Needs {mega(plan.total)} MB in all, {mega(plan.live)} MB of it tensors"
    if not plan.on_processor:
        return f"{need}, of a GPU that was not looked at."
    free = available_memory()
    if free is None:
        return f"{need}; the system does not tell how much is free."
    verdict = "it fits" if plan.total <= free else "it does not fit: --fit says what would"
    return f"{need}; {mega(free)} MB are free on this machine: {verdict}."


def whole(plan: Plan) -> str:
    """What the run takes with all that stands beside its tensors."""
    if not plan.on_processor:
        found = plan.device
        held = {"allocated": found.allocated, "reserved": found.reserved, "context": found.context}
        sizes = ", ".join(f"{mega(size)} MB {name}" for name, size in held.items())
        return f"The whole device: {sizes}. No GPU has measured this yet."
    parts = ", ".join(f"{name} {mega(size)}" for name, size in plan.process.parts.items() if size)
    return f"The whole process: {mega(plan.total)} MB at most, in {plan.process.phase}: {parts}."


def rests_on(plan: Plan) -> list[str]:
    """What the plan has looked at, in words."""
    survey = plan.survey
    lines = [f"Rehearsed: steps {', '.join(str(step + 1) for step in survey.steps)}, the first and the largest."]
    if survey.whole:
        lines.append(f"All {survey.rows} rows that the run draws were read.")
    else:
        seen = f"{survey.draws} of {survey.all_draws} draws" if survey.draws < survey.all_draws else "all draws"
        lines.append(
            f"{survey.read} of {survey.rows} rows were read ({seen} were looked at), those with most text and the "
            "largest pictures first; of the others the size is told from these."
        )
    return lines


def times(plan: Plan, speeds: Speeds | None) -> list[str]:
    """How long a step and the run take, and what that rests on."""
    if speeds is None:
        command = "tarsia plan RECIPE --calibrate" if plan.recipe.threads else "tarsia plan --calibrate"
        return [f"Time: not known. `{command}` measures this machine once, in a minute."]
    found = plan.time(speeds)
    run = found.run(plan.work.steps)
    span = f"{plan.work.steps} steps in {_duration(run)}" + f" ({_duration(run * found.low / found.seconds)} to "
    span += f"{_duration(run * found.high / found.seconds)}), without loading, evaluating and saving"
    return [f"Time: {found.seconds:.3g} s a step, {span}; {found.basis}.", *found.doubts]


def seconds(plan: Plan, speeds: Speeds) -> dict[str, Any]:
    """The same as plain values."""
    found = plan.time(speeds)
    return {"step": found.seconds, "low": found.low, "high": found.high, "steps": plan.work.steps, "basis": found.basis}


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _speeds(args: argparse.Namespace) -> Speeds | None:
    """How fast the machine is, or the card that is named; None where it was never measured."""
    from tarsia.plan.calibrate import kept
    from tarsia.plan.cards import find
    from tarsia.plan.time import Measured, OfCard

    if args.card is not None:
        return OfCard(find(args.card))
    held = kept()
    return None if held is None else Measured(held)


def _calibrate() -> int:
    from rich.console import Console
    from rich.progress import Progress

    from tarsia.plan.calibrate import calibrate

    output.no_bars()
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring this machine", total=1.0)
        found = calibrate(anew=True, progress=lambda what, share: bar.update(task, description=what, completed=share))
    spread = found.calibration.spread
    busy = "; other work disturbed it: measure again on a quiet machine" if spread > 0.1 else ""
    print(f"measured; repeats differed by {spread:.0%}{busy}", file=sys.stderr)
    print(found.notice or "kept", file=sys.stderr)
    return 0


def _draw(plan: Plan, path: Path) -> None:
    from tarsia.plan.picture import picture
    from tarsia.train.disk import write_synced, writing

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with writing("The picture", path, "give --picture a file in a folder that can be written to"):
        try:
            write_synced(partial, picture(plan))
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):  # what went wrong is told, and not that this did too
                partial.unlink(missing_ok=True)
            raise
    print(f"picture: {path}", file=sys.stderr)


def _history(args: argparse.Namespace) -> int:
    from tarsia.plan.history import place, read

    entries = list(read())
    if args.json:
        for entry in entries:
            output.line(_plain(entry))
        return 0
    if not entries:
        print(f"No run was kept yet in {place()}: `tarsia train` keeps each beside its plan.")
        return 0
    pairs: dict[str, list[Pair]] = {"tensors": [e.peak for e in entries]}
    pairs["whole"] = [e.whole for e in entries if e.whole is not None]
    rows = [
        (*(e.date[:16], e.model, " + ".join(e.methods), e.device), *_both(e.peak), *_both(e.whole)) for e in entries
    ]
    columns = ("date", "model", "methods", "device", "tensors MB", "measured", "off", "whole MB", "measured", "off")
    title = "Planned and measured: tensors in the step that took most, and the whole process or device"
    output.table(title, columns, rows, right=columns[4:])
    print()
    for name, members in pairs.items():
        if members:
            off, under = [abs(pair.off) for pair in members], sum(pair.off < -0.01 for pair in members)
            print(f"{name}: off by {median(off):.1%} in the median; {under} of {len(off)} too low by more than 1 %")
    return 0


def _both(pair: Pair | None) -> tuple[str, str, str]:
    return ("", "", "") if pair is None else (mega(pair.planned), mega(pair.measured), f"{pair.off:+.1%}")


def _plain(entry: Entry) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(entry) | {"pairs": [asdict(pair) | {"off": round(pair.off, 5)} for pair in entry.pairs]}


def mega(size: int) -> str:
    """Bytes as megabytes."""
    return f"{size / 1e6:,.1f}"
