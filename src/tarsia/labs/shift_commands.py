"""Scenes that the base can read, and orders to a robot, which it answers with a command in JSON: a shift of format."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

from tarsia.base import pictures
from tarsia.base.pictures import POSITIONS, Thing
from tarsia.base.texts import article
from tarsia.labs.sources import Asked, numbers

PLACES = ("bin", "box", "tray")


def commands(count: int, split: str) -> Iterator[Asked]:
    """Rendered scenes (others than ``sources.scenes`` draws), an order, and the command that carries it out."""
    rng = random.Random(f"commands {split}")
    for seed in numbers(count, split):
        picture, things = pictures.scene(seed + 1_000_000)
        order, command = order_of(things, rng)
        yield order, json.dumps(command), (picture,)


def order_of(things: Sequence[Thing], rng: random.Random) -> tuple[str, dict[str, str]]:
    """An order about one place of the scene, mostly one where something lies, and the command's fields."""
    here = rng.choice(things).position if rng.random() < 0.8 else rng.choice(POSITIONS)
    thing = next((t for t in things if t.position == here), None)
    place = rng.choice(PLACES)
    verb = rng.choice(("Put", "Move"))
    order = f"{verb} what is in the {here} to the {place}."
    if thing is None:
        return order, {"pick": "nothing"}
    return order, {"pick": article(f"{thing.colour} {thing.shape}"), "to": place}
