"""An adapter that was here before, again: a page against PEFT's load_adapter, hotswap_adapter and set_adapter.

SmolLM2-135M in a LLaVA (``bench.smol``), float32, LoRA of rank 36 at all 210 linear layers of the language model (42
MiB); files in the page cache. *load*: from nothing in memory to a page that rows can use, proved once before: `want`
of one of three adapters where there is room for one; PEFT's `load_adapter` (a new name each time, deleted untimed) and
`hotswap_adapter` over one of the same make. *switch*: `want` of an adapter that is here, and a line of its row laid out
for all sites; PEFT's `set_adapter` among three. Contestants take turns, A B B A ...; milliseconds, medians; the last
column is the median of the ratios within a round. ``first``: with every hash, check and the proof.

*Many*: 2,000 adapters in a library (rank 4 at q and v of the language model), room for 20, loaded in an order drawn by
Zipf's law. Milliseconds of a load that was a miss, and how much resident memory grew from the 200th to the last.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import torch

from bench import smol, swapping
from bench.contestants import batch
from bench.run import Values
from tarsia.adapter import Adapter, Host, Patched, open_base, save
from tarsia.adapter.proof import probe
from tarsia.core.attach import Part, attach, detach, patches
from tarsia.core.method import find
from tarsia.library import Library, opening
from tarsia.serve.pages import Pages, waited

RANK, ROUNDS, ADAPTERS = 36, 31, 3
MANY, ROOM, ASKED, SMALL = 2000, 20, 3000, 4


def measure() -> Values:
    """All of it."""
    with tempfile.TemporaryDirectory(prefix="tarsia-page-") as scratch:
        model = smol.folder("small")
        host = open_base(str(model), dtype="float32", device="cpu")
        inputs = batch(model, rows=1, length=64)[0]
        folders = [_made(host, Path(scratch, f"task-{i}"), i, inputs) for i in range(ADAPTERS)]
        library = Library.make(Path(scratch, "library"))
        for i, folder in enumerate(folders):
            library.publish(folder, swapping.name(i))
        time.sleep(2 * opening.SETTLED)
        size = (folders[0] / "adapter_model.safetensors").stat().st_size
        values: dict[str, dict[str, float | int | str]] = {"first": {"Tarsia, ms": _ms(_first(host, library, size))}}
        many = _many(host, Path(scratch, "many"))
        ours, theirs = _ours(host, library, size), _peft(model, folders)
        for name, other in (("load", "load_adapter"), ("load", "hotswap_adapter"), ("switch", "set_adapter")):
            values[f"{name}: want / {other}"] = _raced(ours[name], theirs[other], theirs[f"before {other}"])
        values["many"] = many
        values["measured"] = {"MiB each": round(size / 2**20, 1), "rounds": ROUNDS}
    return values


def _made(host: Host, folder: Path, seed: int, inputs: Any) -> Path:
    """A folder with an adapter drawn at random and the outputs that it has."""
    parts = [Part("lora", swapping.SELECT, find("lora").configure({"rank": RANK, "alpha": 2.0 * RANK}))]
    attach(host.model, host.sites, parts, name="drawn", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for patch in patches(host.model, "drawn").values():
            held: Any = patch
            held.B.copy_(0.02 * torch.randn(held.B.shape, generator=generator))
    save(Adapter.of(host, "drawn", parts, probe=probe(host, inputs)), folder)
    detach(host.model, "drawn")
    return folder


def _first(host: Host, library: Library, size: int) -> float:
    pages = Pages(host, library, budget=2 * size)
    began = time.perf_counter()
    waited(pages, pages.want(swapping.name(0)))
    seconds = time.perf_counter() - began
    pages.close()
    return seconds


def _ours(host: Host, library: Library, size: int) -> dict[str, Callable[[int], object]]:
    small = Pages(host, library, budget=size * 3 // 2)
    for i in range(ADAPTERS):
        ticket = small.want(swapping.name(i))
        waited(small, ticket)
        ticket.release()

    def load(i: int) -> None:
        ticket = small.want(swapping.name(i))
        waited(small, ticket)
        ticket.release()

    def switch(i: int) -> None:
        ticket = small.want(swapping.name(ADAPTERS - 1))
        if ticket.page is None:
            waited(small, ticket)
        with small.board.lying([ticket.page], [1]):
            _ = small.board.here.table.entries  # type: ignore[union-attr]
        ticket.release()

    return {"load": load, "switch": switch}


def _peft(model: Path, folders: list[Path]) -> dict[str, Callable[[int], object]]:
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter
    from transformers import LlavaForConditionalGeneration

    base = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    held: Any = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=swapping.name(0))
    for i, folder in enumerate(folders[1:], 1):
        held.load_adapter(str(folder), adapter_name=swapping.name(i))

    def gone(i: int) -> None:
        if "beside" in held.peft_config:
            held.delete_adapter("beside")

    return {
        "before load_adapter": gone,
        "load_adapter": lambda i: held.load_adapter(str(folders[i]), adapter_name="beside"),
        "before hotswap_adapter": gone,
        "hotswap_adapter": lambda i: hotswap_adapter(held, str(folders[i]), adapter_name=swapping.name(0)),
        "before set_adapter": gone,
        "set_adapter": lambda i: held.set_adapter(swapping.name(i)),
    }


def _raced(
    mine: Callable[[int], object], other: Callable[[int], object], before: Callable[[int], object]
) -> dict[str, float | int | str]:
    seconds: dict[str, list[float]] = {"Tarsia": [], "PEFT": []}
    for i in range(ROUNDS + 1):
        both = [("Tarsia", mine), ("PEFT", other)]
        for who, way in both if i % 2 else both[::-1]:
            before(i)
            began = time.perf_counter()
            way(i % ADAPTERS)
            seconds[who].append(time.perf_counter() - began)
    first, second = seconds["Tarsia"][1:], seconds["PEFT"][1:]  # the first warms up
    return {
        "Tarsia, ms": _ms(median(first)),
        "Tarsia, ms, least": _ms(min(first)),
        "PEFT, ms": _ms(median(second)),
        "PEFT, ms, least": _ms(min(second)),
        "PEFT / Tarsia": round(median(b / a for a, b in zip(first, second, strict=True)), 1),
    }


def _many(host: Host, root: Path) -> dict[str, float | int | str]:
    """Two thousand adapters and room for twenty."""
    root.mkdir()
    library = Library.make(root / "library")
    parts = (Part("lora", "language.*.{q,v}", find("lora").configure({"rank": SMALL, "alpha": 2.0 * SMALL})),)
    attach(host.model, host.sites, parts, name="drawn")
    value = Adapter.of(host, "drawn", parts)
    detach(host.model, "drawn")
    for i in range(MANY):
        generator = torch.Generator().manual_seed(i)
        moved = {
            path: Patched(
                patched.method,
                patched.constants,
                MappingProxyType(
                    {k: 0.05 * torch.randn(t.shape, generator=generator) for k, t in patched.tensors.items()}
                ),
            )
            for path, patched in value.patches.items()
        }
        folder = root / f"saved-{i % 2}"
        save(Adapter(value.parts, moved, value.layout, value.base, value.fingerprint, {"n": i}), folder)
        library.publish(folder, f"n{i}")
    time.sleep(2 * opening.SETTLED)
    size = (folder / "adapter_model.safetensors").stat().st_size
    pages = Pages(host, library, budget=int(ROOM * 1.5 * size), unproved="allow")
    weights = 1 / torch.arange(1, MANY + 1, dtype=torch.float64)
    order = torch.multinomial(weights, ASKED, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    missed, early = [], 0
    for count, i in enumerate(order):
        loads = pages.loads
        began = time.perf_counter()
        ticket = pages.want(f"n{i}")
        waited(pages, ticket)
        seconds = time.perf_counter() - began
        ticket.release()
        if pages.loads > loads:
            missed.append(seconds)
        if count == 200:
            early = _resident()
    grown = _resident() - early
    stats = pages.stats()
    pages.close()
    return {
        "adapters": MANY,
        "room for": ROOM,
        "asked": ASKED,
        "loads": len(missed),
        "KiB each": round(size / 1024),
        "load, ms": _ms(median(missed)),
        "evictions": stats["adapter_evictions"],
        "resident grew, MiB": round(grown / 2**20, 1),
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _ms(seconds: float) -> float:
    return float(f"{1000 * seconds:.3g}")
