"""Opening an adapter from disk: Tarsia's library, first and later, a plain folder, PEFT, and safetensors alone.

LoRA on every linear layer of a language model of 7B (Mistral's shapes: 32 layers, 224 sites, 448 tensors), bfloat16, of
ranks 8 and 16. All contestants read the same files, which are in the page cache, in one process, in turns, forwards and
backwards. What is measured ends when the tensors can be used; "and every number read" adds one look at each page, as
what is mapped is only read then. ``ms, processor`` is this process's time, which others' work hardly touches.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bench.run import Values
from tarsia.adapter import Adapter, Fingerprint, Patched, load, save
from tarsia.adapter.layout import Layout
from tarsia.core.attach import Part
from tarsia.library import Library, index, opening
from tarsia.library.opening import open_adapter
from tarsia.methods.lora import LoRAConfig

LAYERS, ROUNDS, RANKS = 32, 31, (8, 16)
SHAPES: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
"""Out and in of each linear layer."""

Open = Callable[[], Iterable[Tensor]]


def measure() -> Values:
    """Both sizes."""
    table: dict[str, dict[str, float | int | str]] = {}
    for rank in RANKS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "adapter")
            save(adapter(rank), folder)
            size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
            for name, row in _race(_openers(folder, Path(scratch, "library"))).items():
                table[f"{size:.0f} MiB: {name}"] = row
    return table


def adapter(rank: int) -> Adapter:
    """Random numbers at all the sites."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    constants = MappingProxyType({"scale": 2.0, "dropout": 0.05})
    patches = {
        f"model.language_model.layers.{layer}.{name}": Patched(
            "lora", constants, MappingProxyType({"A": drawn(rank, into), "B": drawn(out, rank)})
        )
        for layer in range(LAYERS)
        for name, (out, into) in SHAPES.items()
    }
    return Adapter(
        parts=(Part("lora", "language.*.{q,k,v,o,gate,up,down}", LoRAConfig(rank=rank, alpha=2.0 * rank)),),
        patches=MappingProxyType(patches),
        layout=Layout(tuple(patches), (), {}, ()),
        base="mistralai/Mistral-7B-v0.3",
        fingerprint=Fingerprint("files:" + "0" * 64, "1" * 64, "none", "2" * 64, "3" * 64),
        card=MappingProxyType({}),
    )


def _openers(folder: Path, root: Path) -> dict[str, Open]:
    """Every way to open what lies in ``folder``, which is also published in a library in ``root``."""
    from peft import PeftConfig
    from peft.utils.save_and_load import load_peft_weights
    from safetensors.torch import load_file

    library = Library.make(root)
    library.publish(folder, "a")
    time.sleep(2 * opening.SETTLED)

    def first() -> Iterable[Tensor]:
        with index.writing(library.places) as work:
            work.db.execute("DELETE FROM reads")
        began = time.perf_counter(), time.process_time()
        opened = open_adapter(library, "a")
        _FORGETTING[:] = began
        return _tensors(opened)

    def peft() -> Iterable[Tensor]:
        PeftConfig.from_pretrained(str(folder))
        weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
        return weights.values()

    return {
        "Tarsia, library": lambda: _tensors(open_adapter(library, "a")),
        "Tarsia, library, and every number read": lambda: _read(_tensors(open_adapter(library, "a"))),
        "Tarsia, library, first time: all hashed and checked": first,
        "Tarsia, load of a folder: all hashed and checked": lambda: _tensors(load(folder)),
        "PEFT, configuration and weights": peft,
        "PEFT, and every number read": lambda: _read(peft()),
        "safetensors load_file": lambda: load_file(folder / "adapter_model.safetensors").values(),
    }


_FORGETTING: list[float] = []
"""Where the clocks stood when a way to open began in earnest, for one that has to prepare it."""


def _tensors(opened: Adapter) -> list[Tensor]:
    return [value for patched in opened.patches.values() for value in patched.tensors.values()]


def _read(tensors: Iterable[Tensor]) -> list[Tensor]:
    held = list(tensors)
    for value in held:
        # one number of each page
        value.view(-1)[::2048].sum()
    return held


def _race(openers: Mapping[str, Open]) -> dict[str, dict[str, Any]]:
    for opener in openers.values():
        opener()
    wall: dict[str, list[float]] = {name: [] for name in openers}
    work: dict[str, list[float]] = {name: [] for name in openers}
    for number in range(ROUNDS):
        for name in list(openers) if number % 2 == 0 else list(openers)[::-1]:
            gc.collect()
            _FORGETTING.clear()
            began = [time.perf_counter(), time.process_time()]
            held = openers[name]()
            ended = time.perf_counter(), time.process_time()
            began = _FORGETTING or began
            wall[name].append(ended[0] - began[0])
            work[name].append(ended[1] - began[1])
            del held
    yardstick = wall["PEFT, configuration and weights"]
    return {
        name: {
            "ms": round(1000 * median(wall[name]), 2),
            "ms, least": round(1000 * min(wall[name]), 2),
            "ms, processor": round(1000 * median(work[name]), 2),
            "PEFT / this": round(median(b / a for a, b in zip(wall[name], yardstick, strict=True)), 2),
            "runs": ROUNDS,
        }
        for name in openers
    }
