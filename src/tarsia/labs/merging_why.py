"""Why the sum of six adapters is none of them: how large it is, and what the others do to each task's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

from tarsia.labs.merging import Changes, Merging, changed, cosine, norm
from tarsia.labs.merging_tasks import SEEDS, TASKS
from tarsia.labs.runs import mean, score
from tarsia.merge.delta import deltas

_SPLIT: Final = "validation"


def why(desk: Merging) -> Mapping[str, Any]:
    """Norms and angles of the first seed's six changes, and each task beside the other five, as JSON values.

    ``alike``: mean cosine of two changes. By task: ``others`` and ``turned``, the size of what the other five add to a
    layer's output on the task's own inputs, as a share of what its own adapter adds (median over layers), as they are
    and turned at random; ``with others`` and ``with turned``: its accuracy at scale 1 beside either, 0..1.
    """
    seed = SEEDS[0]
    own = {
        task: {path: delta.weight().float() for path, delta in deltas(adapter, desk.host).items()}
        for task, adapter in desk.parents(seed).items()
    }
    total = _sum(list(own.values()))
    told = desk.told("why", seed, _SPLIT, total)
    return desk.learners.kept(f"seed-{seed}-why", {"settings": told}, lambda: _asked(desk, own, total))


def _asked(desk: Merging, own: Mapping[str, Changes], total: Changes) -> dict[str, Any]:
    names = list(own)
    pairs = [cosine(own[a], own[b]) for i, a in enumerate(names) for b in names[:i]]
    found: dict[str, Any] = {
        "each": [norm(one) for one in own.values()],
        "sum": norm(total),
        "alike": mean(pairs),
        "tasks": {task: _task(desk, task, own) for task in TASKS},
    }
    return found


def _task(desk: Merging, task: str, own: Mapping[str, Changes]) -> dict[str, float]:
    strangers = [one for name, one in own.items() if name != task]
    others = _sum(strangers)
    around = _sum([turned(one, number) for number, one in enumerate(strangers)])
    batches = desk.learners.encoded(task, _SPLIT)

    def right(beside: Changes) -> float:
        with changed(desk.host, _sum([own[task], beside]), 1.0):
            return mean(score(desk.host, batches)["right"])

    with changed(desk.host, own[task], 1.0), heard(desk.host.model, own[task], [others, around]) as shares:
        score(desk.host, batches)
    return {
        "others": median(shares[0].values()),
        "turned": median(shares[1].values()),
        "with others": right(others),
        "with turned": right(around),
    }


def _sum(changes: Sequence[Changes]) -> dict[str, Tensor]:
    paths = dict.fromkeys(path for one in changes for path in one)
    return {path: torch.stack([one[path] for one in changes if path in one]).sum(0) for path in paths}


def turned(changes: Changes, seed: int) -> dict[str, Tensor]:
    """Changes of the same singular values whose directions, of inputs and of outputs, are drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def rotation(size: int) -> Tensor:
        found: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        return found

    return {path: rotation(change.shape[0]) @ change @ rotation(change.shape[1]) for path, change in changes.items()}


@contextmanager
def heard(model: nn.Module, own: Changes, others: Sequence[Changes]) -> Iterator[list[dict[str, float]]]:
    """For each of ``others`` by site: the size of what it adds on the inputs that come inside, as a share of own's.

    Filled when the context ends; sizes are root sums of squares over all inputs.
    """
    squares = {path: torch.zeros(1 + len(others), dtype=torch.float64) for path in own}

    def listen(path: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].flatten(0, -2)
        sizes = [(x @ one[path].T).double().square().sum() for one in (own, *others)]
        squares[path] += torch.stack(sizes)

    hooks = [model.get_submodule(path).register_forward_pre_hook(partial(listen, path)) for path in own]
    shares: list[dict[str, float]] = [{} for _ in others]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()
    for path, square in squares.items():
        for share, size in zip(shares, square[1:], strict=True):
            share[path] = float((size / square[0]).sqrt())
