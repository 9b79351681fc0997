"""Opening a 16-bit checkpoint: peak memory over the final model, straight into 4 bits, by bitsandbytes, and as it is.

SmolLM2-135M in a LLaVA with a vision tower of the same size (``bench.smol``), written in bfloat16, computed in
bfloat16, so that nothing but the rounding changes a tensor's size. Each in a process of its own, which has opened a
tiny model before, so that what is imported is there. ``over MiB`` is the highest resident memory (VmHWM) less what was
resident before and less the model's own tensors: below zero where tensors that stay as the file holds them have not
been read yet. The bar is ``tensor MiB``, the checkpoint's largest, and a tenth of the model.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.race import MIB, ROOT
from bench.run import Values
from bench.smol import folder

ROUNDS = 3
WAYS = ("Tarsia, NF4", "Transformers + bitsandbytes, NF4", "Transformers, bfloat16")


def measure() -> Values:
    """Every way, in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, "base")
        largest = _sixteen_bits(folder("large"), place)
        seen: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way in WAYS:
                seen[way].append(_apart(way, place))
    values: dict[str, dict[str, float | int | str]] = {}
    for way, runs in seen.items():
        over, model = (max(run[key] for run in runs) for key in ("over", "model"))
        values[way] = {
            "model MiB": round(model / MIB, 1),
            "over MiB": round(over / MIB, 1),
            "tensor MiB": round(largest / MIB, 1),
            "over / (tensor + 10 % of the model)": round(over / (largest + 0.1 * model), 2),
            "s": round(median(run["seconds"] for run in runs), 2),
            "runs": ROUNDS,
        }
    return values


def _sixteen_bits(source: Path, target: Path) -> int:
    """Write the model in bfloat16. Gives the bytes of its largest tensor."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target)
    AutoProcessor.from_pretrained(source).save_pretrained(target)
    return max(int(p.nbytes) for p in model.parameters())


def _apart(way: str, place: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "bench.cases.quant_load", way, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _openers(way: str) -> Callable[[str], Any]:
    """What opens a folder in this way and gives the model."""
    import torch
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    if way == WAYS[0]:
        from tarsia.adapter import FourBits, open_base

        return lambda path: open_base(path, dtype="bfloat16", processor=False, four_bits=FourBits()).model
    options: dict[str, Any] = {}
    if way == WAYS[1]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["model.multi_modal_projector", "lm_head"],
        )
    return lambda path: LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16, **options)


def _bytes(model: Any) -> int:
    from tarsia.core.packed import Packed

    total = 0
    for value in [*model.parameters(), *model.buffers()]:
        state = getattr(value, "quant_state", None)
        if isinstance(value, Packed):
            total += sum(t.nbytes for t in value.value.tensors.values())  # type: ignore[attr-defined]
        else:
            total += value.nbytes
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def main(way: str, place: str) -> None:
    """One way, in this process."""
    opened = _openers(way)
    with tempfile.TemporaryDirectory() as tiny:
        _tiny(Path(place), Path(tiny))
        opened(tiny)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf8")  # sets VmHWM back
    before, began = _memory("VmRSS"), time.perf_counter()
    model = opened(place)
    seconds, size = time.perf_counter() - began, _bytes(model)
    print(json.dumps({"over": _memory("VmHWM") - before - size, "model": size, "seconds": seconds}))


def _tiny(like: Path, target: Path) -> None:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(like)
    for part in (config.text_config, config.vision_config):
        part.num_hidden_layers = 1
        part.hidden_size, part.intermediate_size, part.num_attention_heads = 64, 128, 1
    config.text_config.num_key_value_heads, config.text_config.head_dim = 1, 64
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
