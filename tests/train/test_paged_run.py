"""Runs whose states are in pages: the same curve, killed or short of memory or neither, and refusals that name rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from data.processors import made
from train import small

from tarsia.core.errors import ConfigError, TrainingError
from tarsia.data import Mixture, read
from tarsia.train import loop, step
from tarsia.train.events import Notice, read_log
from tarsia.train.loop import fit
from tarsia.train.pages import SUFFIX, FilePages
from tarsia.train.recipe import Recipe, TrainSource
from tarsia.train.run import Run

TIGHT = {"paged": True, "budget": 10_000}
LARGE = [
    {"method": "full", "select": "projector", "lr": 1e-3},
    {"method": "lora", "select": "vision.*.{q,v}", "lr": 3e-3, "rank": 2, "dropout": 0.1},
    {"method": "full", "select": "language.*.{q,v,up,down}", "lr": 1e-3},
]
"""Parts of which some tensors have states in 8 bits."""


def wide(folder: Path, width: int, inner: int) -> Path:
    """A base whose language model has matrices of these sizes."""
    tokenizer = made("llava", "chatml").tokenizer
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": width // 4}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": width, "intermediate_size": inner, "max_position_embeddings": 4096}
    return small.base(folder, text_config={**heads, **ids, **sizes})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paged")
    values = small.world(folder) | {"save_every": 2}
    return values | {"model": str(wide(folder / "wide", 64, 96)), "parts": LARGE}


def result(out):
    curve = [event for event in read_log(Path(out) / "events.jsonl") if event["event"] == "step"]
    for event in curve:
        del event["tokens_per_second"]
    return curve, (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Results of uninterrupted runs: unpaged in 32 bits, and in 8."""
    found = {}
    for bits in (32, 8):
        out = str(tmp_path_factory.mktemp("whole") / "out")
        small.run(world | {"out": out, "optimiser": {"bits": bits}})
        found[bits] = result(out)
    return found


def test_8_bits_are_another_curve_close_by(whole):
    assert whole[8][0] != whole[32][0]
    for a, b in zip(whole[8][0], whole[32][0], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("form", [{"paged": True}, TIGHT], ids=["paged", "tight"])
def test_paged_runs_have_the_same_bits(world, whole, bits, form, tmp_path):
    values = world | {"out": str(tmp_path / "out"), "optimiser": {"bits": bits, **form}}
    events = small.run(values)
    assert result(values["out"]) == whole[bits]
    (line,) = [line for line in events[0].fast if line.startswith("AdamW's states")]
    assert f"states in {bits} bits" in line
    assert ("comes and goes" in line) == (form is TIGHT)
    assert not list(Path(values["out"]).rglob(f"*{SUFFIX}"))
    assert not (Path(values["out"]) / "pages").exists()


@pytest.mark.parametrize(
    "forms", [(None, TIGHT, "paged"), (TIGHT, None, TIGHT), ("8-bit", "paged 8-bit", {"bits": 8, **TIGHT})]
)
def test_runs_go_on_in_another_form_to_the_same_bits(world, whole, forms, tmp_path):
    values = world | {"out": str(tmp_path / "out")}
    for form, stop in zip(forms, (3, 6, None), strict=True):
        recipe = small.recipe(values | ({} if form is None else {"optimiser": form}))
        events = fit(recipe)
        if stop is None:
            started = next(events)
            assert started.resumed == 4
            list(events)
        else:
            small.until(events, stop)
    assert result(values["out"]) == whole[8 if "8" in str(forms[0]) else 32]


def test_other_bits_are_another_run(world, tmp_path):
    values = world | {"out": str(tmp_path / "out"), "steps": 3, "save_every": 1}
    small.run(values)
    with pytest.raises(ConfigError, match=r"another recipe[\s\S]*optimiser"):
        small.run(values | {"optimiser": "8-bit"})


def work(values, calls_to_live=None):
    """One run in a process of its own; dies at the given call that touches pages or checkpoints, if any."""
    if calls_to_live is not None:
        counted = small.dying(calls_to_live)
        os.pwrite, os.preadv, os.replace = counted(os.pwrite), counted(os.preadv), counted(os.replace)
    small.run(values)


@pytest.fixture(scope="module")
def start():
    return small.starter(work)


@pytest.mark.parametrize("moment", range(4))
def test_a_killed_run_goes_on_to_the_same_bits_and_leaves_no_pages(start, world, whole, moment, tmp_path):
    bits = 8 if moment % 2 else 32
    values = world | {"out": str(tmp_path / "out"), "optimiser": {"bits": bits, **TIGHT}}
    process = start(values, random.Random(moment).randrange(20, 400 if bits == 32 else 150))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(Path(values["out"]).rglob(f"*{SUFFIX}")), "what it left"
    process = start(values)
    process.join()
    assert process.exitcode == 0
    assert result(values["out"]) == whole[bits]
    assert not list(Path(values["out"]).rglob(f"*{SUFFIX}"))


def short(monkeypatch, calls, error=None):
    """Let these forward passes, counted from 0, run out of memory after the others' gradients were added."""
    own, seen = step.token_losses, []
    error = error or RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 123456 bytes. Error code 12 (Cannot allocate memory)"
    )

    def losses(model, *args):
        seen.append(torch.rand(()))  # as dropout, random numbers are drawn before it fails
        found = own(model, *args)
        if len(seen) - 1 in calls:
            raise type(error)(*error.args)
        return found

    monkeypatch.setattr(step, "token_losses", losses)
    return seen


ERRORS = [None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=["processor", "gpu", "python"])
@pytest.mark.parametrize("form", ["paged", TIGHT], ids=["paged", "tight"])
def test_a_step_that_runs_out_of_memory_is_done_again_with_the_same_numbers(world, error, form, tmp_path, monkeypatch):
    values = world | {"out": str(tmp_path / "plain"), "steps": 5}
    short(monkeypatch, ())
    small.run(values)
    monkeypatch.undo()
    # the second micro-batch of the first step, the first of the third, and the second of the last
    short(monkeypatch, (1, 6, 12), error)
    left = []
    own = loop.PagedAdamW.leave
    monkeypatch.setattr(loop.PagedAdamW, "leave", lambda self: left.append((own(self), self.resident)) or left[-1][0])
    events = small.run(values | {"out": str(tmp_path / "out"), "optimiser": form})
    assert result(tmp_path / "out") == result(tmp_path / "plain")
    told = [event.what for event in events if isinstance(event, Notice)]
    assert [line.split(" (")[0] for line in told] == [f"Step {n} ran out of memory" for n in (1, 3, 5)]
    if form is TIGHT:  # nothing stays between steps in so small a budget
        assert all("no states were there" in line for line in told)
        return
    assert "no states were there" in told[0] and "states left" in told[1]
    assert left[0] == (0, 0) and all(freed > 0 and after == 0 for freed, after in left[1:3])
    assert left[1][0] == left[2][0], "they had come back"


def test_a_step_that_never_fits_names_its_rows_and_what_was_tried(world, tmp_path, monkeypatch):
    values = world | {"out": str(tmp_path / "out"), "optimiser": "paged"}
    short(monkeypatch, range(8, 99))
    with pytest.raises(TrainingError, match="Step 5 does not fit into memory") as caught:
        small.run(values)
    assert caught.value.given.count("row ") == 4 and " of task" in caught.value.given
    assert "tried to allocate 123456 bytes" in caught.value.given
    assert "states left, and it was tried again" in caught.value.given
    assert "lower batch" in caught.value.do and "paged" not in caught.value.do
    monkeypatch.undo()
    events = small.run(values)
    assert events[0].resumed == 4, "the last checkpoint is there to go on from"


@pytest.mark.parametrize("optimiser", [None, "8-bit"])
def test_a_step_whose_states_can_not_leave_says_that_they_could(world, optimiser, tmp_path, monkeypatch):
    values = world | {"out": str(tmp_path / "out"), "optimiser": optimiser}
    short(monkeypatch, (4,))
    with pytest.raises(TrainingError, match=r"Step 3 does not fit[\s\S]*nothing could leave[\s\S]*paged: true"):
        small.run(values)


def test_another_error_ends_the_run_as_it_did(world, tmp_path, monkeypatch):
    short(monkeypatch, (4,), RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        small.run(world | {"out": str(tmp_path / "out"), "optimiser": "paged"})
    monkeypatch.undo()
    seen = short(monkeypatch, (4,))
    own = step.token_losses

    def other(*args):
        if len(seen) == 5:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return own(*args)

    monkeypatch.setattr(step, "token_losses", other)
    with pytest.raises(RuntimeError, match="mat1"):
        small.run(world | {"out": str(tmp_path / "out2"), "optimiser": "paged"})


def test_a_picture_that_can_not_be_read_for_lack_of_memory_is_tried_again(world, tmp_path, monkeypatch):
    own, seen = Run.encode, []

    def encode(self, numbers):
        seen.append(1)
        if len(seen) == 6:
            raise MemoryError
        return own(self, numbers)

    monkeypatch.setattr(Run, "encode", encode)
    events = small.run(world | {"out": str(tmp_path / "out"), "optimiser": "paged", "steps": 4})
    assert [e.what.split(" (")[0] for e in events if isinstance(e, Notice)] == ["Step 3 ran out of memory"]


def test_a_full_disk_under_pressure_is_said_and_costs_no_checkpoint(world, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    values = world | {"out": str(tmp_path / "out"), "optimiser": "paged"}
    short(monkeypatch, (9,))
    monkeypatch.setattr(os, "pwrite", lambda *args: full() if args[0] > 0 and len(args[1]) > 100 else 0)
    with pytest.raises(TrainingError, match="A page of the optimiser's states can not be written: the disk is full"):
        small.run(values)
    monkeypatch.undo()
    assert small.run(values)[0].resumed == 4


def test_pages_of_a_killed_run_in_a_shared_folder_go_at_the_next_start(world, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / f"states-1-0{SUFFIX}").write_bytes(b"left")
    living = FilePages(shared)
    living.open([10], 0)
    small.run(world | {"out": str(tmp_path / "out"), "steps": 3, "optimiser": {**TIGHT, "path": str(shared)}})
    assert [path.name for path in shared.iterdir()] == [living.path.name]
    living.close()


# what a spike takes, beside the states: rows of this many pictures with 16 tokens each
SPIKE = 40


def spiky(folder: Path) -> dict:
    """A run of six steps with 82 MB of states, whose fifth step has a row with very many pictures."""
    values = small.world(folder)
    rows = [json.loads(line) for line in small.rows(folder / "spike.jsonl", 8, (1,)).read_text().splitlines()]
    # not among the first four rows, which the adapter's probe is made on at the end
    _, row = Mixture([read(TrainSource(path=str(folder / "spike.jsonl")))], [1.0], 0).row(4)
    rows[row]["images"] = rows[row]["images"] * SPIKE
    (folder / "spike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return values | {
        "model": str(wide(folder / "large", 256, 4096)),
        "parts": [{"method": "full", "select": "language.*.{q,k,v,o,gate,up,down}", "lr": 1e-4}],
        "data": {"train": [{"path": str(folder / "spike.jsonl")}]},
        "steps": 6,
        "batch": 1,
        "accumulate": 1,
        "save_every": 6,
        "warmup": 0,
    }


def data_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return 1024 * int(line.split()[1])


def limited(values, limit, report):
    """A run that may have so many bytes of memory more than it begins with; reports how many it took at most."""
    before = data_bytes()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (before + limit, before + limit))
    most = [0]
    try:
        for event in fit(Recipe.of(values)):
            # freed memory is kept while a run lasts, so this is the most that there was
            most[0] = max(most[0], data_bytes() - before)
            del event
        report["error"] = None
    except TrainingError as error:
        report["error"] = str(error)
    report["most"] = most[0]


def in_a_process(context, values, limit):
    with context.Manager() as manager:
        report = manager.dict()
        process = context.Process(target=limited, args=(values, limit, report))
        process.start()
        process.join()
        assert process.exitcode == 0
        return dict(report)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process has")
def test_one_huge_row_ends_the_unpaged_run_and_not_the_paged_one(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.small", "transformers.models.llava.modeling_llava", "tarsia.train.loop"])
    values = spiky(tmp_path)
    free = in_a_process(context, values, None)
    assert free["error"] is None
    states = 2 * 4 * 3 * (4 * 256 * 256 + 3 * 256 * 4096)
    # what the freest run took is more than it needs, by as much as its heap has gaps
    for tenths in (6, 7, 8):
        limit = free["most"] - states * tenths // 10
        died = in_a_process(context, values | {"out": str(tmp_path / f"died-{tenths}")}, limit)
        if died["error"] is not None:
            break
    assert "Step 5 does not fit into memory" in died["error"] and " of spike" in died["error"]
    lived = in_a_process(context, values | {"out": str(tmp_path / "lived"), "optimiser": "paged"}, limit)
    assert lived["error"] is None
    assert result(tmp_path / "lived") == result(values["out"])
    told = [e["what"] for e in read_log(tmp_path / "lived" / "events.jsonl") if e["event"] == "notice"]
    assert any(line.startswith("Step 5 ran out of memory") and f"{states:,} bytes" in line for line in told)
    shutil.rmtree(tmp_path)
