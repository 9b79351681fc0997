"""The plan's peak on a GPU against torch's own count, over whole training runs and one step of a 70B model.

30 configurations of ``bench.grid`` (twelve families, all methods, 4 and 16 bits), each trained for three steps on the
GPU: the most that torch's allocator had handed out and the most that it had taken from the device, beside what is
planned of both. The workspaces of cuBLAS are given back between runs. Then QLoRA on LLaVA with a language model of
Llama-2-70B's sizes (rank 16 on all of its layers, NF4 nested, checkpointing, one picture, 1,024 tokens), whose random
weights are made on the device: two steps. An error is what the plan is above the measured.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from bench.grid.configurations import DEVELOPMENT, HELD_OUT, configuration
from bench.grid.judged import spread
from bench.grid.large import base, recipe
from bench.grid.runner import home
from bench.grid.worlds import speak
from bench.run import Values

SEEDS: Final = (*DEVELOPMENT[:20], *HELD_OUT[:10])
SECONDS: Final = 300.0
"""What the configurations may take in all: those that come later are left out, and said."""
BAR: Final = 1.0
"""Percent by which a plan may be under what was measured."""

Row = dict[str, float | int | str]


def measure() -> Values:
    """All of it. Ends the program where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("plan_cuda: no GPU is here, so nothing is measured")
    speak()
    name = torch.cuda.get_device_name()
    table: dict[str, Row] = {}
    found = list(_runs())
    for part in ("allocated", "reserved"):
        errors = [100 * (line["planned"][part] / line["measured"][part] - 1) for line in found if "error" not in line]
        table[f"bar: {part}"] = {"card": name, **spread(errors, BAR)}
    table |= {f"run: seed {line['seed']}": _told(line) for line in found}
    missing = len(SEEDS) - len(found)
    table["left out: no time"] = {"configurations": missing}
    with tempfile.TemporaryDirectory() as scratch:
        table["70B: a step"] = large(Path(scratch), "cuda")
    return table


def _runs() -> Iterator[Mapping[str, Any]]:
    began = time.monotonic()
    for seed in SEEDS:
        if time.monotonic() - began > SECONDS:
            return
        try:
            line = run(seed, "cuda")
        except Exception as error:  # noqa: BLE001 (whatever a configuration comes to is its result)
            line = {"seed": seed, "error": f"{type(error).__name__}: {error}"[:300]}
        print(seed, line, file=sys.stderr, flush=True)
        yield line


def run(seed: int, place: str) -> Mapping[str, Any]:
    """Plan and train a seed's configuration on ``place``. Returns what was planned and what torch's allocator says."""
    from tarsia.plan import plan
    from tarsia.train import Recipe, fit
    from tarsia.train.events import Memory

    folder = home() / f"cuda-{seed:05d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        chosen = Recipe.load(configuration(seed).write(folder), [f"device={place}"])
        planned = plan(chosen)
        _afresh()
        (memory,) = (event for event in fit(chosen) if isinstance(event, Memory))
    finally:
        shutil.rmtree(folder)
    count = planned.device
    return {
        "seed": seed,
        "planned": {"allocated": count.allocated, "reserved": count.reserved},
        "measured": {"allocated": memory.allocated, "reserved": memory.reserved},
    }


def _afresh() -> None:
    """As in a new process: nothing cached, no workspace, no peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _told(line: Mapping[str, Any]) -> Row:
    if "error" in line:
        return {"error": line["error"]}
    row: Row = {}
    for part in ("allocated", "reserved"):
        planned, measured = line["planned"][part], line["measured"][part]
        row |= {f"{part} MB": round(measured / 1e6, 1), f"{part} error %": round(100 * (planned / measured - 1), 2)}
    return row


def large(folder: Path, place: str, **sizes: Any) -> Row:
    """Two steps of QLoRA on random weights; ``sizes`` are those of ``bench.grid.large.base`` where they are others."""
    from tarsia.plan import plan
    from tarsia.train import Recipe

    base(folder, **sizes)
    chosen = Recipe.load(recipe(folder, checkpointing=True), [f"device={place}"])
    began = time.process_time()
    planned = plan(chosen)
    seconds = time.process_time() - began
    _afresh()
    peaks = _trained(chosen, torch.device(place))
    row: Row = {"planned in s": round(seconds, 2), "planned GB": round(planned.device.allocated / 1e9, 2)}
    for name, measured in peaks.items():
        expected: int = getattr(planned.device, name)
        row |= {f"{name} GB": round(measured / 1e9, 3), f"{name} error %": round(100 * (expected / measured - 1), 2)}
    return row


def _trained(chosen: Any, place: torch.device) -> dict[str, int]:
    from tarsia.train.loop import one_step, training
    from tarsia.train.run import prepare

    run = prepare(chosen, random_host(chosen, place), 1)
    with training(run):
        for _ in range(2):
            one_step(run)
    if place.type != "cuda":
        return {}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def random_host(chosen: Any, place: torch.device) -> Any:
    """The base of a recipe with random weights, made on ``place`` in the form in which they stay."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    from tarsia.adapter import Host
    from tarsia.adapter.four_bits import Quantisation, choose
    from tarsia.plan.rehearse import _NOBODY, Outline
    from tarsia.quant.rounding import Loss

    outline, form = Outline.of(chosen.model), chosen.four_bits.form
    with init_empty_weights():
        model: Any = AutoModelForImageTextToText.from_config(outline.anatomy.config, dtype=torch.bfloat16)
    sites = tuple(outline.anatomy.sites(model))
    found = choose(form, model, sites)
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        packed = name in found.names
        made = _packed(parameter, form.scheme, place) if packed else _plain(parameter, place)
        model.get_submodule(owner)._parameters[key] = nn.Parameter(made, requires_grad=False)
        if packed:
            found.losses[name] = Loss(parameter.numel(), 0, 0.0, 0.0)
    return Host(
        name=chosen.model,
        path=None,
        model=model.to(place).eval(),
        processor=outline.processor,
        anatomy=outline.anatomy,
        sites=tuple(outline.anatomy.sites(model)),
        fingerprint=_NOBODY,
        quantisation=Quantisation(found.asked, found.form, found.sites, found.kept, found.losses),
    )


def _plain(parameter: torch.Tensor, place: torch.device) -> torch.Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=place).normal_(0, 0.02)


def _packed(parameter: torch.Tensor, scheme: Any, place: torch.device) -> Any:
    """Random codes, and scales that make weights of about 0.02."""
    from tarsia.quant.codec import NESTED_BLOCK, Quantised
    from tarsia.quant.tensor import Weight4

    count = parameter.numel()
    blocks = -(-count // scheme.block)
    codes = torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8, device=place)
    if not scheme.nested:
        scales = torch.full((blocks,), 0.02, device=place)
        return Weight4(Quantised(codes, scales, None, None, scheme, tuple(parameter.shape), parameter.dtype))
    scales = torch.zeros(blocks, dtype=torch.uint8, device=place)
    nested = torch.full((-(-blocks // NESTED_BLOCK),), 1e-3, device=place)
    offset = torch.full((), 0.02, device=place)
    return Weight4(Quantised(codes, scales, nested, offset, scheme, tuple(parameter.shape), parameter.dtype))
