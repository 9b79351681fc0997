"""Compile the kernels, as the operators start them, for GPUs that are not there; print what became of them as JSON.

``test_triton.py`` runs this in a process of its own. Triton's driver is replaced by one that names a GPU, and the start
of a kernel by its compilation; the assembler that comes with Triton makes the code of the machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu import linear, tile
from tarsia.quant.gpu.lang import kernel, tl
from tarsia.quant.gpu.update import Update
from tarsia.quant.levels import levels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def spilled(binary: bytes) -> int:
    """Bytes of memory that a thread of the machine code keeps what found no register in."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", said))


def read(made: Any) -> dict[str, int]:
    """What the tests ask of one compiled kernel."""
    text = made.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    return {
        "spilled": spilled(made.asm["cubin"]),
        "shared": made.metadata.shared,
        "fused": count(r"\bfma\.\w+\.f32\b"),
        "products": count(r"\bmul\.rn\.f32\b"),
        "sums": count(r"\badd\.rn\.f32\b"),
        "rounded": count(r"\bcvt\.rn\.(?:bf16x2|f16x2|bf16|f16)\.f32\b"),
        "matrix": count(r"\b(?:mma\.sync|wgmma\.mma_async)\b"),
        "single bytes": count(r"\bld\.global(?:\.\w+)*\.[bus]8\b"),
        "staged singly": count(r"cp\.async\.ca\.shared\.global[^;]*\b0x4\b"),
    }


def weight(rows: int, columns: int, nested: bool) -> Packed4:
    """A weight of which only shapes, dtypes and alignment are looked at."""
    blocks = -(-rows * columns // 64)
    scales = torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    more = (torch.empty(-(-blocks // 256)), torch.zeros(())) if nested else (None, None)
    return Packed4(
        torch.empty(rows * columns // 2, 1, dtype=torch.uint8), scales, *more, levels("nf4"), 64, rows, columns
    )


@kernel()
def _staged(codes: tl.tensor, levels: tl.tensor, x: tl.tensor, out: tl.tensor, steps: tl.tensor) -> None:
    """A product that reads its levels by pointer in the loop."""
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    total = tl.zeros((64, 64), tl.float32)
    for step in range(steps):
        code = tl.load(codes + step * 4096 + i * 64 + j)
        total = tl.dot(
            tl.load(levels + code.to(tl.int32)).to(tl.bfloat16), tl.load(x + step * 4096 + i * 64 + j), total
        )
    tl.store(out + i * 64 + j, total)


def planted() -> dict[str, dict[str, int]]:
    """What the checks are to find: a product fused with a sum, levels staged one by one, bytes read one by one."""
    unpacked: list[Any] = []
    tile.start = lambda run, grid, device, *args, **options: unpacked.append(
        run.warmup(*args, grid=grid, **options, enable_fp_fusion=True)
    )
    linear.dequantise4(weight(512, 4096, True), torch.bfloat16)
    linear.dequantise4(weight(511, 4098, True), torch.bfloat16)  # a last block that is not whole
    tensors = (torch.empty(4096, dtype=torch.uint8), levels("nf4"), torch.empty(4096, dtype=torch.bfloat16))
    staged = _staged.warmup(*tensors, torch.empty(4096), 9, grid=(1,), num_stages=3)
    fused, single = unpacked
    return {"planted fusion": read(fused), "planted bytes": read(single), "planted staging": read(staged)}


def uses(dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Calls that start every kernel."""
    nested, plain = weight(512, 4096, True), weight(512, 4096, False)
    x, y = torch.empty(16, 4096, dtype=dtype), torch.empty(16, 512, dtype=dtype)
    low, up = torch.empty(16, 24, dtype=dtype), torch.empty(512, 24, dtype=dtype)
    bias, back = torch.empty(512, dtype=dtype), torch.empty(24, 4096, dtype=dtype).t()
    return [
        lambda: linear.dequantise4(nested, dtype),
        lambda: linear.linear4(x[:1], nested, bias, Update(low[:1], up, 2.0)),
        lambda: linear.linear4(x, nested, bias, Update(low, up, 2.0)),
        lambda: linear.linear4(x, plain, None),
        lambda: linear.product4(y, nested, Update(low, back, 2.0)),
    ]


def main() -> None:
    found: dict[str, dict[str, int]] = {}
    target = [0, ""]

    def compile_only(run: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
        made = run.warmup(*args, grid=grid, **options, enable_fp_fusion=False)
        name = f"{run.fn.__name__} {target[1]} {target[0]}"
        found[name + f" {len(found)}" if name in found else name] = read(made)

    tile.start = compile_only
    linear.INTERPRETED = tl.constexpr(True)  # so that tensors need not be on the GPU that is not there
    linear._processors = lambda device: 132
    for capability, dtypes in ((90, (torch.bfloat16,)), (80, (torch.float16,)), (89, (torch.float32,))):
        driver.set_active(Driver(capability))
        for dtype in dtypes:
            target[:] = [capability, str(dtype)]
            # float32 has the same loads and roundings: of it, that it compiles
            for use in uses(dtype)[:: 2 if dtype is torch.float32 else 1]:
                use()
    print(json.dumps({**found, **planted()}))


if __name__ == "__main__":
    main()
