"""Who takes part in ``bench/cases/fold.py``: a base copied, folded and proved, and folded by PEFT; one site alone.

A step gives the seconds of what is measured: what a step removes of the last one is not counted.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from bench.race import Step

SELECT: Final = "language.*.{q,k,v,o,gate,up,down}"
RANK: Final = 16


def prepare(base: Path, dtype: str, folder: Path) -> dict[str, str]:
    """The base in ``dtype`` and an adapter on it that moves its outputs; their folders, below ``folder``."""
    from safetensors.torch import load_file, save_file

    from tarsia.adapter import Adapter, open_base, probe, save
    from tarsia.core.attach import Part, attach, patches
    from tarsia.core.method import METHODS

    own = folder / f"base-{dtype}"
    shutil.copytree(base, own)
    number = getattr(torch, dtype)
    held = {key: value.to(number) for key, value in load_file(base / "model.safetensors").items()}
    save_file(held, own / "model.safetensors", {"format": "pt"})
    del held
    host = open_base(str(own), processor=False)
    part = Part("lora", SELECT, METHODS["lora"].configure({"rank": RANK, "alpha": 2 * RANK}))
    attach(host.model, host.sites, [part], name="bench")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for patch in patches(host.model, "bench").values():
            patch.B.normal_(std=0.02, generator=generator)  # type: ignore[operator]
    adapter = Adapter.of(host, "bench", [part], probe=probe(host, inputs(host.model)))
    save(adapter, folder / f"adapter-{dtype}")
    return {"base": str(own), "adapter": str(folder / f"adapter-{dtype}")}


def inputs(model: Any) -> dict[str, Tensor]:
    """Two rows with a picture between words, for a LLaVA. At the very start a language model expects no picture."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(100, 10000, (2, 16), generator=generator)
    size = config.vision_config.image_size
    places = (size // config.vision_config.patch_size) ** 2
    ids = torch.cat([words[:, :8], torch.full((2, places), config.image_token_index), words[:, 8:]], 1)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def folder(who: str, base: str, adapter: str, out: str) -> Step:
    """A folder written by ``who``, anew in each step."""
    act = _FOLDERS[who](Path(base), Path(adapter), Path(out))

    def step() -> float:
        shutil.rmtree(out, ignore_errors=True)
        gc.collect()
        began = time.perf_counter()
        act()
        return time.perf_counter() - began

    return step


def _copied(base: Path, adapter: Path, out: Path) -> Callable[[], Any]:
    return lambda: subprocess.run(["cp", "-rL", str(base), str(out)], check=True)


def _written(base: Path, adapter: Path, out: Path) -> Callable[[], Any]:
    """The files alone: neither the live adapter is run, nor the result."""
    from tarsia.adapter import load, open_outline, put
    from tarsia.adapter.host import Host
    from tarsia.core.attach import patches
    from tarsia.merge.fold import write_files
    from tarsia.merge.folding import Folding
    from tarsia.merge.units import Stored

    outline = open_outline(str(base), processor=False, weights=True)
    value = load(adapter)
    host: Any = Host(str(base), base, outline.model, None, outline.anatomy, outline.sites, _any(value.fingerprint))
    put(host, value, "bench")
    layer = patches(host.model, "bench")
    plain = open_outline(str(base), processor=False, weights=True)
    stored = Stored.of(plain.model, tuple(base.glob("*.safetensors")))

    def act() -> None:
        out.mkdir()
        write_files(plain, Folding(stored, (layer,)), out, lambda line: None)

    return act


def _any(value: Any) -> Any:
    return value


def _proved(base: Path, adapter: Path, out: Path) -> Callable[[], Any]:
    from tarsia.merge.fold import fold

    return lambda: fold(str(base), adapter, out)


def _peft(base: Path, adapter: Path, out: Path) -> Callable[[], Any]:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    def act() -> None:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
        merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        merged.save_pretrained(out)

    return act


_FOLDERS: Final[Mapping[str, Callable[[Path, Path, Path], Callable[[], Any]]]] = {
    "cp": _copied,
    "Tarsia, written": _written,
    "Tarsia, proved": _proved,
    "PEFT": _peft,
}

CACHE: Final = 320 * 2**20
"""More bytes than the last cache of the machines that this ran on."""
CALLS: Final = 12


def site(who: str, size: int, dtype: str) -> Step:
    """``CALLS`` folds of a weight [size, size], of many in turn; gives the seconds of one."""
    number = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) / size**0.5).to(number)
    a = torch.randn(RANK, size, generator=generator) / size**0.5
    b = torch.randn(size, RANK, generator=generator) / RANK**0.5
    every = [weight.clone() for _ in range(CACHE // weight.nbytes + 1)]
    act = _SITES[who](every, a, b)
    turn = iter(range(10**9))

    def step() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            for _ in range(CALLS):
                act(next(turn) % len(every))
        return (time.perf_counter() - began) / CALLS

    return step


def _site_copy(every: list[Tensor], a: Tensor, b: Tensor) -> Callable[[int], Any]:
    out = torch.empty_like(every[0])
    return lambda turn: out.copy_(every[turn])


def _site_in_place(every: list[Tensor], a: Tensor, b: Tensor) -> Callable[[int], Any]:
    from tarsia.methods.lora import LoRA

    patch = LoRA(a, b, 1e-3)
    return lambda turn: patch.fold_into(every[turn], every[turn])


def _site_fold(every: list[Tensor], a: Tensor, b: Tensor) -> Callable[[int], Any]:
    from tarsia.methods.lora import LoRA

    patch = LoRA(a, b, 1e-3)
    return lambda turn: patch.fold(every[turn], None)


def _site_peft(every: list[Tensor], a: Tensor, b: Tensor) -> Callable[[int], Any]:
    from peft import LoraConfig, inject_adapter_in_model

    layers: list[Any] = []
    for weight in every:
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.out_features, plain.in_features = weight.shape
        layers.append(plain)
    config = LoraConfig(r=RANK, lora_alpha=1e-3 * RANK, target_modules=r"\d+")
    held: Any = inject_adapter_in_model(config, nn.ModuleList(layers), "bench")
    for layer in held:
        layer.lora_A["bench"].weight.data, layer.lora_B["bench"].weight.data = a, b

    def act(turn: int) -> None:
        held[turn].merge()
        held[turn].merged_adapters.clear()

    return act


_SITES: Final[Mapping[str, Callable[[list[Tensor], Tensor, Tensor], Callable[[int], Any]]]] = {
    "copy": _site_copy,
    "Tarsia, in place": _site_in_place,
    "Tarsia": _site_fold,
    "PEFT": _site_peft,
}


def memory(who: str, base: str, adapter: str) -> Step:
    """Merged in memory, and taken out again; gives the seconds of both."""
    if who == "PEFT":
        from peft import PeftModel
        from transformers import AutoModelForImageTextToText

        bare = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
        model: Any = PeftModel.from_pretrained(bare, adapter)
        model.merge_adapter()

        def both() -> None:
            model.unmerge_adapter()
            model.merge_adapter()
    else:
        from tarsia.adapter import load, open_base, put
        from tarsia.core.attach import merge, unmerge

        dtype: Any = "bfloat16" if base.endswith("bfloat16") else "float32"
        host = open_base(base, processor=False, dtype=dtype)
        put(host, load(adapter), "bench")

        def both() -> None:
            merge(host.model)
            unmerge(host.model)

    def step() -> float:
        began = time.perf_counter()
        both()
        return time.perf_counter() - began

    return step


def size(path: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(os.path.getsize(one) for one in path.rglob("*") if one.is_file())
