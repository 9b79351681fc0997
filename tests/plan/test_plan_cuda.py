"""A run on a GPU, planned without one: scratch by hand, what lies on the device, and what its optimiser takes."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from tarsia.plan import plan
from tarsia.plan.allocator import MIB
from tarsia.plan.cuda import CONTEXT, THREADS, WORKSPACE, Scratch, as_there, device, major_of, on_device, workspace
from tarsia.plan.ghost import Op
from tarsia.plan.ledger import Block, Category, Mark
from tarsia.quant.gpu.plan import ARENA
from tarsia.train.recipe import Recipe

HALF = torch.bfloat16


def spec(*size, dtype=HALF, stride=None):
    steps = [math.prod(size[n + 1 :]) for n in range(len(size))]
    return size, tuple(stride or steps), dtype


def op(name, inputs, outputs=()):
    return Op(name, "forward", tuple(inputs), tuple(outputs))


def test_weights_in_4_bits_are_unpacked_where_there_are_many_rows():
    def taken(rows, columns, out, major=8, **how):
        return Scratch(major)(op("tarsia::linear4", [spec(rows, columns, **how)], [spec(rows, out)]))

    assert taken(64, 4096, 4096) == 0
    assert taken(65, 4096, 4096) == 4096 * 4096 * 2
    assert taken(33, 4096, 4096, major=9) == 4096 * 4096 * 2
    assert taken(1000, 8192, 28672) == ARENA
    assert taken(17, 64, 32, dtype=torch.float32) == 64 * 32 * 4
    # rows that do not lie one behind the other are copied
    assert taken(4, 64, 32, stride=(128, 1)) == 4 * 64 * 2


def test_attention_adds_up_in_float32_on_its_way_back():
    query = spec(2, 8, 300, 80)
    name = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    assert Scratch()(op(name, [query] * 4)) == 4 * 2 * 8 * 384 * (96 + 1)


@pytest.mark.parametrize("keys, copied", [(64, 0), (65, 72), (71, 72)])
def test_a_mask_is_copied_where_its_lines_are_no_whole_16_bytes(keys, copied):
    name, q = "aten::_scaled_dot_product_flash_attention_for_cpu", spec(1, 2, 64, 32)
    assert Scratch()(op(name, [q, q, q, spec(1, 1, 64, keys)])) == 64 * copied * 2
    assert Scratch()(op(name, [q, q, q])) == 0


def test_what_mixes_dtypes_takes_nothing():
    assert Scratch()(op("aten::add.Tensor", [spec(10**6), spec(10**6, dtype=torch.float32)])) == 0


def test_of_loading_and_encoding_only_what_stays_is_on_the_device():
    blocks = [
        Block(1, 0, "load", "", 1),
        Block(2, 1, "load", ""),
        Block(4, 3, "step", "", 4),
        Block(8, 4, "step", "", 9),
        Block(16, 6, "forward", "", 7),
        Block(32, 9, "step", "", 10),
        Block(64, 11, "save", "", 12),
    ]
    marks = (Mark(0, "load"), Mark(3, "step"), Mark(6, "forward"), Mark(9, ""))
    found = on_device(SimpleNamespace(blocks=blocks, marks=marks))
    assert sum(block.size for block in found) == 2 + 8 + 16 + 64


def test_a_device_has_workspaces_of_every_thread_and_a_context():
    assert workspace(8) == WORKSPACE == 8_519_680
    assert workspace(9) == workspace(10) == 32 * MIB
    nothing = SimpleNamespace(blocks=[Block(100 * MIB, 1, "forward", "")], marks=(Mark(0, "forward"),), end=2)
    found = device(nothing, 8)
    assert found.allocated == 100 * MIB + THREADS * WORKSPACE
    assert found.reserved == 100 * MIB + 20 * MIB
    assert found.total == found.reserved + CONTEXT[8]
    assert device(nothing, 9).reserved == (100 + 2 * 32) * MIB
    assert device(nothing, 99).context == CONTEXT[max(CONTEXT)]


def test_which_gpu_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [major_of(name) for name in ("cpu", "auto", "cuda")] == [None, None, 8]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert [major_of(name) for name in ("cpu", "auto", "cuda")] == [None, 9, 9]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """A run on the processor and on a GPU, in float32 and with precision left open."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rows.jsonl").write_text(json.dumps({"question": "what is it", "answer": "a b c"}) + "\n")

    def planned(place, precision):
        values = {
            "model": "mini-1",
            "parts": [{"method": "lora", "select": "language.*.{q,v}", "rank": 8, "lr": 1e-4}],
            "data": {"train": [{"path": str(folder / "rows.jsonl")}]},
            "steps": 2,
            "precision": precision,
            "device": place,
            "out": str(folder / f"{place}-{precision}"),
        }
        return plan(Recipe.of(values))

    return {
        (place, precision): planned(place, precision)
        for place, precision in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "auto"))
    }


def test_a_gpus_optimiser_holds_the_roots_of_all_second_moments(plans):
    def roots(found):
        return [b.size for b in found.rehearsal.blocks if b.phase == "update" and "_foreach_sqrt" in b.op]

    assert roots(plans["cpu", "float32"]) == []
    there = plans["cuda", "float32"]
    patches = sum(b.size for b in there.rehearsal.blocks if b.category is Category.PATCHES)
    assert sum(roots(there)) == patches


def test_a_plan_for_a_gpu_says_what_torch_would(plans):
    found = plans["cuda", "float32"]
    assert not found.on_processor
    assert plans["cpu", "float32"].on_processor
    assert found.total == found.device.reserved + found.device.context
    assert found.step.peak <= found.device.allocated <= found.device.reserved
    assert found.as_json()["reserved"] == found.device.reserved
    assert "process" not in found.as_json()


def test_precision_left_open_is_half_on_a_gpu(plans):
    open_, full = plans["cuda", "auto"], plans["cuda", "float32"]
    assert open_.rehearsal.dtype is torch.bfloat16
    weights = [sum(b.size for b in p.rehearsal.blocks if b.category is Category.WEIGHTS) for p in (open_, full)]
    assert weights[0] < 0.6 * weights[1]
    fixed = as_there(full.recipe)
    assert fixed is full.recipe
