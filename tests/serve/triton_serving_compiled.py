"""Compile the kernels of serving for GPUs that are not there; print the bytes of code of each as JSON.

``test_kernel_triton.py`` runs this in a process of its own. Triton's driver is replaced by one that names a GPU, and
the start of a kernel by its compilation.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from served_rows import Drawn, cache, entries, neck, thin
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tarsia.quant.gpu import tile
from tarsia.serve import gpu


class Driver:
    """One GPU of a compute capability, which nothing is started on."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def main() -> None:
    """Two generations, a dtype each: both kinds of forms, and attention."""
    made: dict[str, int] = {}
    where = ""

    def start(run: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
        name = f"{run.__name__} {where}"
        made[name] = len(run.warmup(*args, grid=grid, enable_fp_fusion=False, **options).asm["cubin"])

    tile.start = start
    draw, starts = Drawn(1), torch.tensor([0, 1], dtype=torch.int32)
    for capability, dtype in ((80, torch.float32), (90, torch.bfloat16)):
        driver.set_active(Driver(capability))
        x = draw(1, 64, dtype=dtype)
        for form in (thin(draw, 16, 64, 64, dtype), neck(draw, 16, 64, dtype, "gelu", True)):
            where = f"{capability} {dtype} {type(form).__name__}"
            gpu.grouped(x, x.clone(), starts, [form], entries([form]))
        it = cache(draw, [(40, 1)], 6, 2, 64, 16, dtype)
        where = f"{capability} {dtype}"
        gpu.attend(it.q, *it.rest(), 0.125, 5, 3.0)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
