"""The same merge by mergekit and by PEFT's functions: the same numbers, to the bit where magnitudes are not equal.

mergekit is asked in a Python of its own, named by TARSIA_MERGEKIT: an environment with ``pip install mergekit``.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tarsia.merge import Delta
from tarsia.merge.sparsify import thresholds
from tarsia.merge.ways import WAYS, combined

PYTHON = os.environ.get("TARSIA_MERGEKIT")
needs_mergekit = pytest.mark.skipif(PYTHON is None, reason="TARSIA_MERGEKIT names no Python that has mergekit")

THEIRS = """
import json, sys
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import PerInputValues, TensorGroup
from safetensors.torch import load_file, save_file

source, target, calls = sys.argv[1:]
tensors, merged = load_file(source), {}
group = TensorGroup.from_tensors([tensors["base"], *tensors["stack"]], base_index=0)
for number, (method, weights, chosen) in enumerate(json.loads(calls)):
    weights = PerInputValues(list(enumerate(weights, 1)))
    (merged[str(number)],) = registry.get(method)([group], parameters={"weight": weights, **chosen})
save_file(merged, target)
"""

Call = tuple[str, list[float], dict[str, object]]


def mergekits(folder: Path, stack: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """What methods of mergekit make of changes to a base of zeros."""
    source, target = folder / "in.safetensors", folder / "out.safetensors"
    save_file({"base": torch.zeros_like(stack[0]), "stack": stack}, source)
    command = [str(PYTHON), "-c", THEIRS, str(source), str(target), json.dumps(calls)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = load_file(target)
    return [found[str(number)] for number in range(len(calls))]


def ours(name: str, stack: Tensor, weights: Sequence[float], **options: object) -> Tensor:
    made = combined(WAYS[name].taking(options), [Delta(whole=entry) for entry in stack], weights, "a.site")
    assert made.whole is not None
    return made.whole.float()


DENSITIES = (0.2, 0.75)
WEIGHTS = ([1.0] * 5, [0.5, 1.5, 0.25, 1.0, 2.0])


def stack_of(count: int = 5) -> Tensor:
    """Changes of rank 3, of whole registers: the rest torch adds in another order.

    At each threshold one magnitude stands alone: which of equals are kept is everyone's own.
    """
    g = torch.Generator().manual_seed(count)
    stack = torch.randn(count, 96, 3, generator=g) @ torch.randn(count, 3, 64, generator=g)
    for density in DENSITIES:
        levels = thresholds(stack, density)
        assert [int((entry.abs() == level).sum()) for entry, level in zip(stack, levels, strict=True)] == [1] * count
    return stack


@needs_mergekit
def test_merges_are_mergekits(tmp_path: Path) -> None:
    stack = stack_of()
    calls: list[Call] = [
        ("ties", weights, {"density": density, "normalize": normalise == "weights"})
        for weights in WEIGHTS
        for density in (*DENSITIES, 1.0)
        for normalise in ("weights", "none")
    ]
    sums: list[Call] = [("task_arithmetic", weights, {}) for weights in (*WEIGHTS, [1.0, -1.0, 0.5, -0.5, 1.0])]
    theirs = mergekits(tmp_path, stack, [*calls, *sums])
    assert all(one.abs().max() > 0.5 for one in theirs)
    for (_, weights, chosen), their in zip(calls, theirs, strict=False):
        options = {
            "density": chosen["density"],
            "weigh": "before",
            "normalise": "weights" if chosen["normalize"] else "none",
        }
        assert torch.equal(ours("ties", stack, weights, **options), their), (weights, options)
    for (_, weights, _), their in zip(sums, theirs[len(calls) :], strict=True):
        torch.testing.assert_close(ours("task_arithmetic", stack, weights), their, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", DENSITIES)
def test_ties_are_pefts(weights: list[float], density: float) -> None:
    utils = pytest.importorskip("peft.utils.merge_utils", reason="PEFT is not installed")
    stack = stack_of()
    theirs = utils.ties(list(stack), torch.tensor(weights), density)
    assert theirs.abs().max() > 0.5 and torch.equal(ours("ties", stack, weights, density=density), theirs)
    pruned = utils.magnitude_prune(list(stack), torch.tensor(weights), density)
    assert torch.equal(ours("magnitude", stack, weights, density=density), pruned)
    assert not torch.equal(ours("ties", stack, weights, density=density + 0.01), theirs), "it sees no difference"
