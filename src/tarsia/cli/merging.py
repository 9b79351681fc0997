"""The work of ``tarsia merge``: parents opened, merged, tuned, written, proved and measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from tarsia.adapter import Adapter, Host, load, open_base, probe, prove, put, save
from tarsia.adapter.files import OURSELVES
from tarsia.adapter.four_bits import FourBits
from tarsia.adapter.host import QuantisedAlready
from tarsia.adapter.proof import Probe, Unmoved
from tarsia.cli import adapted, rows
from tarsia.cli.export import named, where
from tarsia.cli.shelf import size
from tarsia.core.attach import activate, detach
from tarsia.core.errors import ConfigError, MergeError
from tarsia.core.select import near
from tarsia.core.site import Component
from tarsia.data import Rows
from tarsia.data.encode import Encoder
from tarsia.evaluate import Report, evaluate, find
from tarsia.evaluate.report import Result
from tarsia.merge.adapters import AS_TRAINED, Merged, merge, swelling
from tarsia.merge.interference import Interference, interference
from tarsia.merge.interference_page import Table, write_page
from tarsia.merge.ways import Way
from tarsia.merge.ways import find as way_of

GRID: Final = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5)
"""The scales that --tune tries first."""
STEP: Final = 1.4
"""What the next scale beyond them is a multiple of, ..."""
FURTHER: Final = 6
"""... and how many of those there are at most."""
PROBED: Final = 2
"""Rows of each source that the result's probe is made of."""

_MERGED: Final = "merged"
_KEYS: Final = {
    "adapters": list, "method": str, "weights": list, "scale": float, "density": float, "rank": int, "base": str,
    "components": dict, "options": dict, "out": str,
}  # fmt: skip
"""What a recipe of a merge can say, and as what."""


@dataclass(frozen=True, eq=False)
class Job:
    """A merge, checked and opened: the base with nothing put in, and its parents by name."""

    args: argparse.Namespace
    out: Path
    parents: Mapping[str, Adapter]
    weights: tuple[float, ...]
    way: Way
    scale: float
    rank: int | None
    components: Mapping[str, float]
    host: Host
    rows: Mapping[str, Rows]
    tune: Mapping[str, Rows]

    @property
    def names(self) -> tuple[str, ...]:
        """The parents', in the order given."""
        return tuple(self.parents)

    def merged(self, scale: float) -> Merged:
        """The parents made one at a scale."""
        held = tuple(self.parents.values())
        return merge(
            held,
            self.weights,
            self.way,
            self.host,
            scale=scale,
            components=self.components,
            rank=self.rank,
            resolution=AS_TRAINED if self.args.resolution == adapted.AS_TRAINED else self.host.resolution,
        )

    def measured(self, sources: Mapping[str, Rows]) -> Report:
        """What acts now, on these rows."""
        chosen = {name: getattr(self.args, name) for name in ("metric", "max_new_tokens", "batch")}
        return evaluate(self.host, sources, **chosen)


@dataclass(frozen=True, slots=True)
class Task:
    """One source: free answers right, of the base, of its parent alone (None: it has none) and of the result."""

    name: str
    rows: int
    base: float
    parent: float | None
    merged: float

    @property
    def kept(self) -> float | None:
        """The result's share of what the parent has right."""
        return self.merged / self.parent if self.parent else None

    @property
    def cells(self) -> tuple[str, ...]:
        """A line of a table."""
        parent = "-" if self.parent is None else f"{self.parent:.1%}"
        kept = "-" if self.kept is None else f"{self.kept:.1%}"
        return self.name, str(self.rows), f"{self.base:.1%}", parent, f"{self.merged:.1%}", kept


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a merge. ``tried`` are scale, share right and loss on the validation rows, of each that was tried.

    ``coverage`` is by component: sites that the result patches, and those that each parent does. ``proof`` says what
    was proved.
    """

    merged: Merged
    scale: float
    interference: Interference | None
    coverage: Mapping[str, tuple[int, tuple[int, ...]]]
    tried: tuple[tuple[float, float, float], ...]
    tasks: tuple[Task, ...]
    proof: str

    @property
    def off(self) -> list[tuple[str, float]]:
        """Sites whose re-factoring has an error, the largest first."""
        found = [(path, error) for path, error in self.merged.errors.items() if error]
        return sorted(found, key=lambda one: -one[1])


def prepared(args: argparse.Namespace) -> Job:
    """Read what was asked for, the parents and their base. Raises as they do, before anything is computed."""
    if args.recipe is not None:
        _take_recipe(args)
    if len(args.adapters) < 1 or args.out is None:
        missing = "adapters" if not args.adapters else "--out FOLDER"
        raise ConfigError(f"A merge needs {missing}.", do="tarsia merge A B --out FOLDER, or see tarsia merge --list")
    _check_measures(args)
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("Something is there already.", given=str(out), do="choose another folder, or remove it first")
    names = adapted.named(args.adapters)
    folders = [where(given) for given in args.adapters]
    way = way_of(args.method or "linear").taking(_options(args))
    weights = _numbers(args.weights, "--weights") if args.weights is not None else [1.0] * len(folders)
    if len(weights) != len(folders):
        raise ConfigError(
            "There must be one weight for each adapter.",
            given=f"{len(weights)} weights, {len(folders)} adapters",
            do="write " + "--weights=" + ",".join(["1"] * len(folders)) + ", say",
        )
    way.check(weights)
    _check_names(args.rows, names)
    sources = rows.named(args.rows, args.limit, "--rows")
    validation = rows.named(args.tune, args.limit, "--tune")
    _check_owned(args, sources, names)
    seen = adapted.resolution(dict(zip(args.adapters, folders, strict=True)), args.resolution)
    host, parents = _opened(folders, args.base, resolution=seen, processor=bool(sources or validation))
    job = Job(
        args=args,
        out=out,
        parents=dict(zip(names, parents, strict=True)),
        weights=tuple(weights),
        way=way,
        scale=1.0 if args.scale is None else args.scale,
        rank=args.rank,
        components=_components(args.component),
        host=host,
        rows=sources,
        tune=validation,
    )
    _tell(job)
    return job


def done(job: Job) -> Outcome:
    """Look at the parents, tune, merge, write, prove and measure."""
    between = _between(job)
    if between is None and job.args.report is not None:
        raise ConfigError(
            "There is nothing between these adapters to show on a page.", given="--report", do="leave it out"
        )
    scale, tried = _tuned(job) if job.tune else (job.scale, ())
    made = job.merged(scale)
    recorded_on, inputs = _inputs(job)
    probed, proof = _probed(job, made, inputs, recorded_on)
    card = {**made.adapter.card, "names": list(job.names), "interference": _summary(between)}
    if tried:
        card["tuned"] = {"on": list(job.tune), "tried": [list(line) for line in tried], "scale": scale}
    finished = replace(made, adapter=replace(made.adapter, probe=probed, card=card))
    save(finished.adapter, job.out, lambda fresh: _check_read_again(job, fresh, probed))
    tasks = _tasks(job) if job.rows else ()
    return Outcome(finished, scale, between, _coverage(job, finished), tried, tasks, proof)


def _check_read_again(job: Job, fresh: Path, probed: Probe | None) -> None:
    """Put in what the files hold, and hold it to what was probed before they were written."""
    put(job.host, load(fresh), _MERGED)
    if probed is not None:
        prove(job.host, _MERGED, probed)


def judged(job: Job, outcome: Outcome) -> int:
    """The exit code: 1 where a task keeps less than was asked, or nobody can tell, which is said."""
    least = job.args.min_kept
    if least is None:
        return 0
    owned = [task for task in outcome.tasks if task.parent is not None]
    poor = [task for task in owned if task.kept is None or task.kept < least]
    for task in poor:
        told = (
            f"{task.name}: its parent alone has nothing right, so what is kept of it can not be told"
            if task.kept is None
            else f"{task.name} keeps {task.kept:.1%} of its parent"
        )
        print(f"tarsia: {told}, at least {least:.1%} is asked", file=sys.stderr)
    if not owned:
        print(f"tarsia: nothing kept was measured, at least {least:.1%} is asked", file=sys.stderr)
    return 1 if poor or not owned else 0


def values(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Everything as plain values."""
    report = outcome.interference
    return {
        "out": str(job.out),
        "adapters": list(job.names),
        "way": job.way.name,
        "options": dict(job.way.options),
        "weights": list(job.weights),
        "scale": outcome.scale,
        "patches": len(outcome.merged.adapter.patches),
        "errors": dict(outcome.merged.errors),
        "coverage": {name: {"merged": n, "parents": list(by)} for name, (n, by) in outcome.coverage.items()},
        "interference": None if report is None else report.model_dump(mode="json", exclude={"sites"}),
        "tried": [list(line) for line in outcome.tried],
        "tasks": [
            {"task": t.name, "rows": t.rows, "base": t.base, "parent": t.parent, "merged": t.merged, "kept": t.kept}
            for t in outcome.tasks
        ],
        "proof": outcome.proof,
    }


def write_report(job: Job, outcome: Outcome, path: Path) -> None:
    """The page of a merge. Raises ConfigError where there is nothing to show, or the file can not be written."""
    if outcome.interference is None:
        raise ConfigError(
            "There is nothing between these adapters to show on a page.", given="--report", do="leave it out"
        )
    tables = [_asked(job, outcome)]
    if outcome.tasks:
        columns = ("task", "rows", "base", "its parent", "merged", "kept")
        note = "free answers right; kept is the merged adapter's share of what the parent alone has right"
        tables.append(Table("Tasks", note, columns, tuple(task.cells for task in outcome.tasks)))
    if outcome.tried:
        lines = tuple((f"{scale:g}", f"{share:.1%}", f"{loss:.3f}") for scale, share, loss in outcome.tried)
        tables.append(
            Table("Scales", f"on the validation rows; {outcome.scale:g} is taken", ("scale", "right", "loss"), lines)
        )
    if errors := tuple((site, f"{error:.3g}") for site, error in outcome.off):
        note = "how far a site is from the whole result (Frobenius, relative), the largest first"
        tables.append(Table(f"Re-factored with an error: {len(errors)} sites", note, ("site", "error"), errors))
    title = f"{job.way.name} at scale {outcome.scale:g}, base {job.host.name}: {outcome.proof}"
    write_page(outcome.interference, path, title, tables)


def _asked(job: Job, outcome: Outcome) -> Table:
    """What was merged, and how."""
    lines = [("way", job.way.name), *((name, str(value)) for name, value in job.way.options.items())]
    lines += [(f"weight of {name}", f"{weight:g}") for name, weight in zip(job.names, job.weights, strict=True)]
    lines += [("scale", f"{outcome.scale:g}"), ("rank", "as it comes" if job.rank is None else str(job.rank))]
    lines += [(f"factor of {name}", f"{value:g}") for name, value in job.components.items()]
    return Table("The merge", "what was asked for", ("what", "value"), tuple(lines))


def _take_recipe(args: argparse.Namespace) -> None:
    """Fill in what the command line leaves open. Raises ConfigError for a file that is no recipe of a merge."""
    try:
        held = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("The recipe can not be read.", given=f"{args.recipe}: {error}") from None
    if not isinstance(held, dict) or (unknown := sorted(set(map(str, held)) - set(_KEYS))):
        raise ConfigError(
            "This is no recipe of a merge.",
            given=f"{args.recipe}: {', '.join(unknown) if isinstance(held, dict) else type(held).__name__}",
            allowed=", ".join(_KEYS),
            do=near(unknown[0], _KEYS) if isinstance(held, dict) else "write option: value, one a line",
        )
    for key, value in held.items():
        kind = _KEYS[key]
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise ConfigError(f"The recipe's {key} can not be that.", given=repr(value), allowed=kind.__name__)
    args.adapters = args.adapters or [str(path) for path in held.get("adapters", ())]
    if args.weights is None and "weights" in held:
        args.weights = ",".join(map(str, held["weights"]))
    for key in ("method", "scale", "density", "rank", "base", "out"):
        if getattr(args, key) is None:
            setattr(args, key, held.get(key))
    args.component = args.component or [f"{name}={value}" for name, value in held.get("components", {}).items()]
    args.option = args.option or [f"{name}={value}" for name, value in held.get("options", {}).items()]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the way. Raises ConfigError for one that is not NAME=VALUE."""
    found: dict[str, Any] = {} if args.density is None else {"density": args.density}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError("An option is written NAME=VALUE.", given=f"--option {text}")
        found[name] = yaml.safe_load(value)
    return found


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("Numbers are written 0.5,0.5.", given=f"{option} {text}") from None


def _components(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in set(Component):
            raise ConfigError(
                "A component's factor is written vision=0.5.", given=f"--component {text}", allowed=", ".join(Component)
            )
        (found[name],) = _numbers(value, f"--component {name}=")
    return found


def _check_measures(args: argparse.Namespace) -> None:
    for option in ("limit", "max_new_tokens", "batch"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError("This must be at least 1.", given=f"--{option.replace('_', '-')} {value}")
    find(args.metric)
    if args.rank is not None and args.rank < 1:
        raise ConfigError(
            "This must be at least 1.", given=f"--rank {args.rank}", do="write --rank 16, or leave it out"
        )
    if args.grid is not None and 0 in _numbers(args.grid, "--grid"):
        raise ConfigError("At scale 0 nothing is left.", given=f"--grid {args.grid}", do="leave the 0 out")
    if args.scale is not None and args.tune:
        raise ConfigError("The scale is given and is to be tuned.", given="--scale, --tune", do="leave one of them out")
    if args.grid is not None and not args.tune:
        raise ConfigError("A grid is for tuning.", given=f"--grid {args.grid}", do="add --tune SOURCE")
    if args.min_kept is not None and not args.rows:
        raise ConfigError(
            "What is kept is told on rows.", given=f"--min-kept {args.min_kept:g}", do="add --rows SOURCE"
        )


def _check_names(given: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError where rows are said to be the task of an adapter that is not there."""
    unknown = [name for text in given if (name := rows.name_in(text)) is not None and name not in names]
    if unknown:
        raise ConfigError(
            "Rows are named for the adapter whose task they are, and no adapter has this name.",
            given=f"--rows {unknown[0]}=...",
            allowed=", ".join(names),
            do=f"{near(unknown[0], names)}; rows of no adapter's task are given without a name",
        )


def _check_owned(args: argparse.Namespace, sources: Mapping[str, Rows], names: Sequence[str]) -> None:
    """Say on stderr which adapter's task is not measured. Raises ConfigError where none is and a share is asked."""
    owned = set(_owners(sources, names).values())
    if args.min_kept is not None and not owned:
        raise ConfigError(
            "None of these rows is an adapter's task, so what is kept of one can not be told.",
            given=f"--min-kept {args.min_kept:g}, rows {', '.join(sources)}",
            allowed=", ".join(names),
            do=f"name the rows for their adapter: --rows {names[0]}=SOURCE",
        )
    if sources and (left := [name for name in names if name not in owned]):
        print(
            f"tarsia: note: no rows for {', '.join(left)} (--rows NAME=SOURCE): what is left of that is not measured",
            file=sys.stderr,
        )


def _opened(
    folders: Sequence[Path], name: str | None, *, resolution: int | None, processor: bool
) -> tuple[Host, list[Adapter]]:
    """The base as the parents were trained over it, in the precision of their probes, and the parents."""
    own = [load(folder) if (folder / OURSELVES).is_file() else None for folder in folders]
    marks = [one.fingerprint for one in own if one is not None and one.fingerprint is not None]
    forms = {FourBits.of(mark.quantisation) for mark in marks}
    if len(forms) > 1:
        told = (
            f"{folder}: " + ("the files' own numbers" if form is None else form.text)
            for folder, one in zip(folders, own, strict=True)
            if one is not None and one.fingerprint is not None
            for form in [FourBits.of(one.fingerprint.quantisation)]
        )
        raise ConfigError(
            "The adapters were trained over bases in different forms, and a sum of both is right over neither.",
            given="; ".join(told),
            allowed="adapters of one form",
            do="leave one out, or train it over the other's form",
        )
    form = forms.pop() if len(forms) == 1 else None
    dtypes = {one.probe.dtype for one in own if one is not None and one.probe is not None}
    place: dict[str, Any] = {
        "dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
        "resolution": resolution,
        "processor": processor,
    }
    base = named(folders[0], name)
    try:
        host = open_base(base, four_bits=form, **place)
    except QuantisedAlready:  # its files hold the form that the adapters ask for
        host = open_base(base, **place)
    return host, [one or load(folder, host) for one, folder in zip(own, folders, strict=True)]


def _tell(job: Job) -> None:
    """Say on stderr, before anything is computed, what nobody knows, and where thin adapters become whole weights."""
    for name, parent in job.parents.items():
        if parent.fingerprint is None:
            print(
                f"tarsia: note: {name} does not say which base it belongs to: it is taken for one of {job.host.name}, "
                "and nothing proves it",
                file=sys.stderr,
            )
    taking = [one for one, weight in zip(job.parents.values(), job.weights, strict=True) if weight]
    found = swelling(taking, job.way, job.host) if job.rank is None else None
    if found is not None:
        print(
            f"tarsia: note: {job.way.name} makes whole weights of factors: up to {size(found.size)} at {found.sites} "
            f"sites, where the adapters hold {size(found.before)}; --rank {found.rank}, say, keeps it thin, and tells "
            "what that loses",
            file=sys.stderr,
        )


def _between(job: Job) -> Interference | None:
    """What the parents take from each other; None, and why on stderr, where there is nothing between them."""
    held = [(name, weight) for name, weight in zip(job.names, job.weights, strict=True) if weight]
    if len(held) < 2:
        return None
    try:
        return interference({name: job.parents[name] for name, _ in held}, job.host, [weight for _, weight in held])
    except MergeError as error:
        print(f"tarsia: note: {error.what}", file=sys.stderr)
        if job.way.combine == "mean":
            shares = job.way.shares([weight for _, weight in held])
            each = ", ".join(f"{name} {share:.3g}" for (name, _), share in zip(held, shares, strict=True))
            print(
                f"tarsia: warning: {job.way.name} is a mean, in which each counts as its share alone ({each}): "
                "--method task_arithmetic keeps them whole",
                file=sys.stderr,
            )
        return None


def _summary(report: Interference | None) -> dict[str, Any] | None:
    return None if report is None else report.whole.model_dump(mode="json")


def _tuned(job: Job) -> tuple[float, tuple[tuple[float, float, float], ...]]:
    """The scale with most right on the mean of the validation sources; of equals, the one of least loss.

    Where the best lies at an end of the shipped grid, scales beyond it are tried until one is worse; at an end of a
    grid that was given, that is said.
    """
    given = job.args.grid is not None
    tried = {scale: _at(job, scale) for scale in (_numbers(job.args.grid, "--grid") if given else GRID)}

    def best() -> float:
        return max(tried, key=lambda scale: (tried[scale][0], -tried[scale][1]))

    while not given and len(tried) < len(GRID) + FURTHER and best() in (max(tried), min(tried)):
        beyond = round(best() * STEP if best() == max(tried) else best() / STEP, 3)
        tried[beyond] = _at(job, beyond)
    if best() in (max(tried), min(tried)):
        print(
            f"tarsia: note: {best():g} is the last scale that was tried: a better one may lie beyond", file=sys.stderr
        )
    return best(), tuple((scale, *tried[scale]) for scale in sorted(tried))


def _at(job: Job, scale: float) -> tuple[float, float]:
    """Share right and loss on the validation rows at a scale, both means of the sources."""
    put(job.host, job.merged(scale).adapter, _MERGED)
    activate(job.host.model, _MERGED)
    results = job.measured(job.tune).results
    detach(job.host.model, _MERGED)
    return sum(r.free.mean for r in results) / len(results), sum(r.loss for r in results) / len(results)


def _inputs(job: Job) -> tuple[str, list[Mapping[str, Any]]]:
    """Batches that the result may be probed on, and where they come from."""
    sources = {**job.rows, **job.tune}
    if sources:
        chosen = [row for members in sources.values() for row in list(members)[:PROBED]]
        encoder = Encoder(job.host.processor, variables=job.host.variables, resolution=job.host.resolution)
        return "the rows", [encoder.batch(chosen).inputs]
    return "a parent's probe", [one.probe.inputs for one in job.parents.values() if one.probe is not None]


def _probed(job: Job, made: Merged, batches: Sequence[Mapping[str, Any]], origin: str) -> tuple[Probe | None, str]:
    """The result's probe on the first batch that it acts on, and what is proved by it."""
    if made.adapter.probe is not None:  # a parent itself
        return made.adapter.probe, "it is the parent itself, and proved by its probe"
    put(job.host, made.adapter, _MERGED)
    activate(job.host.model, _MERGED)
    try:
        for inputs in batches:
            try:
                found = probe(job.host, inputs)
            except Unmoved:
                continue
            if (why := found.provable(job.host)) is None:
                moved = found.difference / found.peak
                return (
                    found,
                    f"read again and proved on {origin} (a logit is moved by up to {moved:.2g} of the largest)",
                )
    finally:
        detach(job.host.model, _MERGED)
    why = "there are no rows and no parent has a probe" if not batches else f"it hardly moves the outputs of {origin}"
    print(f"tarsia: warning: the result is not proved: {why}", file=sys.stderr)
    return None, f"not proved: {why}"


def _coverage(job: Job, made: Merged) -> dict[str, tuple[int, tuple[int, ...]]]:
    found = {}
    for component in Component:
        paths = {site.path for site in job.host.sites if site.component is component}
        by = tuple(len(paths & set(one.patches)) for one in job.parents.values())
        if any(by):
            found[str(component)] = (len(paths & set(made.adapter.patches)), by)
    return found


def _tasks(job: Job) -> tuple[Task, ...]:
    """Every source with the base, with its parent alone, and with the result, which is put in already."""
    activate(job.host.model, _MERGED)
    after = _by_source(job.measured(job.rows))
    activate(job.host.model)
    before = _by_source(job.measured(job.rows))
    alone = {}
    for source, parent in _owners(job.rows, job.names).items():
        put(job.host, job.parents[parent], parent)
        activate(job.host.model, parent)
        alone[source] = _by_source(job.measured({source: job.rows[source]}))[source]
        detach(job.host.model, parent)
    return tuple(
        Task(
            name,
            before[name].n,
            before[name].free.mean,
            alone[name].free.mean if name in alone else None,
            after[name].free.mean,
        )
        for name in job.rows
    )


def _by_source(report: Report) -> dict[str, Result]:
    return {result.source: result for result in report.results}


def _owners(sources: Collection[str], names: Sequence[str]) -> dict[str, str]:
    """The parent of each source: of the same name; or, where no name fits and there are as many, in their order."""
    same = {source: source for source in sources if source in names}
    if not same and len(sources) == len(names):
        return dict(zip(sources, names, strict=True))
    return same
