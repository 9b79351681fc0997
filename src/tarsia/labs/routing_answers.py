"""What is answered at the end: by the adapter that the router chooses, by one merged, by the base, by the right one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from tarsia.adapter import Adapter, Host
from tarsia.adapter.signature import signature, view
from tarsia.adapter.value import put
from tarsia.core.attach import detach
from tarsia.data import Batch
from tarsia.labs.routing_jobs import Workers
from tarsia.labs.routing_world import JOBS
from tarsia.labs.runs import mean, score
from tarsia.merge.adapters import merge
from tarsia.serve.route import CARD, Router

WAYS: Final = ("ties", "tsv")
SCALES: Final = (0.3, 1.0)
"""Every way to merge is tried at these on one trained row a job; the best is held to the others."""


@dataclass(frozen=True, slots=True)
class Answers:
    """1 or 0 for each held-out row by way; bytes of a card's ``routing``, on average; how the best merge was made."""

    right: Mapping[str, Sequence[float]]
    card: float
    merged: str


def answers(workers: Workers) -> Answers:
    """Train what is not trained yet, then answer all jobs' held-out rows in every way."""
    host = workers.host
    adapters = {job.name: workers.adapter(job) for job in JOBS}
    router = Router(view(host))
    for name, adapter in adapters.items():
        router.add(name, adapter.card)
    right: dict[str, list[float]] = {"oracle": [], "router": [], "always base": []}
    for job in JOBS:
        (batch,) = workers.encoded(job.name, "held-out")
        base = score(host, [batch])["right"]
        own = workers.stored(job)["splits"]["held-out"]["right"]
        right["oracle"] += own
        right["always base"] += base
        for row, chosen in enumerate(_chosen(router, host, batch)):
            if chosen is None:
                right["router"].append(base[row])
            elif chosen == job.name:
                right["router"].append(own[row])
            else:
                with _acting(host, adapters[chosen]):
                    right["router"].append(score(host, [batch])["right"][row])
    right["one merged adapter"], made = _merged(workers, list(adapters.values()))
    cards = [float(len(json.dumps(adapter.card[CARD]))) for adapter in adapters.values()]
    return Answers(right, mean(cards), made)


def _chosen(router: Router, host: Host, batch: Batch) -> Iterator[str | None]:
    """Whom the router gives each row's picture."""
    for picture in batch.inputs["pixel_values"].split(1):
        yield router.choose([signature(host, {"pixel_values": picture})]).name


def _merged(workers: Workers, adapters: Sequence[Adapter]) -> tuple[list[float], str]:
    host, found = workers.host, []
    for way in WAYS:
        for scale in SCALES:
            made = merge(adapters, [1.0] * len(adapters), way, host, scale=scale).adapter
            with _acting(host, made):
                tried = mean(score(host, [workers.first(job) for job in JOBS])["right"])
            found.append((tried, way, scale, made))
    _, way, scale, made = max(found, key=lambda one: one[0])
    with _acting(host, made):
        held = [batch for job in JOBS for batch in workers.encoded(job.name, "held-out")]
        return score(host, held)["right"], f"{way} at scale {scale:g}"


@contextmanager
def _acting(host: Host, adapter: Adapter) -> Iterator[None]:
    put(host, adapter, "chosen")
    try:
        yield
    finally:
        detach(host.model, "chosen")
