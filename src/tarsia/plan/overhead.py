"""What a step costs beside its kernels: Python, the dispatcher, autograd, and what is done once a step.

Measured on steps of a LLaVA so narrow that arithmetic takes next to nothing: what is left of the time after that of the
kernels is shared out over the operations, those on the way forward, those on the way back, and the trained tensors.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

import tarsia
from tarsia.plan.ledger import Ledger
from tarsia.plan.operations import Operations, by_phase, operations
from tarsia.plan.rehearse import Outline, rehearsing
from tarsia.plan.speeds import Kernels
from tarsia.plan.work import work_of
from tarsia.train.loop import one_step, training
from tarsia.train.memory import Phase, listening
from tarsia.train.recipe import Recipe
from tarsia.train.run import Run, prepare

LAYERS: Final = 4
FEW_AND_MANY: Final = ("language.0.q", "language")
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Overhead(BaseModel):
    """Seconds for each operation forward, for each backward, for each trained tensor in an update, and for a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    forward: NotNegative
    backward: NotNegative
    update: NotNegative
    step: NotNegative


@dataclass(frozen=True, slots=True)
class Tiny:
    """A tiny run that can be stepped at any time, and the seconds of its steps' parts so far."""

    recipe: Recipe
    run: Run
    seen: list[Mapping[Phase, float]] = field(default_factory=list)

    def sample(self) -> None:
        """Time one step; the one before it only brings the code back into the caches."""
        with torch.enable_grad():
            one_step(self.run)
            self.seen.append(_timed(self.run))

    @property
    def tensors(self) -> int:
        """How many are trained."""
        return sum(len(group["params"]) for group in self.run.optimiser.param_groups)

    def seconds(self, phase: Phase) -> float:
        """Median over all steps."""
        return median(seen[phase] for seen in self.seen)

    def issuing(self, phase: Phase, ops: Operations, kernels: Kernels) -> float:
        """Seconds of one operation of a phase beyond its kernel."""
        held = by_phase(ops)[phase]
        busy = sum(n * kernels.seconds(work) for op, n in held.items() for work in work_of(op))
        return max(0.0, self.seconds(phase) - busy) / sum(held.values())


@contextmanager
def opened(device: str) -> Iterator[tuple[Tiny, Tiny]]:
    """Two runs, one that trains few tensors and one that trains many, with as many threads as torch uses now."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        base = _narrow(Path(scratch))
        made = []
        for select in FEW_AND_MANY:
            recipe = _recipe(base, select, device)
            run = prepare(recipe, None, torch.get_num_threads())
            with torch.enable_grad():
                stack.enter_context(training(run))
            made.append(Tiny(recipe, run))
        few, many = made
        yield few, many


def overhead(few: Tiny, many: Tiny, kernels: Kernels) -> Overhead:
    """What is left of the steps that were timed once their kernels are taken off."""
    with rehearsing(many.recipe, Outline.of(many.recipe.model), Ledger()) as (unreal, ghost):
        ops = operations(unreal, ghost, [0])
    rests = few.seconds(Phase.UPDATE), many.seconds(Phase.UPDATE)
    tensor = max(0.0, rests[1] - rests[0]) / (many.tensors - few.tensors)
    return Overhead(
        forward=many.issuing(Phase.FORWARD, ops, kernels),
        backward=many.issuing(Phase.BACKWARD, ops, kernels),
        update=tensor,
        step=max(0.0, rests[0] - tensor * few.tensors),
    )


def _timed(run: Run) -> dict[Phase, float]:
    """Seconds of the parts of one step; what comes before the first and the reading of its rows are not among them."""
    marks: list[tuple[Phase, float]] = []

    def begins(name: str) -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        marks.append((Phase(name), time.perf_counter()))

    with listening(begins):
        one_step(run)
        begins(Phase.UPDATE)
    found = dict.fromkeys(Phase, 0.0)
    for (phase, began), (_, ended) in pairwise(marks):
        found[phase] += ended - began
    return found


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
