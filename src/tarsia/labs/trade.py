"""Every method of the registry on one job of mini-1: how many numbers it trains, and what it reaches with them.

    python -m tarsia.labs.trade OUT

A method that is registered is run, without a word here, at DEFAULT's rates; one that does not apply says so itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import tarsia.methods  # noqa: F401 (fills the registry)
from tarsia.core.errors import AttachError, ConfigError, SelectionError
from tarsia.core.method import METHODS
from tarsia.core.site import Kind
from tarsia.labs.parity import JOBS
from tarsia.labs.runs import Draw
from tarsia.labs.trials import Chosen, Part, Trial, Trials

JOB: Final = "infrared"
STEPS: Final = 100
SEEDS: Final = (1,)
LINEAR: Final = "language.*.{q,k,v,o,gate,up,down}"
WHOLE: Final = "full"


@dataclass(frozen=True, slots=True)
class Setting:
    """How a method is tried: peak rates, where (None: what it patches by itself in the decoder's layers, or along its
    sequence), and options that are not its usual ones."""

    rates: Sequence[float]
    select: str | None = None
    options: Mapping[str, Any] | None = None


DEFAULT: Final = Setting((4e-3,))
SETTINGS: Final[Mapping[str, Setting]] = {
    WHOLE: Setting((1e-3,), LINEAR),
    "pissa": Setting((1e-3,), options={"alpha": 8.0}),
    "rslora": Setting((1.5e-3,)),
    "loraplus": Setting((1e-3,)),
    "ia3": Setting((2e-2,)),
    "vera": Setting((2e-2,)),
    "bitfit": Setting((4e-3,), "vision; projector"),
    "prompt": Setting((3e-2,)),
    "prefix": Setting((2e-2,)),
    "prefix_mlp": Setting((2e-3,)),
    "vpt": Setting((2e-2,), "vision.0"),
    "vpt_deep": Setting((2e-2,), "vision.*"),
}
"""By method. mini-1's decoder has no biases, so BitFit's are the tower's and the projector's."""


def setting(method: str) -> Setting:
    """How a method is tried; DEFAULT where SETTINGS has no word on it."""
    return SETTINGS.get(method, DEFAULT)


def part(method: str) -> Part:
    """The recipe's part of a method, without its rate."""
    held = setting(method)
    usual = "language" if Kind.SEQUENCE in METHODS[method].kinds else "language.*"
    return {"method": method, "select": held.select or usual, **(held.options or {})}


def kinds() -> dict[str, list[Part]]:
    """The parts by method, of all that are registered, in the order of their names."""
    return {method: [part(method)] for method in sorted(METHODS)}


TASK: Final[Mapping[str, Draw]] = {JOB: JOBS[JOB]}


class Trade(Trials):
    """The desk of the runs. What a method that does not apply says is its result."""

    def perform(self, trial: Trial) -> dict[str, Any]:
        try:
            return super().perform(trial)
        except (AttachError, ConfigError, SelectionError) as error:
            return {"refused": str(error).splitlines()[0]}


def desk(out: Path, show: Callable[[str], None] | None = None) -> Trade:
    """The desk on which the runs are kept."""
    return Trade(out, TASK, kinds(), show)


def found(trials: Trade) -> dict[str, Chosen | str]:
    """By method what it reached at its best rate, or the sentence in which it says why it does not apply."""
    results: dict[str, Chosen | str] = {}
    for method in trials.kinds:
        rates = setting(method).rates
        first = trials.result(Trial(JOB, method, rates[0], SEEDS[0], STEPS))
        if "refused" in first:
            results[method] = str(first["refused"])
        else:
            results[method] = trials.chosen(Trial(JOB, method, rates[0], SEEDS[0], STEPS), rates, SEEDS)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = desk(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/methods"))
    runs.before(JOB)
    for method, reached in found(runs).items():
        if isinstance(reached, str):
            print(f"  {method}: {reached}", flush=True)
        else:
            print(f"  {method}: {reached.accuracy:.1f} % with {reached.trained} at {reached.rate:g}", flush=True)
