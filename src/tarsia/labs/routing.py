"""Sixty adapters and their pictures' signatures; who is chosen for a picture, by several ways, and how surely."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tarsia.adapter import Host
from tarsia.adapter.prototypes import Look
from tarsia.adapter.signature import signature, view
from tarsia.labs.routing_world import JOBS, NEAR, STRANGERS, Job, Split, shots, strange
from tarsia.serve.route import CARD, STRANGE, UNSURE, Choice, Router

DRAW: Final = 96
TRAIN: Final = 2 * DRAW
"""A seed's trained pictures are two of the seeds' draws; those that are asked are its own."""
TEST: Final = 20
FAR: Final = 60
CLOSE: Final = 40
SEEDS: Final = (0, 1, 2)
DECAY: Final = 1e-3
"""Of the logistic regression's weights; chosen, as all else, on the conditions that are for choosing."""
BINS: Final = (0.0, 0.5, 0.7, 0.9, 0.99, 0.999, 1.01)
Show = Callable[[str], None]
Choices = Sequence[tuple[str, Choice]]
"""Of each picture the job that it is of ("" for none), and what was chosen."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Signatures of one seed: ``trained`` [jobs, TRAIN, width], ``asked`` [jobs, TEST, width], and of each kind that no
    job has, by group ("held-out", "first look", "near"), [pictures, width]."""

    trained: Tensor
    asked: Tensor
    strange: Mapping[str, Mapping[str, Tensor]]


def signed(host: Host, shown: Sequence[Image.Image]) -> Tensor:
    """[pictures, width]: the signatures of pictures, each alone."""
    rows = [dict(host.processor.image_processor([picture], return_tensors="pt")) for picture in shown]
    return torch.stack([signature(host, row) for row in rows])


def seen(host: Host, seed: int, data: Path, work: Path, show: Show) -> Seen:
    """One seed's signatures, in held-out conditions. What was computed before is read."""

    def kept(name: str, draw: Callable[[int], list[Image.Image]], seed: int = seed) -> Tensor:
        path = work / "signatures" / f"{name}-{seed}.safetensors"
        if not path.exists():
            show(f"signatures {name}, seed {seed}")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            save_file({"signatures": signed(host, draw(seed))}, partial, {"base": host.fingerprint.weights})
            partial.replace(path)
        return load_file(path)["signatures"]

    def of(job: Job, split: Split, count: int, seed: int = seed) -> Tensor:
        return kept(f"{job.name}-{split}", lambda seed: shots(job, split, count, data, seed), seed)

    def strangers(kind: str, count: int) -> Tensor:
        return kept(f"{kind}-strange-held-out", lambda seed: strange(kind, "held-out", count, data, seed))

    draws = (seed, SEEDS[(SEEDS.index(seed) + 1) % len(SEEDS)])
    groups = {name: (STRANGERS[name], FAR) for name in ("held-out", "first look")} | {"near": (NEAR["held-out"], CLOSE)}
    return Seen(
        torch.stack([torch.cat([of(job, "train", DRAW, draw) for draw in draws]) for job in JOBS]),
        torch.stack([of(job, "held-out", TEST) for job in JOBS]),
        {name: {kind: strangers(kind, count) for kind in kinds} for name, (kinds, count) in groups.items()},
    )


def routed(host: Host, trained: Tensor) -> Router:
    """A router over cards, as JSON holds them, of the jobs' pictures [jobs, pictures, width]."""
    router = Router(view(host))
    for job, rows in zip(JOBS, trained, strict=True):
        router.add(job.name, {CARD: Look.of(view(host), rows).plain()})
    router.settle()
    return router


@dataclass(frozen=True, eq=False)
class Asked:
    """What ways did with one seed's pictures: of each known picture whether it was ``right`` and whether the base was
    asked (``open``), by way; of each of a kind that no job has whether the base was asked."""

    right: Mapping[str, Sequence[float]]
    open: Mapping[str, Sequence[float]]
    strange: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
    choices: Choices


def ask(router: Router, held: Seen) -> Asked:
    """Every way on the same pictures. A way that gives scores leaves open what scores below all but STRANGE of the
    pictures that it was made from."""
    names = [job.name for job in JOBS]
    choices = [(name, router.choose([row])) for name, rows in zip(names, held.asked, strict=True) for row in rows]
    right = {"router": [float(choice.name == name) for name, choice in choices]}
    left = {"router": [float(choice.name is None) for _, choice in choices]}

    def given(leaves: Callable[[Tensor], list[float]]) -> dict[str, dict[str, list[float]]]:
        return {group: {kind: leaves(rows) for kind, rows in kinds.items()} for group, kinds in held.strange.items()}

    found = {"router": given(lambda rows: [float(router.choose([row]).name is None) for row in rows])}
    owners = torch.arange(len(JOBS))[:, None].expand(len(JOBS), held.asked.shape[1]).flatten()
    for way, scores in {
        "nearest centroid": centroids(held.trained),
        "logistic regression": logistic(held.trained),
    }.items():
        floor = scores(held.trained.flatten(0, 1)).max(1).values.quantile(router.strange)
        best, chosen = scores(held.asked.flatten(0, 1)).max(1)
        right[way] = ((chosen == owners) & (best >= floor)).float().tolist()
        left[way] = (best < floor).float().tolist()
        right[f"{way}, never open"] = (chosen == owners).float().tolist()
        left[f"{way}, never open"] = [0.0] * len(owners)
        found[way] = given(
            lambda rows, scores=scores, floor=floor: (scores(rows).max(1).values < floor).float().tolist()  # type: ignore[misc]
        )
    right["router, never open"] = [float(choice.nearest == name) for name, choice in choices]
    left["router, never open"] = [0.0] * len(owners)
    groups = {group: {way: found[way][group] for way in found} for group in held.strange}
    return Asked(right, left, groups, choices)


def centroids(trained: Tensor) -> Callable[[Tensor], Tensor]:
    """Scores [pictures, jobs]: minus the distance to the mean of each job's signatures [jobs, pictures, width]."""
    middles = trained.mean(1)
    return lambda rows: -torch.cdist(rows, middles)


def logistic(trained: Tensor, decay: float = DECAY, rounds: int = 40) -> Callable[[Tensor], Tensor]:
    """Scores [pictures, jobs]: log-probabilities of multinomial logistic regression on standardised numbers, L-BFGS."""
    rows = trained.flatten(0, 1)
    owners = torch.arange(len(trained))[:, None].expand(trained.shape[:2]).flatten()
    middle, scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
    weights = torch.zeros(rows.shape[1] + 1, len(trained), requires_grad=True)

    def told(given: Tensor) -> Tensor:
        return F.log_softmax((given - middle) / scale @ weights[:-1] + weights[-1], 1)

    optimiser = torch.optim.LBFGS([weights], max_iter=rounds, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.nll_loss(told(rows), owners) + decay * weights[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    weights.requires_grad_(False)
    return told


def reliability(choices: Choices, bins: Sequence[float] = BINS) -> list[tuple[float, float, int]]:
    """By bins of confidence: the mean that was said, the share that was right, and how many pictures there are."""
    found = []
    for low, high in pairwise(bins):
        inside = [(c.confidence, float(c.nearest == name)) for name, c in choices if low <= c.confidence < high]
        if inside:
            said, right = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            found.append((said, right, len(inside)))
    return found


def risk(choices: Choices) -> list[tuple[float, float]]:
    """Share answered and share of these that is wrong, as the most typical and surest pictures are answered first."""
    order = sorted(choices, key=lambda pair: -min(pair[1].typical / STRANGE, pair[1].confidence / UNSURE))
    wrong, found = 0, []
    for count, (name, choice) in enumerate(order, 1):
        wrong += choice.nearest != name
        found.append((count / len(order), wrong / count))
    return found
