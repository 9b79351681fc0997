"""Killed with SIGKILL at any moment and run again, a run gives the same curve and the same adapter, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from train import small

from tarsia.train import step
from tarsia.train.events import read_log

MOMENTS = 20


def work(values: dict, calls_to_live: int | None = None, micro_batches: bool = False) -> None:
    """One run in a process of its own; dies at the given call that touches the disk, if any.

    With ``micro_batches`` it dies before a micro-batch instead, the step's earlier ones done.
    """
    if calls_to_live is not None:
        counted = small.dying(calls_to_live)
        if micro_batches:
            step.token_losses = counted(step.token_losses)
        else:
            # everything that a checkpoint, the log and the adapter are written with
            os.fsync, os.replace, os.open = counted(os.fsync), counted(os.replace), counted(os.open)
            os.mkdir, shutil.rmtree = counted(os.mkdir), counted(shutil.rmtree)
    small.run(values)


@pytest.fixture(scope="module")
def start():
    return small.starter(work)


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """Recipe values, the uninterrupted run's result, and its seconds."""
    values = small.world(tmp_path_factory.mktemp("killed")) | {"save_every": 2}
    warm = start(values | {"out": values["out"] + "-warm"})
    warm.join()
    began = time.perf_counter()
    process = start(values)
    process.join()
    assert (warm.exitcode, process.exitcode) == (0, 0)
    return values, result(values["out"]), time.perf_counter() - began


def result(out: str) -> tuple[list[dict], bytes]:
    """The whole curve as the log holds it, without its one unrepeatable field, and the adapter's tensors."""
    curve = [event for event in read_log(Path(out) / "events.jsonl") if event["event"] == "step"]
    for event in curve:
        del event["tokens_per_second"]
    return curve, (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


def killed(start, values, after: float):
    """Kill a run ``after`` seconds; one that had ended by then is begun again, and killed sooner."""
    process = start(values)
    process.join(after)
    process.kill()
    process.join()
    if process.exitcode == 0:
        shutil.rmtree(values["out"])
        return killed(start, values, 0.7 * after)
    return process


def killed_then_resumed(start, reference, moment: int, tmp_path: Path) -> None:
    values, expected, seconds = reference
    values = values | {"out": str(tmp_path / "out")}
    chance = random.Random(moment)
    if moment % 2:
        process = start(values, chance.randrange(30))
        process.join()
    else:
        process = killed(start, values, chance.uniform(0, seconds))
    assert process.exitcode == -signal.SIGKILL
    goes_on(start, values, expected)


def goes_on(start, values, expected) -> None:
    """Begun again, the run ends as if it had not been killed."""
    again = start(values)
    again.join()
    assert again.exitcode == 0
    curve, adapter = result(values["out"])
    assert [event["step"] for event in curve] == list(range(1, values["steps"] + 1))
    assert curve == expected[0]
    assert adapter == expected[1]
    assert not list(Path(values["out"]).rglob(".partial*"))


@pytest.mark.parametrize("moment", range(5))
def test_a_killed_run_goes_on_to_the_same_bits(start, reference, moment, tmp_path):
    killed_then_resumed(start, reference, moment, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5, MOMENTS))
def test_a_killed_run_goes_on_to_the_same_bits_at_more_moments(start, reference, moment, tmp_path):
    killed_then_resumed(start, reference, moment, tmp_path)


@pytest.fixture(scope="module", params=["sampled", "weighted"])
def mixed(request, start, tmp_path_factory):
    """Values of a recipe with three micro-batches a step in either mode, and the uninterrupted run's result."""
    values = small.world(tmp_path_factory.mktemp(request.param)) | {"save_every": 3, "accumulate": 3}
    values["data"] |= {"mix": request.param}
    process = start(values)
    process.join()
    assert process.exitcode == 0
    return values, result(values["out"])


def killed_between_micro_batches(start, mixed, micro_batch: int, tmp_path: Path) -> None:
    values, expected = mixed
    values = values | {"out": str(tmp_path / "out")}
    process = start(values, micro_batch, micro_batches=True)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = [event for event in read_log(Path(values["out"]) / "events.jsonl") if event["event"] == "step"]
    assert len(done) == micro_batch // 3
    goes_on(start, values, expected)


@pytest.mark.parametrize("micro_batch", [1, 14])
def test_killed_in_the_middle_of_accumulation(start, mixed, micro_batch, tmp_path):
    killed_between_micro_batches(start, mixed, micro_batch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [2, 4, 5, 7, 8, 9, 10, 11, 13, 17, 19, 20, 22, 23])
def test_killed_in_the_middle_of_accumulation_at_more_moments(start, mixed, micro_batch, tmp_path):
    killed_between_micro_batches(start, mixed, micro_batch, tmp_path)


def test_the_comparison_tells_two_runs_apart(start, reference, tmp_path):
    values, expected, _ = reference
    other = values | {"out": str(tmp_path / "out"), "seed": 1}
    process = start(other)
    process.join()
    found = result(other["out"])
    assert found[0] != expected[0]
    assert found[1] != expected[1]
    assert json.dumps(found[0]) != json.dumps(expected[0])
