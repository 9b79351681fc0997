"""A run in memory: what is built from a recipe, and how it gets into a checkpoint and out again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from inspect import Parameter, signature
from pathlib import Path
from typing import Final

import torch
import transformers
from torch import Tensor, nn

from tarsia.adapter import Fingerprint, Host
from tarsia.anatomy import anatomy_of
from tarsia.core.attach import Covered, Part, attach, detach, patches
from tarsia.core.errors import ConfigError, TrainingError
from tarsia.core.method import find
from tarsia.core.patch import Paced, Patch
from tarsia.core.select import select
from tarsia.core.site import Component, Site
from tarsia.data import Batch, Encoder, Mixture, Rows, read
from tarsia.train.checkpoint import Checkpoint, found, newest
from tarsia.train.disk import write_synced, writing
from tarsia.train.events import Log
from tarsia.train.exact import OwnRandom
from tarsia.train.features import Cache
from tarsia.train.optimiser import Schedule, adamw
from tarsia.train.optimiser import restore as restore_optimiser
from tarsia.train.optimiser import state as optimiser_state
from tarsia.train.packing import packed, prove, shared
from tarsia.train.paged import PagedAdamW
from tarsia.train.recipe import Recipe, differences
from tarsia.train.spread import Below, Spread
from tarsia.train.step import named
from tarsia.train.taken import Meter
from tarsia.train.watch import GradientWatch

NAME: Final = "in-training"
"""The adapter's name in the model while it is trained."""


@dataclass
class Run:
    """The moving parts of one run; ``step`` counts the steps that are done."""

    recipe: Recipe
    host: Host
    parts: tuple[Part, ...]
    coverage: tuple[Covered, ...]
    patches: Mapping[Site, Patch]
    encoder: Encoder
    mixture: Mixture
    digests: Mapping[str, str]
    optimiser: torch.optim.AdamW
    schedule: Schedule
    watch: GradientWatch
    random: OwnRandom
    log: Log
    threads: int
    step: int = 0
    seconds: float = 0.0
    fast: tuple[str, ...] = ()
    features: Cache | None = None
    meter: Meter | None = None
    """What watches the memory of its steps, if anything does."""
    lengths: dict[tuple[int, int], int] = field(default_factory=dict)
    """Tokens of the rows that were met, by source and row, where rows are grouped."""
    proved: bool = False
    """Whether packed rows were seen to be computed as alone."""

    @property
    def model(self) -> nn.Module:
        return self.host.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def weights(self) -> dict[str, float] | None:
        """Each source's weight in a step's loss, by name; None where rows are sampled by weight instead."""
        return self.recipe.data.weights if self.recipe.data.mix == "weighted" else None

    def batches(self) -> tuple[Batch, ...]:
        """The micro-batches of the next step, on the model's device; a pure function of the recipe and the step."""
        batches = tuple(map(self.encode, self.dealt()))
        return tuple(packed(self.model, batch) for batch in batches) if self.packs else batches

    @property
    def packs(self) -> bool:
        """Whether the rows of a micro-batch are laid end to end."""
        return self.recipe.batching == "packed"

    def dealt(self) -> tuple[tuple[int, ...], ...]:
        """The rows of the stream in each micro-batch of the next step; where they are grouped, by length."""
        size, parts = self.recipe.batch, self.recipe.accumulate
        numbers = list(range(self.step * size * parts, (self.step + 1) * size * parts))
        if self.recipe.batching == "grouped":
            numbers.sort(key=lambda n: self._length(*self.mixture.row(n)))
        return tuple(tuple(numbers[i * size : (i + 1) * size]) for i in range(parts))

    def _length(self, source: int, row: int) -> int:
        """Tokens of a row. Each is encoded once more for this, when it is first met."""
        if (source, row) not in self.lengths:
            batch = self.encoder.batch([self.mixture.sources[source][row]])
            self.lengths[source, row] = batch.labels.shape[1]
        return self.lengths[source, row]

    def prove(self, batches: Sequence[Batch]) -> None:
        """See to it that the first packed rows are computed as alone; ``batches`` are the next step's.

        Raises TrainingError where they are not.
        """
        for numbers, tight in zip(self.dealt(), batches, strict=True):
            if self.packs and not self.proved and shared(tight):
                with nullcontext() if self.features is None else self.features.suspended():
                    prove(self.model, self.encode(numbers), tight)
                self.proved = True

    def encode(self, numbers: Sequence[int]) -> Batch:
        """These rows of the mixture's stream as one batch, pictures in the base's dtype.

        Raises TrainingError where none has a picture and the model can not be called without.
        """
        batch = self.encoder.batch([self.mixture[n] for n in numbers])
        missing = [name for name in self._needed if name not in batch.inputs]
        if missing:
            raise TrainingError(
                f"{type(self.model).__name__} can not be called on rows of which none has a picture.",
                given=f"{named([batch])}; without {', '.join(missing)}",
                do="give these rows a picture, leave them out, or raise batch so that others are beside them",
            )
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        inputs = {
            key: value.to(self.device, dtype if value.is_floating_point() else value.dtype)
            for key, value in batch.inputs.items()
        }
        return Batch(inputs, batch.labels, batch.n_pictures, batch.sources, batch.rows)

    @cached_property
    def _needed(self) -> tuple[str, ...]:
        """What the model's forward has no default for."""
        kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        parameters = signature(self.model.forward).parameters.values()
        return tuple(p.name for p in parameters if p.default is Parameter.empty and p.kind in kinds)

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of every patch, the live ones themselves."""
        return {
            f"{site.path}/{key}": v for site, patch in self.patches.items() for key, v in patch.state_dict().items()
        }

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on. (The rows follow from the recipe and the step.)"""
        tensors = {f"patch/{key}": value for key, value in self._tensors().items()}
        spread: tuple[Spread, ...] = ()
        if isinstance(self.optimiser, PagedAdamW):
            spread = (self.optimiser.spread("optimiser/"),)
        else:
            tensors |= {f"optimiser/{key}": value for key, value in optimiser_state(self.optimiser).items()}
        tensors |= {f"random/{key}": value for key, value in self.random.state().items()}
        values = {
            "recipe": self.recipe.hash,
            "base": asdict(self.host.fingerprint),
            "data": dict(self.digests),
            "watch": self.watch.state(),
            "seconds": self.seconds,
            "log": self.log.sync(),
            "threads": self.threads,
            "machine": machine(self),
            **({} if self.meter is None else {"memory": self.meter.state()}),
        }
        return Checkpoint(self.step, tensors, values, spread=spread)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises BaseMismatch, ConfigError or TrainingError where it is not of this run."""
        values = checkpoint.values
        Fingerprint(**values["base"]).check(self.host.fingerprint)
        changed = [name for name, held in values["data"].items() if self.digests.get(name) != held]
        if changed:
            raise ConfigError(
                "A source's rows have changed since the run began.",
                given=", ".join(changed),
                do="put the old file back, or choose another out",
            )
        held, given = self._tensors(), Below(checkpoint.tensors, "patch")
        shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (held, given)]
        if shapes[0] != shapes[1]:
            wrong = next(key for key in shapes[0] | shapes[1] if shapes[0].get(key) != shapes[1].get(key))
            raise TrainingError("The checkpoint's patches are not this run's.", given=wrong, do="choose another out")
        for key, value in given.items():
            held[key].copy_(value)
        restore_optimiser(self.optimiser, Below(checkpoint.tensors, "optimiser"))
        self.random.adopt(Below(checkpoint.tensors, "random"))
        self.watch.restore(values["watch"])
        self.log.cut(values["log"])
        if self.meter is not None and "memory" in values:
            self.meter.restore(values["memory"])
        self.step, self.seconds = checkpoint.step, values["seconds"]


def machine(run: Run) -> dict[str, str]:
    """What the last bits depend on, besides the recipe and the threads."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(run.device),
        "dtype": str(next(run.model.parameters()).dtype),
    }


def find_checkpoint(recipe: Recipe, out: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The checkpoint to go on from, if any, and notices. Raises ConfigError where ``out`` holds another run."""
    folder = out / "checkpoints"
    held = out / "recipe.json"
    if held.exists() and (found(folder) or (out / "adapter").exists()):
        try:
            theirs = json.loads(held.read_text(encoding="utf-8"))
            other = theirs["hash"] != recipe.hash
            changed = differences(recipe.resolved, theirs["recipe"]) if other else ()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                "What the folder says of its run can not be read.",
                given=f"{held}: {error}",
                do="choose another out, or remove that folder",
            ) from None
        if other:
            raise ConfigError(
                "The folder holds a run of another recipe.",
                given=f"{out}: " + "; ".join(changed[:6] or ["the order of a method's table"]),
                do="choose another out, or remove that folder",
            )
    checkpoint, notices = newest(folder)
    if checkpoint is not None and checkpoint.values["recipe"] != recipe.hash:
        raise ConfigError(
            "The folder's checkpoint is of another recipe.", given=str(out), do="choose another out, or remove it"
        )
    wanted = None if checkpoint is None else checkpoint.values["threads"]
    if recipe.threads is not None and wanted is not None and wanted != recipe.threads:
        raise ConfigError(
            "The last bits of every number depend on the threads, so a run goes on with as many as it began.",
            given=f"threads {recipe.threads}",
            allowed=str(wanted),
            do=f"set threads: {wanted}, leave it out, or choose another out",
        )
    return checkpoint, notices


def claim(recipe: Recipe, out: Path) -> None:
    """Write the recipe into ``out``, for whoever comes next."""
    text = json.dumps({"hash": recipe.hash, "recipe": recipe.resolved}, indent=1)
    with writing("The recipe", out, "free some space, or choose another out"):
        write_synced(out / ".recipe.json", text.encode())
        os.replace(out / ".recipe.json", out / "recipe.json")


def prepare(recipe: Recipe, host: Host | None, threads: int) -> Run:
    """Open what a recipe names, attach the patches and check that the rows can train them.

    Where it fails, ``host`` is left as it was.
    """
    sources = [read(source) for source in recipe.data.train]
    digests = {rows.source.title: rows.digest() for rows in sources}
    rows = recipe.data.rows_of_step(recipe.batch * recipe.accumulate)
    steps = recipe.steps_for(sum(map(len, sources)))
    schedule = Schedule(steps, recipe.warmup_steps(steps), recipe.decay)
    if host is None:
        host = recipe.open()
    _check_form(recipe, host)
    if recipe.batching == "packed":
        anatomy_of(host.model.config).counting()
    encoder = Encoder(host.processor, recipe.max_length, variables=host.variables, resolution=host.resolution)
    parts = tuple(Part(part.method, part.select, part.configure()) for part in recipe.parts)
    chosen = [_chosen(host, part) for part in parts]
    pictures = _show([held for held, source in zip(sources, recipe.data.train, strict=True) if source.weight])
    if not pictures and (seeing := [s for sites in chosen for s in sites if s.component is not Component.LANGUAGE]):
        raise TrainingError(
            "No row has a picture, so vision and projector can not be trained.",
            given=f"{len(seeing)} sites, {seeing[0].path} for one; sources {', '.join(digests)}",
            do="add rows with pictures, or select language sites alone",
        )
    coverage = attach(
        host.model, host.sites, parts, name=NAME, seed=recipe.seed, origin=host.origin, tokenize=host.tokenize
    )
    try:
        made = patches(host.model, NAME)
        named = [_named(sites, made) for sites in chosen]
        return Run(
            recipe=recipe,
            host=host,
            parts=parts,
            coverage=coverage,
            patches=made,
            encoder=encoder,
            mixture=Mixture(sources, [source.weight for source in recipe.data.train], recipe.seed, rows),
            digests=digests,
            optimiser=adamw(
                named,
                [part.rate for part in recipe.parts],
                recipe.betas,
                recipe.weight_decay,
                paces(made),
                None if recipe.optimiser is None else recipe.optimiser.form(Path(recipe.out)),
            ),
            schedule=schedule,
            watch=GradientWatch(made, pictures),
            random=OwnRandom(recipe.seed, next(host.model.parameters()).device),
            log=Log(Path(recipe.out) / "events.jsonl"),
            threads=threads,
        )
    except BaseException:
        detach(host.model, NAME)
        raise


def _check_form(recipe: Recipe, host: Host) -> None:
    """Raise ConfigError where a base that was opened elsewhere is not in the 4 bits that the recipe says, or is, or is
    shown pictures of another size."""
    asked = None if recipe.four_bits is None else recipe.four_bits.form
    held = None if host.quantisation is None else host.quantisation.asked
    if asked != held:
        raise ConfigError(
            "The base that is open is not in the form that the recipe says.",
            given="as its files hold it" if held is None else held.text,
            allowed="as its files hold it" if asked is None else asked.text,
            do="open it with recipe.open()",
        )
    if recipe.resolution != host.resolution:
        raise ConfigError(
            "The base that is open is shown pictures of another size than the recipe says.",
            given=f"resolution {host.resolution}",
            allowed=f"resolution {recipe.resolution}",
            do="open it with recipe.open()",
        )


def _show(sources: Sequence[Rows]) -> bool:
    """Whether any row has a picture; mostly a source's first one tells."""
    return any(rows[0].pictures for rows in sources) or any(sample.pictures for rows in sources for sample in rows)


def _chosen(host: Host, part: Part) -> tuple[Site, ...]:
    method = find(part.method)
    return select(part.select, host.sites, method.kinds, method.roles, method.patch.lacks)


def paces(made: Mapping[Site, Patch]) -> dict[str, float]:
    """How many times its part's learning rate a tensor learns at, by name, where the method says so (LoRA+, for one).

    Raises TrainingError for a pace that is not above 0.
    """
    found = {
        f"{site.path}/{key}": float(patch.pace(key))
        for site, patch in made.items()
        if isinstance(patch, Paced)
        for key, _ in patch.named_parameters()
    }
    for name, pace in found.items():
        if not (math.isfinite(pace) and pace > 0):
            raise TrainingError("A tensor can not learn at such a pace.", given=f"{name}: {pace}", allowed="above 0")
    return found


def _named(sites: Sequence[Site], made: Mapping[Site, Patch]) -> dict[str, nn.Parameter]:
    return {f"{site.path}/{key}": p for site in sites for key, p in made[site].named_parameters()}
