"""Training inside a random subspace of a model's weights: theta = theta0 + P z, of which only z is trained.

    python -m tarsia.labs.subspace OUT

C. Li, H. Farkhondeh, R. Liu, J. Yosinski, Measuring the intrinsic dimension of objective landscapes
(arXiv:1804.08838, equation 2); A. Aghajanyan, L. Zettlemoyer, S. Gupta (arXiv:2012.13255) for fine-tuning.

P [D, d] has one entry in each row, +1 or -1, in a column drawn at random: a sparse random projection whose columns
are orthogonal, for no two share a row. A column is a random direction of D/d weights. It is never stored as a matrix.
The entries are not divided by the columns' length, so a step of Adam moves each weight by the learning rate, in every
d and in full training (d = D, P = 1) alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter import Host, open_outline
from tarsia.core.select import select
from tarsia.core.site import Kind
from tarsia.data import Encoder, Source, read
from tarsia.labs.parity import JOBS
from tarsia.labs.runs import BATCH, Draw
from tarsia.labs.trials import Chosen, Trial, Trials
from tarsia.train.exact import deterministic
from tarsia.train.features import features
from tarsia.train.optimiser import Schedule, adamw, set_rates
from tarsia.train.step import backward
from tarsia.train.store import Store

SELECT: Final = "language.*.{q,k,v,o,gate,up,down}"
FULL: Final = "full"
SIZES: Final = (2048, 16384, 65536, 131072)
TASKS: Final[Mapping[str, Draw]] = {job: JOBS[job] for job in ("infrared", "commands")}
RANK: Final = 8
"""Of the LoRA on the same layers whose count d90 is set beside."""
KINDS: Final[Mapping[str, Sequence[dict[str, Any]]]] = {FULL: [], **{f"d={size}": [] for size in SIZES}}
"""What is trained; no recipe's parts, for it is trained here."""
STEPS: Final = 100
SEEDS: Final = (1,)
RATES: Final[Mapping[str, Sequence[float]]] = {FULL: (1e-3, 3e-4), "subspace": (2e-3,)}
"""Peak rates that are tried, by what is trained."""
_WARMUP: Final = 0.06
_CLIP: Final = 1.0
_KEPT: Final = 4_000_000_000  # bytes of the tower's outputs


@dataclass(frozen=True, slots=True)
class Projection:
    """P by its rows: the column of each row's one entry, int64 [D], and its sign, float32 [D]."""

    column: Tensor
    sign: Tensor
    size: int

    @classmethod
    def drawn(cls, weights: int, size: int, seed: int) -> Projection:
        """A random P [weights, size]; the identity where the two are one."""
        if size == weights:
            return cls(torch.arange(weights), torch.ones(weights), size)
        generator = torch.Generator().manual_seed(seed)
        column = torch.randint(size, (weights,), generator=generator)
        return cls(column, 2.0 * torch.randint(2, (weights,), generator=generator) - 1.0, size)

    def out(self, z: Tensor) -> Tensor:
        """P z, [D]."""
        return z[self.column] * self.sign

    def back(self, gradient: Tensor) -> Tensor:
        """P^T g, [d]."""
        return gradient.new_zeros(self.size).index_add_(0, self.column, gradient * self.sign)


class Weights:
    """The weights of a model's sites as one vector, and what each of them was."""

    def __init__(self, host: Host, wanted: str) -> None:
        self.model = host.model
        self.parameters = [host.model.get_parameter(site.weight) for site in select(wanted, host.sites, {Kind.WEIGHT})]
        self.sizes = [p.numel() for p in self.parameters]
        self.before = torch.cat([p.detach().flatten().clone() for p in self.parameters])

    def __len__(self) -> int:
        return len(self.before)

    def gradient(self) -> Tensor:
        """The gradient of all, [D]."""
        return torch.cat([self._gradient(p).flatten() for p in self.parameters])

    @staticmethod
    def _gradient(parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        """Give every weight its value of ``values`` [D]."""
        for parameter, value in zip(self.parameters, values.split(self.sizes), strict=True):
            parameter.copy_(value.view_as(parameter))
            parameter.grad = None

    @contextmanager
    def free(self) -> Iterator[None]:
        """Let these weights alone have gradients inside; afterwards all are what they were."""
        held = {name: p.requires_grad for name, p in self.model.named_parameters()}
        try:
            self.model.requires_grad_(False)
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            self.put(self.before)
            for name, wanted in held.items():
                self.model.get_parameter(name).requires_grad_(wanted)


def descend(
    host: Host, weights: Weights, projection: Projection, rows: Sequence[Any], trial: Trial
) -> Iterator[tuple[int, float]]:
    """Train z, from 0, with AdamW on random batches of ``rows``; gives each step and its loss in nats a token."""
    z = torch.nn.Parameter(torch.zeros(projection.size))
    optimiser = adamw([{"z": z}], [trial.rate], (0.9, 0.999), 0.0)
    schedule = Schedule(trial.steps, round(_WARMUP * trial.steps), "cosine")
    encoder = Encoder(host.processor, variables=host.variables)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trial.seed)).tolist()
    for step in range(trial.steps):
        chosen = [rows[order[(BATCH * step + i) % len(rows)]] for i in range(BATCH)]
        set_rates(optimiser, schedule.share(step))
        with deterministic(torch.device("cpu")):
            losses = backward(host.model, [encoder.batch(chosen)], step + 1)
            z.grad = projection.back(weights.gradient())
            torch.nn.utils.clip_grad_norm_([z], _CLIP)
            optimiser.step()
            weights.put(weights.before + projection.out(z.detach()))
        yield step + 1, losses.loss


class Subspaces(Trials):
    """The desk of the runs, which are no recipes: all is trained here."""

    def perform(self, trial: Trial) -> dict[str, Any]:
        began, host = time.monotonic(), self.host
        weights = Weights(host, SELECT)
        size = len(weights) if trial.kind == FULL else int(trial.kind.removeprefix("d="))
        rows = read(Source(path=str(self.rows(trial.job, "train")), name=trial.job))
        with weights.free(), features(host, Store(self.out / "features", _KEPT)):
            host.model.train()
            projection = Projection.drawn(len(weights), size, 1000 + trial.seed)
            losses = [loss for _, loss in descend(host, weights, projection, rows, trial)]
            host.model.eval()
            splits = self.measured(trial.job)
        return {
            "splits": splits,
            "trained": size,
            "base": host.fingerprint.weights,
            "loss": {"first": losses[0], "final": sum(losses[-20:]) / len(losses[-20:])},
            "seconds": round(time.monotonic() - began, 1),
        }


def desk(out: Path, show: Callable[[str], None] | None = None) -> Subspaces:
    """The desk on which the runs are kept."""
    return Subspaces(out, TASKS, KINDS, show)


def found(trials: Trials) -> dict[tuple[str, str], Chosen]:
    """Every kind on every task, each at its best rate. Trains what has no result."""
    return {
        (job, kind): trials.chosen(Trial(job, kind, 0.0, 0, STEPS), rates(kind), SEEDS)
        for job in TASKS
        for kind in KINDS
    }


def rates(kind: str) -> Sequence[float]:
    """The rates that are tried for a kind."""
    return RATES.get(kind, RATES["subspace"])


def lora() -> int:
    """How many numbers a LoRA of rank RANK trains on the same layers."""
    sites = select(SELECT, open_outline("mini-1", processor=False).sites, {Kind.WEIGHT})
    return sum(RANK * sum(site.shape) for site in sites)


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = desk(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dimension"))
    for job in TASKS:
        runs.before(job)
    for (job, kind), chosen in found(runs).items():
        print(f"  {job} {kind}: {chosen.accuracy:.1f} % at {chosen.rate:g}", flush=True)
