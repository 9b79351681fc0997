"""Loading into 4 bits takes the final model and one tensor: measured by the system, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file

from tarsia.adapter import pages

LARGE = {"hidden_size": 512, "intermediate_size": 32768, "num_hidden_layers": 1}
ONE = 512 * 32768 * 2
"""Bytes of the largest tensor of the checkpoint."""

PROGRAM = """
import gc, json, sys
from pathlib import Path
from tarsia.adapter import FourBits, open_base, quantiser

def memory():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(lines[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS")}

small, large, dtype, fault = sys.argv[1:]
open_base(small, processor=False, four_bits=FourBits())  # what is imported and set up once
if fault == "holds":
    held, honest = [], quantiser.lost
    quantiser.lost = lambda weight, value, done: (held.append(weight.clone()), honest(weight, value, done))[1]
if fault == "dense":
    honest = quantiser.rounded
    quantiser.rounded = lambda weight, *rest: (weight.float().double(), honest(weight, *rest))[1]
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = memory()["VmRSS"]
host = open_base(large, processor=False, dtype=dtype, four_bits=FourBits())
held4 = host.quantisation.loss.bytes
rest = sum(p.numel() * p.element_size() for n, p in host.model.named_parameters() if n not in host.quantisation.names)
print(json.dumps({"over": memory()["VmHWM"] - before - held4 - rest, "four": held4, "rest": rest}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny base, and one with layers of 32 MiB in bfloat16."""
    small, large = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("large")
    FAMILIES["llava"].build()[0].save_pretrained(small)
    config = FAMILIES["llava"].config(text_config=LARGE)
    config.save_pretrained(large)
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        shapes = LlavaForConditionalGeneration(config).state_dict()
    noise = torch.randn(1 << 20).bfloat16()
    tensors = {}
    for name, value in shapes.items():
        count = value.numel()
        tensors[name] = noise.repeat(-(-count // len(noise)))[:count].view(value.shape).clone()
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    return small, large


def over(folders, dtype="bfloat16", fault="none"):
    """Bytes of the peak over what was there before and the loaded model."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak of a process's memory")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, folders), dtype, fault], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["four"] == pytest.approx(4.127 / 16 * 3 * ONE, rel=0.1)
    return found["over"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peak_is_the_final_model_and_less_than_one_tensor(dtype, folders):
    assert over(folders, dtype) <= 1.1 * ONE


@pytest.mark.parametrize("fault", ["holds", "dense"])
def test_a_model_that_is_held_in_16_bits_is_seen(fault, folders):
    assert over(folders, fault=fault) > 1.1 * ONE


def test_pages_of_a_file_are_given_back_and_no_others(tmp_path):
    from safetensors import safe_open

    value = torch.randn(1 << 18)
    save_file({"x": value}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        held = file.get_tensor("x")
        if sys.platform.startswith("linux"):
            assert pages.give_back(held) >= held.numel() * 4 - 8192
        assert torch.equal(held, value)
        own = held.clone()
        assert pages.give_back(own) == 0
        assert torch.equal(own, value)
        assert pages.give_back(held[:4]) == 0
