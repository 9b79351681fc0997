"""What a step costs beside its kernels: Python, the dispatcher, autograd, and what is done once a step.

Measured on steps of a LLaVA so narrow that arithmetic takes next to nothing: what is left of the time after that of the
kernels is shared out over the operations, those on the way forward, those on the way back, and the trained tensors.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tarsia
from tarsia.data import Batch
from tarsia.plan.ghost import Op
from tarsia.plan.speeds import Kernels
from tarsia.plan.work import work_of
from tarsia.train.exact import deterministic, threads
from tarsia.train.loop import _step, _training
from tarsia.train.recipe import Recipe
from tarsia.train.run import Run, prepare
from tarsia.train.step import token_losses

LAYERS: Final = 4
FEW_AND_MANY: Final = ("language.0.q", "language")
STEPS: Final = 15
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Overhead(BaseModel):
    """Seconds for each operation forward, for each backward, for each trained tensor in an update, and for a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    forward: NotNegative
    backward: NotNegative
    update: NotNegative
    step: NotNegative


class Recorder(TorchDispatchMode):
    """Notes the operations that are run inside, as a rehearsal does: those on floating-point numbers, no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: Counter[Op] = Counter()
        self.phase = ""

    def enter(self, phase: str) -> None:
        """What comes from now on is of this phase."""
        self.phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = (
            tuple((tuple(t.shape), t.stride(), t.dtype) for t in _tensors(group))
            for group in ((args, tuple((kwargs or {}).values())), (out,))
        )
        floats = any(dtype.is_floating_point for _, _, dtype in (*inputs, *outputs))
        if floats and not func.is_view:
            written = () if func._schema.is_mutable else outputs
            self.ops[Op(func.name(), self.phase, inputs, written)] += 1
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def overhead(kernels: Kernels, device: str) -> Overhead:
    """Measure it with as many threads as torch uses now."""
    with tempfile.TemporaryDirectory() as scratch:
        base = _narrow(Path(scratch))
        few, many = (_Stages.of(_recipe(base, select, device)) for select in FEW_AND_MANY)
    tensor = max(0.0, many.rest - few.rest) / (many.tensors - few.tensors)
    return Overhead(
        forward=many.beyond("forward", kernels),
        backward=many.beyond("backward", kernels),
        update=tensor,
        step=max(0.0, few.rest - tensor * few.tensors),
    )


@dataclass(frozen=True, slots=True)
class _Stages:
    """What was seen of a tiny run: median seconds of its stages, its trained tensors, the operations of one step."""

    seconds: Mapping[str, float]
    rest: float
    tensors: int
    ops: Mapping[Op, int]

    @classmethod
    def of(cls, recipe: Recipe) -> _Stages:
        with threads(None) as count:
            run = prepare(recipe, None, count)
            with _training(run):
                for _ in range(3):
                    _step(run)
                times = [_timed(run) for _ in range(STEPS)]
                recorder = Recorder()
                with recorder:
                    _both(run, run.batches()[0], recorder.enter)
            tensors = sum(len(group["params"]) for group in run.optimiser.param_groups)
        forward, back, rest = (median(column) for column in zip(*times, strict=True))
        return cls({"forward": forward, "backward": back}, rest, tensors, recorder.ops)

    def beyond(self, phase: str, kernels: Kernels) -> float:
        """Seconds of one operation of a phase beyond its kernel."""
        held = {op: n for op, n in self.ops.items() if op.phase == phase}
        busy = sum(n * kernels.seconds(work) for op, n in held.items() for work in work_of(op))
        return max(0.0, self.seconds[phase] - busy) / sum(held.values())


def _both(run: Run, batch: Batch, enter: Callable[[str], object]) -> None:
    """A step's way forward and back; ``enter`` is told where the one ends and the other begins."""
    with deterministic(run.device):
        enter("forward")
        losses = token_losses(run.model, batch.inputs, batch.labels)
        enter("backward")
        losses.sum().backward()
        enter("update")
    run.optimiser.zero_grad(set_to_none=True)


def _timed(run: Run) -> tuple[float, float, float]:
    """Seconds of one step: forward, backward, and all else but the reading of rows."""
    marks: list[float] = []

    def mark(_: str = "") -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        marks.append(time.perf_counter())

    mark()
    batches = run.batches()
    _both(run, batches[0], mark)
    mark()
    _step(run)
    mark()
    read, forward, backward, whole = (marks[i + 1] - marks[i] for i in (0, 1, 2, 4))
    return forward, backward, max(0.0, whole - read - forward - backward)


def _narrow(folder: Path) -> Path:
    """mini-1's like, 16 numbers wide, in ``folder``, and rows for it beside it. Returns the model's folder."""
    import transformers

    source = Path(tarsia.__file__).parent / "base" / "mini-1"
    values = json.loads((source / "config.json").read_text(encoding="utf8"))
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    values["vision_config"] |= narrow
    values["text_config"] |= {**narrow, "num_key_value_heads": 2, "head_dim": 8}
    base = folder / "base"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**values))
        model.save_pretrained(base)
    for file in source.iterdir():
        if file.name.startswith(("tokenizer", "processor", "chat")):
            shutil.copy(file, base)
    Image.new("RGB", (64, 64), (90, 120, 60)).save(folder / "picture.png")
    line = {"images": ["picture.png"], "question": "what is this?", "answer": "a picture"}
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for _ in range(4)), encoding="utf8")
    return base


def _recipe(base: Path, select: str, device: str) -> Recipe:
    return Recipe.of(
        {
            "model": str(base),
            "parts": [{"method": "lora", "select": select, "rank": 4, "lr": 1e-4}],
            "data": {"train": [{"path": str(base.parent / "rows.jsonl")}]},
            "batch": 1,
            "steps": 1000,
            "precision": "float32",
            "device": device,
            "out": str(base.parent / "out"),
        }
    )
