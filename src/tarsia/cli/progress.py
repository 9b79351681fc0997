"""A training run as it is shown: on a screen, as lines of JSON, or hardly at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tarsia.cli import output, rounded
from tarsia.core.site import Component
from tarsia.train.events import Evaluated, Event, Finished, Memory, Notice, Saved, Started, Step, as_json

MARKS = 20
"""Lines of progress of a whole run where stderr is no terminal."""


class Lines:
    """Every event as one line of JSON on stdout."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        print(as_json(event), flush=True)


class Quiet(Lines):
    """Notices on stderr, at the end the adapter's folder on stdout."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            print(f"tarsia: {event.what}", file=sys.stderr)
        elif isinstance(event, Finished):
            print(event.folder)


class Screen:
    """Tables on stdout; a bar on stderr, or now and then a line where that is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID = self.bar.add_task("", visible=False)
        self.steps = 0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.steps = event.steps
                coverage(event)
                self.bar.update(self.task, total=event.steps, completed=event.resumed, visible=True)
            case Notice():
                self.bar.print(f"note: {event.what}", markup=False)
            case Step():
                self._step(event)
            case Evaluated():
                evaluation(event)
            case Saved():
                pass  # shown by what follows: the next step, or the adapter
            case Memory():
                self.bar.stop()
                print(f"memory: {memory(event)}")
            case Finished():
                self.bar.stop()
                mix(event)
                print(f"adapter: {event.folder} ({event.seconds:.0f} s)")

    def _step(self, event: Step) -> None:
        text = f"loss {event.loss:.4f}{_by_source(event)}, {event.tokens_per_second:.0f} tokens/s"
        self.bar.update(self.task, completed=event.step, description=text)
        every = max(1, self.steps // MARKS)
        if not self.console.is_terminal and (event.step % every == 0 or event.step == self.steps):
            print(f"step {event.step}/{self.steps}: {text}", file=sys.stderr, flush=True)


def coverage(event: Started) -> None:
    """What is trained, before the first step."""
    output.table(
        f"trains {event.trained:,} parameters, {event.share:.2%} of the base, in {event.steps} steps",
        ("method", "component", "role", "sites", "dead", "parameters", "share"),
        [
            (c.method, c.component, c.role, str(c.sites), str(c.dead or ""), f"{c.trained:,}", f"{c.share:.2%}")
            for c in event.coverage
        ],
        right=("sites", "dead", "parameters", "share"),
    )
    for c in event.coverage:
        if c.lacking:
            print(f"left out: {c.lacking} sites of {c.component} {c.role} have nothing that {c.method} trains")
    if event.peaks:
        parts = zip(event.recipe["parts"], event.peaks, strict=True)
        print("peak learning rates:", "; ".join(f"{part['method']} {_rates(peaks)}" for part, peaks in parts))
    frozen = [component for component in Component if all(c.component != component for c in event.coverage)]
    if frozen:
        print(f"trains nothing of: {', '.join(frozen)}")
    if event.four_bits is not None:
        rounded.show(event.four_bits)
    for line in event.fast:
        print(f"speed: {line}")
    if 0 < event.resumed < event.steps:
        print(f"goes on after step {event.resumed}")


def _rates(peaks: Mapping[str, tuple[float, ...]]) -> str:
    """One rate where all tensors of a part have it, else each tensor's."""
    different = sorted({rate for rates in peaks.values() for rate in rates})
    if len(different) == 1:
        return f"{different[0]:.3g}"
    return ", ".join(f"{name} {'/'.join(f'{rate:.3g}' for rate in rates)}" for name, rates in peaks.items())


def mix(event: Finished) -> None:
    """What was trained on: each source's rows, labelled tokens, mean loss and share of the whole run's loss."""
    card = event.adapter.card
    output.table(
        f"trained on, {card['mix']}",
        ("source", "asked", "rows", "of rows", "tokens", "of tokens", "loss", "of loss"),
        [
            (
                name,
                f"{source['share_asked']:.1%}",
                f"{source['rows']:,}",
                f"{source['share_got']:.1%}",
                f"{source['tokens']:,}",
                f"{source['token_share']:.1%}",
                "-" if source["final_loss"] is None else f"{source['final_loss']:.4f}",
                f"{source['loss_share']:.1%}",
            )
            for name, source in card["data"].items()
        ],
        right=("asked", "rows", "of rows", "tokens", "of tokens", "loss", "of loss"),
    )


def memory(event: Memory) -> str:
    """What the run took, in GB (10^9 bytes)."""
    if event.peak is None:
        taken = f"not measured in the steps: {event.unwatched or 'there were none'}"
    else:
        parts = ("weights", "quantised", "patches", "states", "other", "step")
        shares = ", ".join(f"{name} {_gb(size)}" for name in parts if (size := getattr(event, name)))
        taken = f"{_gb(event.peak)} GB of tensors at most ({shares}), in step {event.number}, {event.phase}"
    reserved = "" if event.reserved is None else f"; {_gb(event.reserved)} GB reserved"
    process = "" if event.process is None else f"; the process {_gb(event.process)} GB"
    return f"{taken}{reserved}{process}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"


def _by_source(step: Step) -> str:
    """Each source's mean loss, where there are several."""
    means = ", ".join(f"{source} {loss:.4f}" for source, loss in sorted(step.losses.items()))
    return f" ({means})" if len(step.losses) > 1 else ""


def evaluation(event: Evaluated) -> None:
    """What an evaluation found, in percent with its interval."""
    output.table(
        f"after step {event.step}",
        ("source", "free", "constrained", "loss"),
        [
            (r["source"], _share(r["free"]), _share(r["constrained"]), f"{r['loss']:.3f}")
            for r in event.results["results"]
        ],
        right=("free", "constrained", "loss"),
    )


def _share(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "-"
    return f"{interval['mean']:.1%} ({interval['low']:.1%}..{interval['high']:.1%})"
