"""Bytes on their way to a GPU, with a pretended one: when a page is there, and what is kept before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from served_adapters import adapter, bare, logits, workshop
from torch import Tensor

from tarsia.adapter import save
from tarsia.library import Library, opening
from tarsia.serve.carriage import Carried, Laid, Mapped, in_memory, mapped
from tarsia.serve.pages import Pages, waited


class Pretended:
    """A device whose copies are there when it is told so."""

    def __init__(self) -> None:
        self.done, self.copies = True, 0

    def copy(self, whole: Tensor) -> Laid:
        self.copies += 1
        return Laid(whole.clone(), lambda: self.done)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setattr(opening, "SETTLED", -1e9)
    monkeypatch.setattr(opening, "COARSE", -1e9)
    made = Library.make(tmp_path / "library")
    for i in range(3):
        inputs = FAMILIES["llava"].batch((1, 1))
        save(adapter(workshop(), "lora", i, proven=inputs), tmp_path / f"saved-{i}")
        made.publish(tmp_path / f"saved-{i}", f"a{i}")
    return made


@pytest.fixture
def device() -> Pretended:
    return Pretended()


@pytest.fixture
def pages(library: Library, device: Pretended) -> Iterator[Pages]:
    ground = Carried(torch.device("cpu"), 1 << 20, lambda size: torch.empty(size, dtype=torch.uint8), device.copy)
    made = Pages(bare(), library, ground=ground)
    yield made
    made.close()


def test_a_page_is_there_when_its_bytes_are(pages: Pages, device: Pretended) -> None:
    device.done = False
    ticket = pages.want("a0")
    pages._fetcher.close()
    for _ in range(3):
        pages.pump()
    assert ticket.page is None and ticket.error is None and device.copies == 1
    assert pages.stats()["adapter_bytes"] > 0  # its room is taken
    device.done = True
    assert waited(pages, ticket).name == "a0"
    device.done = False
    ticket.release()


def test_who_gives_up_meanwhile_gives_the_room_back(pages: Pages, device: Pretended) -> None:
    device.done = False
    ticket = pages.want("a0")
    pages._fetcher.close()
    pages.pump()
    ticket.release()
    pages.pump()
    assert pages.stats()["adapter_bytes"] == 0 and not pages._coming


def test_another_goes_on_while_one_is_copied(pages: Pages, device: Pretended) -> None:
    tickets = [pages.want(f"a{i}") for i in range(2)]
    for ticket in tickets:
        waited(pages, ticket)
    assert device.copies == 2


def test_what_is_kept_before_it_is_read_once(
    library: Library, device: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def hold(size: int) -> Tensor:
        held.append(size)
        return torch.empty(size, dtype=torch.uint8)

    ground = Carried(torch.device("cpu"), 1 << 20, hold, device.copy)
    probe = Pages(bare(), library, ground=ground)
    bytes_ = waited(probe, probe.want("a0")).bytes
    probe.close()
    held.clear()
    ground = Carried(torch.device("cpu"), 1 << 20, hold, device.copy)
    pages = Pages(bare(), library, budget=int(1.3 * bytes_), ground=ground)
    inputs, before = FAMILIES["llava"].batch((1, 1)), []
    for turn in range(2):
        for i in range(3):
            ticket = pages.want(f"a{i}")
            page = waited(pages, ticket)
            with pages.board.alone(page):
                said = logits(pages.host, inputs)
            before.append(said)
            assert turn == 0 or torch.equal(said, before[i])
            ticket.release()
    assert len(held) == 3 and pages.stats()["adapter_evictions"] == 5 and pages.stats()["adapter_proofs"] == 3
    assert ground.pinned == sum(held)
    pages.close()


def test_pinned_memory_has_its_own_budget(tmp_path: Path) -> None:
    for name, size in (("a", 60), ("b", 60), ("c", 200)):
        (tmp_path / name).write_bytes(name.encode() * size)
    ground = Carried(torch.device("cpu"), 100, lambda size: torch.empty(size, dtype=torch.uint8), Pretended().copy)
    for name in "abc":
        whole = ground.read(name.encode(), tmp_path / name)
        assert bytes(whole.tolist()) == (tmp_path / name).read_bytes()
    assert ground.here(b"a", tmp_path) is None and ground.here(b"c", tmp_path) is None
    assert ground.here(b"b", tmp_path) is not None and ground.pinned == 60


def test_a_file_that_can_not_be_read_takes_no_room(tmp_path: Path) -> None:
    def full(size: int) -> Tensor:
        raise MemoryError

    (tmp_path / "a").write_bytes(b"12345678")
    ground = Carried(torch.device("cpu"), 100, full, Pretended().copy)
    with pytest.raises(MemoryError):
        ground.read(b"a", tmp_path / "a")
    assert ground.pinned == 0


def test_a_mapped_file_is_in_memory_once_it_was_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    whole = Mapped().read(b"", tmp_path / "a")
    assert bytes(whole.tolist()) == b"x" * 10_000
    assert in_memory(mapped(tmp_path / "a"))
    assert Mapped().here(b"", tmp_path / "a") is not None
    assert not in_memory(torch.empty(0, dtype=torch.uint8))


def test_of_others_files_nobody_says_what_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10_000)
    Mapped().read(b"", path)
    own = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    monkeypatch.setattr(os, "access", lambda *args, **options: False)
    assert Mapped().here(b"", path) is None
    monkeypatch.setattr(os, "access", lambda *args, **options: True)
    assert Mapped().here(b"", path) is not None  # what may be written is told of
    monkeypatch.setattr(os, "access", lambda *args, **options: False)
    monkeypatch.setattr(os, "geteuid", lambda: own)
    assert Mapped().here(b"", path) is not None
