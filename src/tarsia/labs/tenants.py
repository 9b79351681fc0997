"""One mini-1 and many drawn adapters: a library of them, and an engine that serves it in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tarsia.adapter import Host, open_base, put
from tarsia.core.attach import Part, activate, detach
from tarsia.core.method import find
from tarsia.library import Library
from tarsia.library.opening import open_adapter
from tarsia.serve.engine import Engine, Limits
from tarsia.serve.load import drawn, inside
from tarsia.serve.pages import Pages

QUESTION: Final = "What is shown?"
BESIDE: Final = 1 << 16
"""Bytes of a page besides its numbers, at most."""


def host() -> Host:
    """mini-1 in float32."""
    return open_base("mini-1", dtype="float32", device="cpu")


def lora(select: str, by: float, rank: int = 4) -> drawn.Make:
    """A LoRA, as it is drawn."""
    return drawn.Make((Part("lora", select, find("lora").configure({"rank": rank, "alpha": 2.0 * rank})),), by)


def library(
    at: Path,
    base: Host,
    wanted: Sequence[tuple[str, drawn.Make, int]],
    show: Callable[[int], None] = lambda number: None,
) -> Library:
    """The library at this place with these adapters (name, what it is drawn as, its number), made if not there yet."""
    found = Library.make(at)
    there = {version.name for version in found.search()}
    missing = [one for one in wanted if one[0] not in there]
    if missing:
        written, pictures = inside.shown(base, inside.Text(QUESTION, 0))
        row = base.processor(text=[written], images=pictures, return_tensors="pt")
        for i, _ in enumerate(drawn.publish(drawn.Drawer(base, row), found, missing)):
            show(i)
    return found


def engine(held: Library, pool: int, rows: int = 32) -> Engine:
    """An engine on a base of its own, whose pages hold so many adapters as large as the library's largest."""
    own = host()
    largest = max(version.numbers for version in held.search())
    pages = Pages(own, held, budget=pool * (4 * largest + BESIDE))
    return Engine(own, pages, Limits(cache_bytes=256 << 20, rows=rows))


def alone(plain: Host, held: Library, name: str, asked: Sequence[inside.Text], tokens: int) -> list[tuple[int, ...]]:
    """What Transformers' own ``generate`` says with this adapter attached, one question at a time."""
    activate(plain.model)
    put(plain, open_adapter(held, name), name)
    try:
        return [inside.plainly(plain, [one], tokens).ids[0] for one in asked]
    finally:
        detach(plain.model, name)
