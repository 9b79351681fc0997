"""Training as a generator of events: killed at any moment and run again, its curve is the same curve."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tarsia import __version__
from tarsia.adapter import Adapter, Host, Probe, probe, save
from tarsia.adapter.proof import Unmoved
from tarsia.core.attach import detach, slots
from tarsia.core.errors import ConfigError
from tarsia.data import Batch, Sample
from tarsia.train.checkpoint import locked, write
from tarsia.train.events import Evaluated, Event, Finished, Notice, Saved, Started, Step, read_log
from tarsia.train.exact import deterministic, threads
from tarsia.train.fast import FOLLOWED, fast
from tarsia.train.features import features
from tarsia.train.heap import apart, give_back
from tarsia.train.looked import looked
from tarsia.train.loss import followed
from tarsia.train.memory import Phase, phase
from tarsia.train.optimiser import peaks, set_rates
from tarsia.train.paged import PagedAdamW
from tarsia.train.pressure import relieved
from tarsia.train.recipe import Recipe
from tarsia.train.run import NAME, Run, claim, find_checkpoint, machine, prepare
from tarsia.train.step import Losses, backward, loss_shares
from tarsia.train.store import Store
from tarsia.train.taken import Meter
from tarsia.train.watch import check_finite

Evaluator: TypeAlias = Callable[[Host, int], Mapping[str, Any]]
"""Results, as JSON values, of the model as it is after this many steps."""

PROBED = 4
"""The most rows of the probe that is saved with the adapter."""


def fit(
    recipe: Recipe,
    evaluator: Evaluator | None = None,
    *,
    host: Host | None = None,
    card: Mapping[str, Any] | None = None,
) -> Iterator[Event]:
    """Train an adapter; each event is also a line of ``out/events.jsonl``.

    Goes on by itself from the newest whole checkpoint in ``out`` of the same recipe. ``evaluator`` is called
    every ``eval_every`` steps and at the end. ``host`` is a base that is open already (its model is given back
    as it was); without one ``recipe.model`` is opened. ``card`` is added to the adapter's own. Raises a
    TarsiaError, and leaves the last checkpoint as it is, where the run can not start or go on.
    """
    out = Path(recipe.out)
    with locked(out):
        meter = Meter()
        checkpoint, notices = find_checkpoint(recipe, out)
        wanted = recipe.threads if checkpoint is None else checkpoint.values["threads"]
        with threads(wanted) as count, ExitStack() as stack:
            run = prepare(recipe, host, count)
            run.meter = meter
            run.fast = stack.enter_context(training(run))
            if recipe.features is not None:
                store = Store(Path(recipe.features.path), recipe.features.bytes)
                run.features = stack.enter_context(features(run.host, store))
            claim(recipe, out)
            if checkpoint is None:
                run.log.cut(0)
            else:
                run.restore(checkpoint)
                notices += _moved(run, checkpoint.values["machine"])
            notices += _foreseen(run)
            for event in _events(run, notices, evaluator, card or {}):
                run.log.append(event)
                yield event


@contextmanager
def training(run: Run) -> Iterator[tuple[str, ...]]:
    """The model in training mode, as the recipe wants it; afterwards without patches and as it was.

    Gives what is computed in a cheaper way (``train.fast``).
    """
    model: Any = run.model
    try:
        model.train()
        if run.recipe.checkpointing:
            _recompute(model, True)
        paged = run.optimiser.opened() if isinstance(run.optimiser, PagedAdamW) else nullcontext()
        with paged, fast(model, run.optimiser) as lines:
            yield lines
    finally:
        if run.recipe.checkpointing:
            _recompute(model, False)
        detach(model, NAME)
        model.eval()


def _recompute(model: Any, wanted: bool) -> None:
    """Switch activation checkpointing; the kind that needs no input with a gradient, for embeddings are frozen."""
    # what newer versions of transformers call activation checkpointing, older ones call gradient checkpointing
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        options = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        try:
            getattr(model, f"{name}_checkpointing_enable")(**options)
        except ValueError as error:  # the model's class does not support it
            raise ConfigError(f"Activations can not be recomputed: {error}", do="leave checkpointing out") from None
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def _moved(run: Run, before: Mapping[str, str]) -> tuple[str, ...]:
    now = machine(run)
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    return (f"The run goes on elsewhere, so its last bits may differ: {', '.join(changed)}.",) if changed else ()


def _foreseen(run: Run) -> tuple[str, ...]:
    """What the rows will not teach, as far as it can be told before the first step."""
    rows = run.schedule.steps * run.recipe.batch * run.recipe.accumulate
    unseen = [
        f"No row of {name} will be drawn: its share is {run.mixture.weights[share.source]:.2g} of {rows} rows."
        for name, share in zip(run.digests, run.mixture.shares(rows), strict=True)
        if run.mixture.weights[share.source] and not share.rows
    ]
    if run.step == run.schedule.steps:
        unseen.append(f"All {run.step} steps were done already: only what comes after them is done again.")
    if not run.encoder.closes:
        unseen.append("When to stop will not be learnt: the chat template writes no control token after an answer.")
    return (*unseen, *_in_vain(run))


def _in_vain(run: Run) -> tuple[str, ...]:
    """Whether the first row with a picture that is shrunk is as large for the model as if it were not."""
    limit = run.recipe.resolution
    if limit is None:
        return ()
    rows = (run.mixture[n] for n in range(run.recipe.batch * run.recipe.accumulate))
    row = next((row for row in rows if any(max(p.load().size) > limit for p in row.pictures)), None)
    if row is None or _size(run, row, limit) < _size(run, row, None):
        return ()
    return (
        f"resolution {limit} saves nothing for row {row.row} of {row.source}: this base's processor makes as many "
        "pixels and tokens of the smaller pictures.",
    )


def _size(run: Run, row: Sample, resolution: int | None) -> int:
    """Numbers that the model is given for the whole row."""
    encoder = copy.copy(run.encoder)
    encoder.max_length, encoder.resolution = None, resolution
    return sum(value.numel() for value in encoder.batch([row]).inputs.values())


def _events(
    run: Run, notices: tuple[str, ...], evaluator: Evaluator | None, card: Mapping[str, Any]
) -> Iterator[Event]:
    recipe, steps, out = run.recipe, run.schedule.steps, Path(run.recipe.out)
    trained = sum(line.trained for line in run.coverage)
    share = sum(line.share for line in run.coverage)
    resolved = {**recipe.resolved, "hash": recipe.hash}
    held = run.host.quantisation
    four_bits = None if held is None else held.report(run.host.sites)
    rates = peaks(run.optimiser)
    yield Started(run.coverage, trained, share, steps, run.step, resolved, run.fast, four_bits, rates)
    yield from map(Notice, notices)
    # a checkpoint is written before its step is evaluated: what fails there costs no step, and is done again here
    yield from _evaluation(run, evaluator)
    begun = run.step
    while run.step < steps:
        yield one_step(run)
        if run.step == begun + 1 and followed(run.model):
            yield Notice(FOLLOWED)
        yield from _news(run)
        last = run.step == steps
        if last:
            run.watch.judge(run.step)
        if last or run.step % recipe.save_every == 0:
            yield Saved(str(write(out / "checkpoints", run.checkpoint())), run.step)
        yield from _evaluation(run, evaluator)
    if run.features is not None:
        yield Notice(run.features.summary())
    proof = final_probe(run)
    yield from _news(run)
    if run.meter is not None:
        memory = run.meter.event(run)
        yield memory
        card = {"memory": asdict(memory), **card}
    look = looked(run)
    if "none" in look and recipe.routing and run.watch.pictures:
        yield Notice(f"The adapter can not be chosen by a picture (model: auto): {look['none']}.")
    adapter = Adapter.of(run.host, NAME, run.parts, {**_card(run), "routing": look, **card}, probe=proof)
    save(adapter, out / "adapter")
    yield Finished(adapter, str(out / "adapter"), run.seconds)


def _news(run: Run) -> Iterator[Notice]:
    """What the cache of features has to say: what it keeps, once, and all that went wrong with its folder.

    And what the optimiser has: that its states had to leave the memory.
    """
    if run.features is not None:
        yield from map(Notice, run.features.news())
    if isinstance(run.optimiser, PagedAdamW):
        yield from map(Notice, run.optimiser.news())


def one_step(run: Run) -> Step:
    """One optimiser step: all its micro-batches, the checks, the update. ``run.step`` is the next one's afterwards.

    Raises TrainingError where a gradient is no number, or memory does not suffice.
    """
    began = time.perf_counter()
    number = run.step + 1
    batches = relieved(run, partial(_given, run))
    rates = set_rates(run.optimiser, run.schedule.share(run.step))
    parameters = [p for patch in run.patches.values() for p in patch.parameters()]
    watching = nullcontext() if run.meter is None else run.meter.over(run, batches)
    with watching, deterministic(run.device):
        losses = relieved(run, partial(_learn, run, batches))
        phase(Phase.UPDATE)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        size = check_finite(norm, run.patches, number, batches)
        run.watch.observe(number, batches)
        if run.recipe.clip is not None:
            clip_grads_with_norm_(parameters, run.recipe.clip, norm)
        run.optimiser.step()
        run.optimiser.zero_grad(set_to_none=True)
    run.step = number
    seconds = time.perf_counter() - began
    run.seconds += seconds
    tokens = sum(losses.tokens.values())
    return Step(
        step=number,
        loss=losses.loss,
        lr=rates,
        grad_norm=size,
        tokens=tokens,
        rows=losses.rows,
        losses=losses.means,
        tokens_by_source=losses.tokens,
        contributions=losses.contributions,
        loss_shares=loss_shares(losses.contributions),
        tokens_per_second=tokens / seconds,
    )


def _given(run: Run) -> tuple[Batch, ...]:
    """The next step's micro-batches, proved where rows are packed."""
    batches = run.batches()
    run.prove(batches)
    return batches


def _learn(run: Run, batches: Sequence[Batch]) -> Losses:
    """The gradients of the next step. Random numbers move on only where all of it went well."""
    with run.random():
        return backward(run.model, batches, run.step + 1, run.weights)


def _evaluation(run: Run, evaluator: Evaluator | None) -> Iterator[Evaluated]:
    """What the evaluator finds, where this step is one to evaluate after.

    In eval mode; what acts and the mode are as before afterwards, whatever the evaluator did.
    """
    every = run.recipe.eval_every or run.schedule.steps
    if evaluator is None or not run.step or (run.step % every and run.step != run.schedule.steps):
        return
    before = [(slot, slot.active) for slot in slots(run.model)]
    run.model.eval()
    try:
        with torch.no_grad():
            results = evaluator(run.host, run.step)
    finally:
        for slot, active in before:
            slot.active = active
        run.model.train()
    yield Evaluated(run.step, results)


def final_probe(run: Run) -> Probe:
    """A probe on the stream's first rows, those with pictures first: as many as a micro-batch, so as steps did.

    Where those show no effect of the adapter, on ``PROBED`` rows.
    """
    numbers = sorted(range(64), key=lambda n: not run.mixture[n].pictures)[:PROBED]
    run.model.eval()
    # what the steps have freed lies in pieces that a probe's larger blocks do not fit into
    give_back(run.device)
    # as whoever loads the adapter computes it
    with apart(), nullcontext() if run.features is None else run.features.suspended():
        if run.recipe.batch < PROBED:
            with suppress(Unmoved):
                return _probed(run, numbers[: run.recipe.batch])
        return _probed(run, numbers)


def _probed(run: Run, numbers: Sequence[int]) -> Probe:
    return relieved(run, lambda: probe(run.host, run.encode(numbers).inputs), "The adapter's probe", numbers)


def _card(run: Run) -> dict[str, Any]:
    """What is known of the run, from the log that holds the whole curve."""
    curve = [event for event in read_log(run.log.path) if event["event"] == "step"]
    last = curve[-max(1, min(20, len(curve) // 10)) :]
    held = run.host.quantisation
    return {
        "recipe": {**run.recipe.resolved, "hash": run.recipe.hash},
        "mix": run.recipe.data.mix,
        "data": _data(run, curve, last),
        "steps": run.step,
        "loss": {"first": curve[0]["loss"], "final": _mean([s["loss"] for s in last]), "over_last_steps": len(last)},
        "coverage": [asdict(line) for line in run.coverage],
        "threads": run.threads,
        "machine": machine(run),
        **({} if run.features is None else {"features": run.features.report()}),
        **({} if held is None else {"four_bits": held.report(run.host.sites)}),
        "tarsia": __version__,
        "seconds": round(run.seconds, 2),
    }


def _data(run: Run, curve: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each source as it was trained on.

    ``share_asked`` is its weight lambda, of the rows in the sampled mode and of the loss in the weighted mode;
    ``share_got`` is its share of the rows, ``token_share`` of the labelled tokens, ``loss_share`` of the loss
    over the whole run, ``final_loss`` its mean over the last steps.
    """
    rows = run.step * run.recipe.batch * run.recipe.accumulate
    tokens = {source: sum(s["tokens_by_source"].get(source, 0) for s in curve) for source in run.digests}
    losses = {source: sum(s["contributions"].get(source, 0.0) for s in curve) for source in run.digests}
    shares = loss_shares(losses)
    return {
        name: {
            "sha256": run.digests[name],
            "rows": share.rows,
            "share_asked": run.mixture.weights[share.source],
            "share_got": share.got,
            "epochs": share.epochs,
            "tokens": tokens[name],
            "token_share": tokens[name] / sum(tokens.values()),
            "loss_share": shares[name],
            "final_loss": _mean([s["losses"][name] for s in last if name in s["losses"]]),
        }
        for name, share in zip(run.digests, run.mixture.shares(rows), strict=True)
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
