"""The GPU's kernels without one: what they compute in Triton's interpreter, what its compiler makes of them, what runs.

Triton decides when it is imported whether it interprets, so each half has a process of its own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tarsia.core.errors import QuantError
from tarsia.quant import codec, cuda, ops
from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu import plan
from tarsia.quant.levels import levels

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What Python says to ``command``, on one thread, with the package's sources on its path."""
    without = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(ROOT)])
    everything = {**without, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=everything, cwd=ROOT)


def test_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton", minversion="3.7", reason="the GPU's kernels are written in Triton")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ran = process("-m", "pytest", str(HERE / "triton_cases.py"), *options, TRITON_INTERPRET="1")
    assert not ran.returncode, ran.stdout[-6000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) > 60, ran.stdout[-2000:]
    assert "skipped" not in ran.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Triton's compiler makes of the kernels as the operators start them, for GPUs of two generations."""
    pytest.importorskip("triton", reason="the GPU's kernels are written in Triton")
    ran = process(str(HERE / "triton_compiled.py"), TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    assert not ran.returncode, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_every_kernel_compiles_and_fits_the_gpu(compiled: dict[str, Any]) -> None:
    kernels = {name.split()[0] for name in compiled}
    assert kernels - {"planted"} == {"_dequantise", "_vector", "_forward", "_backward", "_add_up"}
    for name, one in compiled.items():
        assert one["spilled"] == 0, name
        assert one["shared"] <= 99 * 1024, name  # what a program may have on the smaller of the GPUs since 2020


def test_the_compiler_fuses_no_product_with_a_sum_of_the_weights(compiled: dict[str, Any]) -> None:
    unpacking = [one for name, one in compiled.items() if name.startswith("_dequantise")]
    assert unpacking and all(one["fused"] == 0 < min(one["products"], one["sums"]) for one in unpacking)
    assert compiled["planted fusion"]["fused"] > 0


def test_weights_are_rounded_to_nearest_by_the_gpu(compiled: dict[str, Any]) -> None:
    for name, one in compiled.items():
        if "float32" not in name and not name.startswith(("_add_up", "planted")):
            assert one["rounded"] > 0, name


def test_products_are_on_the_matrix_units_and_tables_are_not_staged(compiled: dict[str, Any]) -> None:
    for name, one in compiled.items():
        if name.startswith(("_forward", "_backward")) and "float32" not in name:
            assert one["matrix"] > 0, name
            assert one["staged singly"] <= 8, name  # scales
    assert compiled["planted staging"]["staged singly"] > 32


def test_codes_are_read_many_at_once(compiled: dict[str, Any]) -> None:
    for name, one in compiled.items():
        if name.startswith("_"):
            assert one["single bytes"] <= 4, name  # nested scales
    assert compiled["planted bytes"]["single bytes"] > 16


def test_registered_for_a_gpu() -> None:
    for name in ("quantise4", "dequantise4", "linear4", "product4"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tarsia::{name}", "CUDA"), name
    assert ops.linear4 is torch.ops.tarsia.linear4.default


def weight(shape: tuple[int, int] = (5, 128)) -> tuple[Packed4, codec.Quantised]:
    value = codec.encode(torch.randn(shape), codec.Scheme())
    parts = (value.codes, value.scales, value.nested_scales, value.offset, levels("nf4"))
    return Packed4(*parts, 64, *shape), value


def test_without_triton_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("triton", "tarsia.quant.gpu.lang", "tarsia.quant.gpu.linear"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr("tarsia.quant.gpu.lang", raising=False)
    monkeypatch.delattr("tarsia.quant.gpu.linear", raising=False)
    monkeypatch.delenv("TARSIA_KERNEL", raising=False)
    cuda.kernels.cache_clear()
    packed, value = weight()
    x = torch.randn(3, 128)
    with caplog.at_level(logging.WARNING):
        y = cuda.linear4(x, packed, None)
        assert torch.equal(y, codec.linear(x, value, None))
        assert torch.equal(cuda.dequantise4(packed, torch.bfloat16), codec.decode(value, torch.bfloat16))
        assert torch.equal(cuda.product4(y, packed), y @ codec.decode(value, torch.float32))
    assert [record.message.count("no Triton") for record in caplog.records] == [1]
    assert "no Triton" in str(cuda.status())
    cuda.kernels.cache_clear()


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARSIA_KERNEL", "reference")
    cuda.kernels.cache_clear()
    assert cuda.kernels() is None and "asks for it" in str(cuda.status())
    cuda.kernels.cache_clear()


def test_on_a_gpu_weights_are_quantised_by_the_reference() -> None:
    w = torch.randn(6, 64)
    codes, scales = cuda.quantise4(w, levels("nf4"), 64)
    value = codec.encode(w, codec.Scheme(nested=False))
    assert torch.equal(codes, value.codes) and torch.equal(scales, value.scales)
    with pytest.raises(QuantError, match="no weight"):
        cuda.quantise4(w.double(), levels("nf4"), 64)


def test_kernels_refuse_a_tensor_that_is_not_on_a_gpu() -> None:
    pytest.importorskip("triton", reason="the GPU's kernels are written in Triton")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter runs on the processor")
    from tarsia.quant.gpu import linear

    with pytest.raises(QuantError, match="elsewhere"):
        linear.linear4(torch.randn(2, 128), weight()[0], None)


@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (128, 64), (1, 64), (151936, 896)])
@pytest.mark.parametrize("processors", [1, 40, 132])
def test_plans_cover_the_sum_and_do_not_depend_on_time(shape: tuple[int, int], processors: int) -> None:
    rows, columns = shape
    for block in plan.BLOCKS:
        if columns % block:
            continue
        blocks = columns // block
        plans = [plan.vector(rows, blocks, block, processors)]
        for m in (1, 2, 16, 17, 64):
            plans += [
                plan.forward(m, rows, blocks, block, processors),
                plan.backward(m, rows, blocks, block, processors),
            ]
        for tiles in plans:
            sizes = (tiles.rows, tiles.blocks, tiles.batch, tiles.warps)
            assert all(size & (size - 1) == 0 for size in sizes) and tiles.batch <= 64
            assert 1 <= tiles.splits <= 8
        assert plans[0] == plan.vector(rows, blocks, block, processors)
        assert plan.forward(16, rows, blocks, block, 132).batch == 16


def test_slices_are_whole_and_as_large_as_the_arena() -> None:
    assert plan.slices(4096, 4096, 2, 1) == ((0, 4096),)
    for lines, size, itemsize, step in (
        (11008, 4096, 2, 1),
        (4096, 11008, 4, 64),
        (151936, 896, 2, 1),
        (64, 1 << 30, 4, 64),
    ):
        cut = plan.slices(lines, size, itemsize, step)
        assert cut[0][0] == 0 and cut[-1][1] == lines
        assert all(a[1] == b[0] for a, b in pairwise(cut))
        assert all(
            last - first <= step or (last - first) * size * itemsize <= plan.ARENA + step * size * itemsize
            for first, last in cut
        )
        assert all(first % step == 0 for first, _ in cut)


def test_few_rows_are_those_that_the_matrix_units_take() -> None:
    assert plan.few(torch.float32, 9) == 16
    assert plan.few(torch.bfloat16, 9) == 32 and plan.few(torch.float16, 8) == 64
