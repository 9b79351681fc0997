"""The same tasks as full checkpoints and as adapters of one base: their bytes, and what it takes to go to the next."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import torch
from torch import Tensor

from tarsia.adapter import Adapter, Host, load, open_base, probe, save
from tarsia.adapter.swap import swap
from tarsia.adapter.value import put
from tarsia.core.attach import Part, activate, attach, detach, patches, routed
from tarsia.core.method import find
from tarsia.data import Batch, Encoder, Source, read
from tarsia.labs import sources
from tarsia.labs.tenants import BESIDE
from tarsia.library import Library
from tarsia.merge.fold import fold
from tarsia.serve.pages import Pages, waited

TEN: Final = 10
RANK: Final = 16
ROUNDS: Final = 7
PAGES: Final = 3
"""Adapters that a server goes to in turn: each has to be proved first, which takes longer than all else."""
SELECT: Final = "projector; language.*.{q,k,v,o,gate,up,down}"
_MOVED: Final = 0.02
"""Deviation of the numbers that stand for a training: bytes and times do not depend on what was learnt."""

Times = Mapping[str, float]
"""Median seconds by way of switching."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One model's figures: bytes on disk and in memory, seconds of a switch, and how alike both forms answer.

    ``made`` checkpoints were written, of ``TEN`` adapters. ``agreement``: the least share of positions at which a
    checkpoint and its adapter have the same likeliest token; ``apart``: the largest difference of a logit, as a share
    of the largest logit.
    """

    made: int
    checkpoint: int
    adapter: int
    weights: int
    patches: int
    trained: int
    times: Times
    agreement: float
    apart: float
    base: str


def measure(model: str, made: int, work: Path, show: Callable[[str], None]) -> Measured:
    """Write ten adapters and ``made`` checkpoints, and go from one to the next in every way."""
    shutil.rmtree(work, ignore_errors=True)
    host = open_base(model, dtype="float32", device="cpu")
    batch = rows(host, work)
    show("ten adapters")
    folders = adapters(host, batch, work)
    checkpoints = []
    for i in range(made):
        show(f"checkpoint {i + 1} of {made}")
        checkpoints.append(work / f"checkpoint-{i}")
        fold(model, folders[i], checkpoints[i])
    values = [load(folder) for folder in folders]
    for i, value in enumerate(values):
        activate(host.model)
        put(host, value, f"task-{i}")
    show("both forms' answers")
    agreement, apart = alike(host, batch, checkpoints)
    times = {}
    for name, step in _switches(host, folders, checkpoints, batch).items():
        show(name)
        times[name] = timed(step)
    show("pages")
    times |= paged(model, folders, work / "library")
    patched = list(patches(host.model, "task-0").values())
    own = sum(p.nbytes for patch in patched for p in patch.parameters())
    held = sum(p.nbytes for p in host.model.parameters()) - own * len(values)
    return Measured(
        made,
        size(checkpoints[0]),
        size(folders[0]),
        held,
        own,
        sum(p.numel() for patch in patched for p in patch.parameters()),
        times,
        agreement,
        apart,
        host.fingerprint.weights,
    )


def rows(host: Host, work: Path) -> Batch:
    """Four rows with a picture each."""
    path = work / "rows.parquet"
    sources.write(path, sources.scenes(4, "held-out"))
    return Encoder(host.processor, variables=host.variables).batch(list(read(Source(path=str(path), name="scenes"))))


def adapters(host: Host, batch: Batch, work: Path) -> list[Path]:
    """Folders of ten adapters that were drawn, not trained; the host is left bare."""
    parts = [Part("lora", SELECT, find("lora").configure({"rank": RANK, "alpha": 2.0 * RANK}))]
    folders = []
    for i in range(TEN):
        attach(host.model, host.sites, parts, name="drawn", seed=i)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for patch in patches(host.model, "drawn").values():
                held = dict(patch.named_parameters())["B"]
                held.copy_(_MOVED * torch.randn(held.shape, generator=generator))
        value = Adapter.of(host, "drawn", parts, probe=probe(host, batch.inputs))
        detach(host.model, "drawn")
        folders.append(work / f"adapter-{i}")
        save(value, folders[i])
    return folders


def alike(host: Host, batch: Batch, checkpoints: Sequence[Path]) -> tuple[float, float]:
    """Least agreement and largest relative difference between each checkpoint and the adapter that it was made of."""
    agreements, differences = [], []
    for i, folder in enumerate(checkpoints):
        whole = logits(open_base(str(folder), dtype="float32", device="cpu"), batch)
        activate(host.model, f"task-{i}")
        live = logits(host, batch)
        agreements.append(float((whole.argmax(-1) == live.argmax(-1)).double().mean()))
        differences.append(float((whole - live).abs().max() / live.abs().max()))
    return min(agreements), max(differences)


@torch.no_grad()
def logits(host: Host, batch: Batch) -> Tensor:
    """Of every position, [rows, tokens, vocabulary]."""
    found: Tensor = host.model(**batch.inputs, use_cache=False).logits
    return found


def _switches(
    host: Host, folders: Sequence[Path], checkpoints: Sequence[Path], batch: Batch
) -> dict[str, Callable[[int], object]]:
    """What goes to task ``i``, by name. Files come from the page cache."""
    other = [open_base(str(folder), dtype="float32", device="cpu").model for folder in checkpoints[:2]]
    mine = dict(open_base(str(checkpoints[0]), dtype="float32", device="cpu").model.named_parameters())
    count = len(checkpoints)
    segments = host.anatomy.segments(batch.inputs)

    @torch.no_grad()
    def copy(i: int) -> None:
        for name, parameter in other[i % len(other)].named_parameters():
            mine[name].copy_(parameter)

    def route(i: int) -> None:
        with routed(host.model, [f"task-{(i + k) % TEN}" for k in range(4)], segments):
            pass

    return {
        "checkpoint: opened from its files": lambda i: open_base(str(checkpoints[i % count]), dtype="float32"),
        "checkpoint: its weights copied from memory": copy,
        "adapter: read from its files": lambda i: swap(host, load(folders[i % TEN]), "task-0"),
        "adapter: held, made to act": lambda i: activate(host.model, f"task-{i % TEN}"),
        "adapter: held, four in one batch": route,
    }


def paged(model: str, folders: Sequence[Path], at: Path) -> Times:
    """A server's way: pages of a library, each proved before; with room for all of them, and for one alone."""
    library = Library.make(at)
    names = [f"task-{i}" for i in range(min(PAGES, len(folders)))]
    for name, folder in zip(names, folders, strict=False):
        library.publish(folder, name)
    size = 4 * library.version(names[0]).numbers + BESIDE
    found = {}
    for way, room, reads in (("page: read from the library", size, ROUNDS + 1), ("page: held", len(names) * size, 0)):
        pages = Pages(open_base(model, dtype="float32", device="cpu"), library, budget=room)

        def step(i: int, pages: Pages = pages) -> None:
            ticket = pages.want(names[i % len(names)])
            waited(pages, ticket)
            ticket.release()

        for i in range(len(names)):
            step(i)
        before = pages.loads
        found[way] = timed(step)
        if pages.loads - before != reads:
            raise AssertionError(f"{way}: {pages.loads - before} pages were read, and not {reads}")
        pages.close()
    return found


def timed(step: Callable[[int], object]) -> float:
    """Median seconds of a step over ``ROUNDS``, after one that warms up."""
    step(0)
    taken = []
    for i in range(1, ROUNDS + 1):
        began = time.perf_counter()
        step(i)
        taken.append(time.perf_counter() - began)
    return median(taken)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
