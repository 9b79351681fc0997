"""Sixty adapters and their pictures' signatures; who is chosen for a picture, by several ways, and how surely."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from tarsia.labs.routing_world import JOBS, NEAR, STRANGERS, Split, shots, strange
from tarsia.serve.route import CARD, Choice, Router

TRAIN: Final = 96
TEST: Final = 20
FAR: Final = 60
CLOSE: Final = 40
SEEDS: Final = (0, 1, 2)
Show = Callable[[str], None]
Choices = Sequence[tuple[str, Choice]]
"""Of each picture the job that it is of ("" for none), and what was chosen."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Signatures of one seed: ``trained`` [jobs, TRAIN, width], ``asked`` [jobs, TEST, width], and of each kind that no
    job has, ``far`` and ``near``, [pictures, width]."""

    trained: Tensor
    asked: Tensor
    far: Mapping[str, Tensor]
    near: Mapping[str, Tensor]


def signed(host: Host, shown: Sequence[Image.Image]) -> Tensor:
    """[pictures, width]: the signatures of pictures, each alone."""
    rows = [dict(host.processor.image_processor([picture], return_tensors="pt")) for picture in shown]
    return torch.stack([signature(host, row) for row in rows])


def seen(host: Host, seed: int, split: Split, data: Path, work: Path, show: Show) -> Seen:
    """One seed's signatures; ``split`` says on which conditions and strangers. What was computed before is read."""

    def kept(name: str, draw: Callable[[], list[Image.Image]]) -> Tensor:
        path = work / "signatures" / f"{name}-{seed}.safetensors"
        if not path.exists():
            show(f"signatures {name}, seed {seed}")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            save_file({"signatures": signed(host, draw())}, partial, {"base": host.fingerprint.weights})
            partial.replace(path)
        return load_file(path)["signatures"]

    def strangers(kinds: Sequence[str], count: int) -> dict[str, Tensor]:
        return {
            kind: kept(f"{kind}-strange-{split}", lambda kind=kind: strange(kind, split, count, data, seed))  # type: ignore[misc]
            for kind in kinds
        }

    trained, asked = (
        torch.stack([
            kept(f"{job.name}-{part}", lambda job=job, part=part, n=n: shots(job, part, n, data, seed))  # type: ignore[misc]
            for job in JOBS
        ])
        for part, n in (("train", TRAIN), (split, TEST))
    )  # fmt: skip
    return Seen(trained, asked, strangers(STRANGERS[split], FAR), strangers(NEAR[split], CLOSE))
