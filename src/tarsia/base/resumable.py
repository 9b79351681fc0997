"""Training state that survives SIGKILL: what the two stages of the base model's training share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


class Muon(Optimizer):
    """Momentum whose update is orthogonalised (Keller Jordan, 2024), in float32.

    ``torch.optim.Muon`` iterates in bfloat16, which costs five times more on a CPU that emulates it.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(g: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps towards the nearest semi-orthogonal matrix of ``g``."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def optimisers(model: nn.Module, hidden: Sequence[nn.Module], lr: float) -> tuple[Optimizer, Optimizer]:
    """Muon for the matrices inside ``hidden``, AdamW for everything else.

    Muon's own rate is ten times ``lr`` (Keller Jordan's recipe keeps about this ratio).
    """
    matrices = {id(p): p for m in hidden for p in m.parameters() if p.ndim == 2}
    others = [p for p in model.parameters() if id(p) not in matrices]
    decayed = [p for p in others if p.ndim > 1]
    plain = [p for p in others if p.ndim <= 1]
    muon = Muon(matrices.values(), lr=10 * lr, weight_decay=0.01, momentum=0.95)
    adamw = AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    for optimiser in (muon, adamw):
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return muon, adamw


def schedule(optimisers: Sequence[Optimizer], step: int, total: int, warmup: int = 100) -> float:
    """Linear warm-up, then a half cosine to 2 % of the peak. Returns the share of the peak."""
    done = (step - warmup) / max(1, total - warmup)
    share = (step + 1) / warmup if step < warmup else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * share
    return share


def save(path: Path, step: int, model: nn.Module, optimisers: Sequence[Optimizer]) -> None:
    """Write weights and optimiser states as one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {f"model/{k}": v for k, v in model.state_dict().items()}
    for number, optimiser in enumerate(optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimiser/{number}/{index}/{name}"] = torch.as_tensor(value)
    partial = path.with_suffix(".partial")
    contiguous = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    save_file(contiguous, partial, metadata={"step": json.dumps(step)})
    os.replace(partial, path)


def load(path: Path, model: nn.Module, optimisers: Sequence[Optimizer]) -> int:
    """Restore what ``save`` wrote. Returns the step to go on with, or 0 where nothing was saved."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(json.loads(file.metadata()["step"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    model.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    for number, optimiser in enumerate(optimisers):
        whole = optimiser.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"optimiser/{number}/"):
                _, _, index, name = key.split("/")
                whole["state"].setdefault(int(index), {})[name] = value
        optimiser.load_state_dict(whole)
    return step


def cut(log: Path, step: int) -> None:
    """Forget what the log says of steps after ``step``, which a resumed run does again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if json.loads(line).get("step", 0) <= step]
        log.write_text("".join(f"{line}\n" for line in lines))


def remember(work: Path, command: str, first: int) -> None:
    """Keep the command of every run that adds to this training, and the step that it begins with."""
    with (work / "commands.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"from_step": first, "command": command}) + "\n")


def note(log: Path, **entry: object) -> None:
    """Append one line to the run's log and show it."""
    line = json.dumps(entry)
    print(line, flush=True)
    with log.open("a") as file:
        file.write(line + "\n")
