"""A merge from its files: what is measured in memory is what anybody gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tarsia.adapter import load, open_base, put, save
from tarsia.labs.experiment import PLACE
from tarsia.labs.merging import Merging, Tuned
from tarsia.labs.merging_tasks import SEEDS, TASKS
from tarsia.labs.runs import mean, score
from tarsia.merge.adapters import merge


def shipped(desk: Merging, tuned: Tuned, rights: Mapping[str, Sequence[float]]) -> float:
    """Share of held-out rows with the same verdict, 0..1, when the first seed's merge comes from a folder.

    It is made by ``merge`` at the way's best scale, saved, loaded and put into a fresh base. ``rights`` are the
    verdicts that were measured in memory.
    """
    seed, folder = SEEDS[0], desk.learners.out / "merged"
    adapters = list(desk.parents(seed).values())

    def work() -> dict[str, object]:
        made = merge(adapters, [1.0] * len(adapters), tuned.choice.taken, desk.host, scale=tuned.scale).adapter
        save(made, folder)
        host = open_base("mini-1", dtype=PLACE["precision"], device=PLACE["device"])
        put(host, load(folder), "merged")
        return {"right": {task: score(host, desk.learners.encoded(task, "held-out"))["right"] for task in TASKS}}

    told = desk.told("shipped", seed, "held-out", desk.changes(tuned.choice, seed))
    told |= {"choice": tuned.choice.name, "scale": tuned.scale}
    found = desk.learners.kept(f"seed-{seed}-shipped-{tuned.choice.name}", {"settings": told}, work)["right"]
    return mean([float(a == b) for task in TASKS for a, b in zip(rights[task], found[task], strict=True)])
