"""Contestants side by side: each in a process of its own, taking turns step by step.

``race`` starts a worker for each, warms all up, and then lets them take single steps in turn, forwards and backwards
(A B B A ...), so that a busy moment of the machine touches all alike. What is compared are ratios within one round.

A worker is ``python -m bench.race MODULE:FUNCTION JSON``: the function is called with the values of JSON and returns a
step, a callable without arguments that gives a loss. It answers each line on its standard input with a line of JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any, Self

from bench.run import Values

Step = Callable[[], float]
Contestant = Callable[..., Step]

THREADS = 2
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Runner:
    """A contestant: where its function is, its arguments, the interpreter and the environment it needs."""

    name: str
    function: str
    arguments: Mapping[str, Any]
    python: str = sys.executable
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What was seen of one contestant. Times are seconds of one step, in the order of rounds."""

    name: str
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    work: tuple[float, ...]
    """Processor seconds of each step, all threads and the system's part: what other processes hardly touch."""
    peak: int
    """Bytes resident at most over three steps, everything included (VmHWM)."""
    above: int
    """``peak`` less what is resident between steps: what a step adds to the model and the optimiser."""
    saved: int
    """Bytes of distinct storages kept for the backward pass, without parameters and buffers."""
    flops: int
    """Floating-point operations of one step, of products of matrices and attention."""

    def work_over(self, other: Self) -> float:
        """Median over rounds of this one's processor time as a share of ``other``'s."""
        return median(a / b for a, b in zip(self.work, other.work, strict=True))

    def over(self, other: Self) -> float:
        """Median over rounds of this one's time as a share of ``other``'s."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


class Worker:
    """A process that takes steps when it is told to."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(THREADS),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
            **(runner.environment or {}),
        }
        command = [runner.python, "-m", "bench.race", runner.function, json.dumps(dict(runner.arguments))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        self._read()

    def ask(self, what: str) -> dict[str, Any]:
        """Send one word, wait for the answer."""
        pipe: IO[str] = self.process.stdin  # type: ignore[assignment]
        pipe.write(what + "\n")
        pipe.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        pipe: IO[str] = self.process.stdout  # type: ignore[assignment]
        for line in pipe:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.runner.name} ended with {self.process.wait()}; what it said is above")

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.wait()


@contextmanager
def workers(runners: Sequence[Runner]) -> Iterator[tuple[Worker, ...]]:
    """A worker for each runner, ended afterwards."""
    with ExitStack() as stack:
        made = []
        for runner in runners:
            worker = Worker(runner)
            stack.callback(worker.close)
            made.append(worker)
        yield tuple(made)


def race(runners: Sequence[Runner], rounds: int = 9, counted: bool = True) -> dict[str, Result]:
    """Every contestant's times, losses, memory and counts, by name."""
    with workers(runners) as all_:
        first = {w: [w.ask("step"), w.ask("step")] for w in all_}
        times: dict[Worker, list[float]] = {w: [] for w in all_}
        work: dict[Worker, list[float]] = {w: [] for w in all_}
        losses: dict[Worker, list[float]] = {w: [s["loss"] for s in first[w]] for w in all_}
        for number in range(rounds):
            for worker in all_ if number % 2 == 0 else all_[::-1]:
                answer = worker.ask("step")
                times[worker].append(answer["seconds"])
                work[worker].append(answer["work"])
                losses[worker].append(answer["loss"])
        found = {}
        for worker in all_:
            memory = worker.ask("peak")
            counts = worker.ask("counts") if counted else {"saved": 0, "flops": 0}
            found[worker.runner.name] = Result(
                worker.runner.name,
                tuple(times[worker]),
                tuple(losses[worker]),
                tuple(work[worker]),
                memory["peak"],
                memory["peak"] - memory["resident"],
                counts["saved"],
                counts["flops"],
            )
    return found


MIB = 2**20


def table(found: Mapping[str, Result], other: str) -> Values:
    """Each contestant's figures, and its shares of ``other``'s."""
    beside = found[other]
    values: dict[str, dict[str, float | int | str]] = {}
    for name, one in found.items():
        gap = max(abs(a - b) for a, b in zip(one.losses, beside.losses, strict=True))
        values[name] = {
            "s": round(median(one.seconds), 4),
            f"time / {other}": round(one.over(beside), 3),
            f"processor time / {other}": round(one.work_over(beside), 3),
            "peak MiB": round(one.peak / MIB),
            f"peak / {other}": round(one.peak / beside.peak, 3),
            "added MiB": round(one.above / MIB),
            f"added / {other}": round(one.above / beside.above, 3),
            "saved MiB": round(one.saved / MIB, 1),
            "GFLOP": round(one.flops / 1e9, 1),
            "loss differs by": f"{gap:.1e}",
            "rounds": len(one.seconds),
            "threads": THREADS,
            "allocator": allocator(),
        }
    return values


def allocator() -> str:
    """The C library that memory comes from, and what is put before it."""
    return " ".join(platform.libc_ver()) + (f", {held}" if (held := os.environ.get("LD_PRELOAD")) else "")


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf8")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:")) * 1024


def resident() -> int:
    """Bytes resident now, after what is free has been given back."""
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak(step: Step, steps: int = 3) -> int:
    """Most bytes resident over some steps."""
    resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf8")  # sets VmHWM back
    for _ in range(steps):
        step()
    return _status("VmHWM")


def counts(step: Step) -> dict[str, int]:
    """Bytes that one step keeps for its backward pass, and its floating-point operations."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    from tarsia.core.packed import Packed

    kept: dict[int, int] = {}
    held = []  # storages are kept alive, or an address could be used twice
    parameters: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        root = tensor if tensor._base is None else tensor._base
        if isinstance(root, Packed):  # the weight itself, which has no memory but its parts'
            return tensor
        storage = tensor.untyped_storage()
        if isinstance(root, torch.nn.Parameter):
            parameters.add(storage.data_ptr())
        else:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    saved = sum(size for place, size in kept.items() if place not in parameters)
    kept.clear()
    held.clear()
    with FlopCounterMode(display=False, custom_mapping=_packed_products()) as counter:
        step()
    return {"saved": saved, "flops": int(counter.get_total_flops())}


def _packed_products() -> dict[Any, Callable[..., int]]:
    """Floating-point operations of products with 4-bit weights, from the shapes of their arguments."""
    import torch

    import tarsia.quant.ops  # noqa: F401 (registers them)

    def product(x: Sequence[int], *rest: Any, **_: Any) -> int:
        rows, columns = rest[6:8]  # after codes, scales, nested_scales, offset, levels, block
        return 2 * (math.prod(x) // x[-1]) * int(rows) * int(columns)

    return {getattr(torch.ops.tarsia, name): product for name in ("linear4", "product4")}


def serve(function: str, arguments: Mapping[str, Any]) -> None:
    """A worker's life."""
    module, _, name = function.partition(":")
    step: Step = getattr(importlib.import_module(module), name)(**arguments)

    def answer(values: Mapping[str, Any]) -> None:
        print(json.dumps(values), flush=True)

    def timed() -> dict[str, float]:
        began, worked = time.perf_counter(), time.process_time()
        loss = step()
        return {"seconds": time.perf_counter() - began, "work": time.process_time() - worked, "loss": loss}

    answer({})
    for line in sys.stdin:
        word = line.strip()
        if word == "step":
            answer(timed())
        elif word == "peak":
            answer({"resident": resident(), "peak": peak(step)})
        elif word == "counts":
            answer(counts(step))


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
