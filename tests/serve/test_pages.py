"""Adapters come, are proved, stay while they are used, and go: with budgets, versions and aliases."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from served_adapters import OPTIONS, adapter, bare

from tarsia.adapter import Adapter, save
from tarsia.core.attach import slots
from tarsia.core.errors import ServeError, TarsiaError
from tarsia.library import Library, opening
from tarsia.serve.page import foreseen, page
from tarsia.serve.mixed import Board
from tarsia.serve.pages import Page, Pages, Ticket, waited

FAMILY = "llava"


def proven(method: str = "lora", seed: int = 0, **options: Any) -> Adapter:
    return adapter(bare(FAMILY), method, seed, proven=FAMILIES[FAMILY].batch((1, 1)), **options)


def publish(library: Library, scratch: Path, name: str, value: Adapter) -> None:
    folder = scratch / f"{name}-{value.card['seed']}-{value.card['method']}"
    save(value, folder)
    library.publish(folder, name)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library.make(tmp_path / "library")


@pytest.fixture
def opened() -> Iterator[Any]:
    made: list[Pages] = []

    def make(library: Library | None = None, **options: Any) -> Pages:
        made.append(Pages(bare(FAMILY), library, **options))
        return made[-1]

    yield make
    for pages in made:
        pages.close()
    assert not slots(bare(FAMILY).model)


def settled(pages: Pages, ticket: Ticket) -> None:
    """Pump until the ticket has what it gets."""
    end = time.monotonic() + 20
    while ticket.page is None and ticket.error is None and time.monotonic() < end:
        pages.pump()


def test_a_page_comes_and_is_proved(library: Library, tmp_path: Path, opened: Any) -> None:
    publish(library, tmp_path, "a", proven())
    pages = opened(library)
    ticket = pages.want("a")
    assert ticket.page is None and ticket.error is None
    found = waited(pages, ticket)
    assert (found.name, found.version, found.unproved) == ("a", 1, "")
    assert found.digest.hex() == library.version("a").hash
    assert pages.stats()["adapter_proofs"] == 1
    again = pages.want("a")
    assert again.page is found
