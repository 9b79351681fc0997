"""AdamW over patches: a rate for each part, or a multiple of it; warm-up and decay for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from tarsia.train.paged import Form, PagedAdamW

Decay = Literal["cosine", "linear", "constant"]
_EVEN: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate as a share of its peak: linear warm-up over ``warmup`` of ``steps``, then ``decay`` to 0."""

    steps: int
    warmup: int
    decay: Decay

    def share(self, step: int) -> float:
        """Share of the peak for the step with index ``step`` (from 0), 0..1. The first step's is above 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def adamw(
    parts: Sequence[Mapping[str, nn.Parameter]],
    rates: Sequence[float],
    betas: tuple[float, float],
    weight_decay: float,
    paces: Mapping[str, float] = _EVEN,
    form: Form | None = None,
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101, algorithm 2) over the named tensors of each part.

    Matrices decay; vectors (biases, norms, scales) do not. ``paces`` says how many times its part's rate a tensor
    learns at, where that is not 1. A group knows its part's index, the part's peak rate and its pace. ``form`` is that
    of the states, where they are in 8 bits or can leave the device's memory.
    """
    groups = []
    for index, (tensors, rate) in enumerate(zip(parts, rates, strict=True)):
        kinds: dict[tuple[float, bool], dict[str, nn.Parameter]] = {}
        for name, parameter in tensors.items():
            kinds.setdefault((paces.get(name, 1.0), parameter.ndim > 1), {})[name] = parameter
        for (pace, decayed), members in sorted(kinds.items(), key=lambda kind: (kind[0][0], not kind[0][1])):
            groups.append(
                {
                    "params": list(members.values()),
                    "names": list(members),
                    "part": index,
                    "peak": rate,
                    "pace": pace,
                    "lr": rate * pace,
                    "weight_decay": weight_decay if decayed else 0.0,
                }
            )
    if form is not None and (form.paged or form.bits != 32):
        return PagedAdamW(groups, betas, form)
    # one pass over all tensors in place of ten for each; on a GPU the same option keeps its counts elsewhere
    on_cpu = all(p.device.type == "cpu" for tensors in parts for p in tensors.values())
    return torch.optim.AdamW(groups, betas=betas, fused=True if on_cpu else None)


def set_rates(optimiser: torch.optim.Optimizer, share: float) -> tuple[float, ...]:
    """Set every group to ``share`` of its peak. Returns the rates by part, those of tensors at pace 1."""
    rates: dict[int, float] = {}
    for group in optimiser.param_groups:
        rates[group["part"]] = group["peak"] * share
        group["lr"] = rates[group["part"]] * group["pace"]
    return tuple(rates[part] for part in sorted(rates))


def peaks(optimiser: torch.optim.Optimizer) -> tuple[dict[str, tuple[float, ...]], ...]:
    """For each part the peak rates of its tensors, by what the method calls them, ascending."""
    found: dict[int, dict[str, set[float]]] = {}
    for group in optimiser.param_groups:
        for name in group["names"]:
            part = found.setdefault(group["part"], {})
            part.setdefault(name.rpartition("/")[2], set()).add(group["peak"] * group["pace"])
    return tuple({name: tuple(sorted(held)) for name, held in sorted(found[part].items())} for part in sorted(found))


def state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the optimiser's state, by ``{parameter}/{name}``."""
    if isinstance(optimiser, PagedAdamW):
        return optimiser.stored()
    found = {}
    for group in optimiser.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimiser.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = torch.as_tensor(value)
    return found


def restore(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``state`` gave. Raises KeyError for a tensor that belongs to no parameter."""
    if isinstance(optimiser, PagedAdamW):
        optimiser.adopt(tensors)
        return
    members = {
        name: parameter
        for group in optimiser.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        # AdamW counts its steps in a tensor that stays on the CPU
        place = value.device if key == "step" else members[name].device
        optimiser.state[members[name]][key] = value.to(place)
