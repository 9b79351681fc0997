"""Adapters come, are proved, stay while they are used, and go: with budgets, versions and aliases."""

from __future__ import annotations

import gc
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from served_adapters import OPTIONS, adapter, bare, logits, workshop

from tarsia.adapter import Adapter, load, save
from tarsia.adapter.value import Patched
from tarsia.core.attach import slots
from tarsia.core.errors import AdapterError, ServeError
from tarsia.library import Library, opening
from tarsia.serve.forms import tensors
from tarsia.serve.page import Page
from tarsia.serve.pages import Pages, Ticket, waited

FAMILY = "llava"


@cache
def proven(method: str = "lora", seed: int = 0) -> Adapter:
    return adapter(workshop(FAMILY), method, seed, proven=FAMILIES[FAMILY].batch((1, 1)))


class Shop:
    """A library of small adapters and the pages that are made of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.library, self.made = root, Library.make(root / "library"), list[Pages]()
        self.count = 0

    def publish(self, name: str, value: Adapter) -> str:
        self.count += 1
        folder = self.root / f"saved-{self.count}"
        save(value, folder)
        return self.library.publish(folder, name).version.hash

    def pages(self, **options: Any) -> Pages:
        self.made.append(Pages(bare(FAMILY), self.library, **options))
        return self.made[-1]

    def object(self, digest: str) -> Path:
        return self.library.places.object(digest)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    yield made
    for pages in made.made:
        pages.close()
    assert not slots(bare(FAMILY).model)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files need not lie still for a while before what was read of them is remembered."""
    monkeypatch.setattr(opening, "SETTLED", -1e9)
    monkeypatch.setattr(opening, "COARSE", -1e9)
    monkeypatch.setattr("tarsia.serve.arrivals.SETTLED", -1e9)


def ended(pages: Pages, ticket: Ticket) -> Ticket:
    """Pump until the ticket has its page or its refusal."""
    end = time.monotonic() + 30
    while ticket.page is None and ticket.error is None and time.monotonic() < end:
        pages.pump()
    return ticket


def idle(pages: Pages) -> None:
    """Let the thread do all that it was asked, and take that in."""
    pages._fetcher.close()
    for _ in range(len(pages._coming) + 1):
        pages.pump()


def said(pages: Pages, page: Page) -> torch.Tensor:
    with pages.board.alone(page):
        return logits(pages.host, FAMILIES[FAMILY].batch((1, 1)))


def budget_of(shop: Shop, name: str, count: float) -> int:
    """Bytes of so many pages like this one."""
    pages = Pages(bare(FAMILY), shop.library)
    try:
        return int(waited(pages, pages.want(name)).bytes * count)
    finally:
        pages.close()


def test_a_page_comes_and_is_proved(shop: Shop) -> None:
    digest = shop.publish("a", proven())
    pages = shop.pages()
    ticket = pages.want("a")
    assert ticket.page is None and ticket.error is None
    found = waited(pages, ticket)
    assert (found.name, found.version, found.unproved, found.digest.hex()) == ("a", 1, "", digest)
    assert pages.stats()["adapter_proofs"] == 1
    assert pages.want("a").page is found
    assert [(m.name, m.version, m.hash, m.resident) for m in pages.models()] == [("a", 1, digest, True)]


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_takes_no_more_than_was_foreseen(shop: Shop, method: str) -> None:
    value = proven(method)
    shop.publish("a", value)
    pages = shop.pages()
    found = waited(pages, pages.want("a"))  # putting a page into less room than it takes raises
    assert found.bytes <= pages._tier.budget and pages.stats()["adapter_bytes"] == found.bytes
    assert not found.unproved
    again = waited(pages, pages.want("a"))
    assert again is found


@pytest.mark.parametrize("name", ["nobody", "a@2", "a@nowhere", "../a", "/etc/passwd", "a/../../b", "", "a#ffff", "A"])
def test_an_unknown_adapter_is_an_error(shop: Shop, name: str) -> None:
    shop.publish("a", proven())
    with pytest.raises(ServeError) as caught:
        shop.pages().want(name)
    assert caught.value.kind == "unknown_adapter"


def test_without_a_library_nothing_is_known() -> None:
    pages = Pages(bare(FAMILY))
    with pytest.raises(ServeError, match="no such adapter"):
        pages.want("a")
    pages.close()


def test_what_is_unproved_is_refused_or_said(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.publish("a", adapter(workshop(FAMILY), "lora"))
    strict, loose = shop.pages(), None
    error = ended(strict, strict.want("a")).error
    assert isinstance(error, ServeError) and error.kind == "refused" and "no probe" in str(error)
    strict.close()
    loose = shop.pages(unproved="allow")
    assert waited(loose, loose.want("a")).unproved == "it has no probe"
    assert loose.unproved_pages() == {"a": "it has no probe"}
    shop.publish("b", proven())
    waited(loose, loose.want("b"))
    assert {model.name: model.unproved for model in loose.models()} == {"a": "it has no probe", "b": None}
    (told,) = [record.facts for record in caplog.records if "nothing proves" in record.getMessage()]
    assert (told["adapter"], told["version"], told["why"]) == ("a", 1, "it has no probe")


def changed(value: Adapter, by: float) -> Adapter:
    """The same with one tensor moved, and the outputs of before on its card."""
    path, patched = next((p, held) for p, held in value.patches.items() if "language" in p)
    moved = {k: t + by * t.abs().max() for k, t in patched.tensors.items()}
    return replace(value, patches={**value.patches, path: Patched(patched.method, patched.constants, moved)})


def test_other_outputs_than_it_had_are_refused_once_and_for_all(shop: Shop) -> None:
    shop.publish("a", changed(proven(), 0.5))
    pages = shop.pages()
    error = ended(pages, pages.want("a")).error
    assert isinstance(error, AdapterError) and "not those of the day" in str(error)
    assert pages.want("a").error is error
    assert pages.stats()["adapter_refusals"] == 1 and pages.stats()["adapter_bytes"] == 0


def test_another_bases_adapter_is_refused(shop: Shop) -> None:
    value = proven()
    assert value.fingerprint is not None
    foreign = replace(value, fingerprint=replace(value.fingerprint, weights="memory:" + "0" * 64))
    shop.publish("a", foreign)
    pages = shop.pages()
    assert "another base" in str(ended(pages, pages.want("a")).error).lower() or isinstance(
        pages.want("a").error, AdapterError
    )


def test_an_adapter_without_patches_is_refused(shop: Shop) -> None:
    value = proven()
    elsewhere = {path.replace("layers.0.", "layers.7."): patched for path, patched in value.patches.items()}
    folder = shop.root / "elsewhere"
    save(value, folder)
    pages = shop.pages()
    pages.alias("b", str(folder))
    ticket = pages.want("b")
    coming = pages._coming[ticket.version]
    pages._fetcher.close()
    ((_, found),) = pages._fetcher.taken()
    coming.found = replace(found, adapter=replace(found.adapter, patches=elsewhere))
    pages.pump()
    assert "no place for" in str(ticket.error)
    empty = pages.want("b")
    assert empty.error is ticket.error


def test_a_replaced_version_stays_with_who_has_it(shop: Shop, at_once: None) -> None:
    shop.publish("a", proven(seed=0))
    pages = shop.pages()
    first = pages.want("a")
    old = waited(pages, first)
    before = said(pages, old)
    shop.publish("a", proven(seed=1))
    second = pages.want("a")
    new = waited(pages, second)
    assert (old.version, new.version) == (1, 2) and first.page is old
    assert torch.equal(said(pages, old), before)
    assert (said(pages, new) - before).abs().max() > 0.1
    assert waited(pages, pages.want("a@1")) is old
    shop.library.rollback("a")
    assert waited(pages, pages.want("a")) is old


def test_a_withdrawn_version_is_unknown(shop: Shop) -> None:
    shop.publish("a", proven(seed=0))
    pages = shop.pages()
    ticket = pages.want("a")
    page = waited(pages, ticket)
    shop.publish("a", proven(seed=1))
    shop.library.retire("a", 1)
    with pytest.raises(ServeError) as caught:
        pages.want("a@1")
    assert caught.value.kind == "unknown_adapter"
    assert ticket.page is page and said(pages, page) is not None


def test_the_least_recently_used_goes_and_the_pinned_stays(shop: Shop) -> None:
    for i in range(4):
        shop.publish(f"a{i}", proven(seed=i))
    pages = shop.pages(budget=budget_of(shop, "a0", 2.5))
    kept = pages.want("a0")
    page = waited(pages, kept)
    other = pages.want("a1")
    waited(pages, other)
    full = pages.want("a2")
    idle(pages)
    assert full.page is None and full.error is None  # all is pinned: it waits
    assert pages.stats()["adapter_bytes"] <= pages._tier.budget
    other.release()
    other.release()
    assert waited(pages, full).name == "a2"
    assert pages.stats()["adapter_evictions"] == 1 and kept.page is page
    full.release()
    last = pages.want("a3")
    waited(pages, last)
    assert {m.name for m in pages.models() if m.resident} == {"a0", "a3"}
    assert pages.want("a0").page is page


def test_what_is_larger_than_all_is_refused(shop: Shop) -> None:
    shop.publish("a", proven())
    pages = shop.pages(budget=budget_of(shop, "a", 0.5))
    error = ended(pages, pages.want("a")).error
    assert isinstance(error, ServeError) and "larger than all" in str(error)


def test_who_waits_first_is_served_first(shop: Shop) -> None:
    for i in range(3):
        shop.publish(f"a{i}", proven(seed=i))
    pages = shop.pages(budget=budget_of(shop, "a0", 1.5))
    first = pages.want("a0")
    waited(pages, first)
    second, third = pages.want("a1"), pages.want("a2")
    idle(pages)
    first.release()
    idle(pages)
    assert second.page is not None and third.page is None
    second.release()
    idle(pages)
    assert third.page is not None


def test_nobody_waits_any_more(shop: Shop) -> None:
    shop.publish("a", proven())
    pages = shop.pages()
    ticket = pages.want("a")
    ticket.release()
    idle(pages)
    assert ticket.page is None and pages.stats()["adapters_resident"] == 0 and not pages._coming


def test_what_was_proved_comes_back_without_a_proof_and_is_the_same(shop: Shop, at_once: None) -> None:
    for i in range(2):
        shop.publish(f"a{i}", proven(seed=i))
    shop.publish("d", proven("dora", seed=2))
    pages = shop.pages(budget=budget_of(shop, "d", 1.2))
    names, before = ("a0", "a1", "d"), {}
    for name in names:
        ticket = pages.want(name)
        before[name] = said(pages, waited(pages, ticket))
        ticket.release()
    proofs = pages.stats()["adapter_proofs"]
    assert proofs == 3 and len(pages._moulds) == 3
    for name in (*names, *names):
        ticket = pages.want(name)
        assert torch.equal(said(pages, waited(pages, ticket)), before[name])
        ticket.release()
    assert pages.stats()["adapter_proofs"] == proofs and pages.stats()["adapter_loads"] == 9


def test_alike_pages_share_their_mould(shop: Shop, at_once: None) -> None:
    for i in range(3):
        shop.publish(f"a{i}", proven(seed=i))
    pages = shop.pages()
    for i in range(3):
        waited(pages, pages.want(f"a{i}"))
    assert len(pages._moulds) == 3 and len(pages._moulds._shared) == 1


def test_files_that_changed_are_looked_at_again(shop: Shop, at_once: None, caplog: pytest.LogCaptureFixture) -> None:
    digest, other = shop.publish("a", proven()), shop.publish("b", proven(seed=1))
    pages = shop.pages(budget=budget_of(shop, "a", 1.2))
    ticket = pages.want("a")
    waited(pages, ticket)
    ticket.release()
    evicting = pages.want("b")
    waited(pages, evicting)
    evicting.release()
    file, foreign = (shop.object(d) / "adapter_model.safetensors" for d in (digest, other))
    file.parent.chmod(0o755)
    file.chmod(0o644)
    file.write_bytes(foreign.read_bytes())
    error = ended(pages, pages.want("a")).error
    assert isinstance(error, ServeError) and error.kind == "damaged"
    assert str(shop.root) not in str(error) and file.name not in str(error)
    (told,) = [record.facts for record in caplog.records if "can not be read" in record.getMessage()]
    assert (told["adapter"], told["version"], told["hash"]) == ("a", 1, digest)
    assert "not those that were published" in told["why"] and file.name in told["why"]
    shop.publish("a", load(shop.root / "saved-1"))  # puts the files right
    assert waited(pages, pages.want("a")).name == "a"


def test_files_that_change_between_the_check_and_the_reading_are_refused(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, other = shop.publish("a", proven()), shop.publish("b", proven(seed=1))
    pages = shop.pages()
    file, foreign = (shop.object(d) / "adapter_model.safetensors" for d in (digest, other))
    file.parent.chmod(0o755)
    whole, real = file.read_bytes(), pages._ground.read

    def swapped(digest: bytes, path: Path) -> torch.Tensor:
        file.unlink()
        file.write_bytes(foreign.read_bytes())
        return real(digest, path)

    with monkeypatch.context() as between:
        between.setattr(pages._ground, "read", swapped)
        error = ended(pages, pages.want("a")).error
    assert isinstance(error, ServeError) and "changed while they were read" in str(error)
    file.write_bytes(whole)
    assert waited(pages, pages.want("a")).name == "a"  # it is not refused once and for all


def test_a_file_that_is_gone_is_an_error(shop: Shop) -> None:
    digest = shop.publish("a", proven())
    pages = shop.pages()
    shop.object(digest).chmod(0o755)
    (shop.object(digest) / "adapter_model.safetensors").unlink()
    error = ended(pages, pages.want("a")).error
    assert isinstance(error, ServeError) and error.kind == "damaged"


def test_a_folder_that_is_no_adapter_is_refused(shop: Shop, tmp_path: Path) -> None:
    """Its path is in what was given alone, which no client is told."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "tarsia.json").write_text("{}")
    pages = shop.pages()
    error = ended(pages, pages.bring("b", str(tmp_path / "x"))).error
    assert isinstance(error, ServeError) and error.kind == "refused" and str(tmp_path) not in error.what


def test_memory_stays_flat(shop: Shop, at_once: None) -> None:
    for i in range(4):
        shop.publish(f"a{i}", proven(seed=i))
    pages = shop.pages(budget=budget_of(shop, "a0", 2.2))
    seen: list[weakref.ref[Page]] = []

    def turn(count: int) -> tuple[int, int]:
        for i in range(count):
            ticket = pages.want(f"a{i % 4}")
            page = waited(pages, ticket)
            with pages.board.lying([page, None], [1, 1]):
                assert pages.board.here is not None
            seen.append(weakref.ref(page))
            ticket.release()
            del page, ticket
        gc.collect()
        mappings = Path("/proc/self/maps").read_text().count(str(shop.library.places.objects))
        return mappings, sum(type(one) is torch.Tensor for one in gc.get_objects())

    first = turn(8)
    assert turn(300) == first
    assert sum(ref() is not None for ref in seen) <= 2


def test_an_alias_of_a_reference_follows_it(shop: Shop, at_once: None) -> None:
    shop.publish("a", proven(seed=0))
    pages = shop.pages()
    pages.alias("mine", "a")
    page = waited(pages, pages.want("mine"))
    assert (page.name, page.version, page.source) == ("mine", 1, "a@1")
    assert waited(pages, pages.want("a")).source is None
    shop.publish("a", proven(seed=1))
    page = waited(pages, pages.want("mine"))
    assert (page.version, page.source) == (2, "a@2")
    assert {(m.name, m.source) for m in pages.models()} == {("a", None), ("mine", "a")}
    pages.drop("mine")
    with pytest.raises(ServeError, match="no such adapter"):
        pages.want("mine")
    with pytest.raises(ServeError, match="was loaded"):
        pages.drop("mine")


def test_what_is_brought_changes_no_name_until_it_is_one(shop: Shop, at_once: None) -> None:
    shop.publish("a", proven(seed=0))
    shop.publish("b", proven(seed=1))
    pages = shop.pages()
    pages.alias("mine", "a")
    ticket = pages.bring("mine", "b")
    page = waited(pages, ticket)
    assert pages.resolve("mine").source == "a"
    pages.alias("mine", "b")
    assert waited(pages, pages.want("mine")) is page
    for name, source in (("a", "b"), ("mine", "nobody")):
        with pytest.raises(ServeError):
            pages.bring(name, source)
    assert pages.resolve("mine").source == "b"


def test_what_is_published_later_ends_an_alias_of_its_name(
    shop: Shop, at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    shop.publish("a", proven(seed=0))
    pages = shop.pages()
    pages.alias("mine", "a")
    assert pages.resolve("mine").source == "a" and pages.resolve("mine").source == "a"
    shop.publish("mine", proven(seed=1))
    assert pages.resolve("mine").source is None
    assert pages.resolve("mine").digest != pages.resolve("a").digest
    assert "served now" in caplog.text and not pages.shelf.aliases
    assert [model.source for model in pages.models()] == [None, None]


def test_an_alias_takes_nobody_elses_name(shop: Shop) -> None:
    shop.publish("a", proven())
    shop.publish("b", proven())
    pages = shop.pages()
    with pytest.raises(ServeError, match="has an adapter of this name"):
        pages.alias("a", "b")
    with pytest.raises(ServeError, match="no such adapter"):
        pages.alias("c", "nobody")
    with pytest.raises(ServeError, match="no such adapter"):
        pages.want("c")


def test_a_folder_is_served_until_it_changes(shop: Shop) -> None:
    folder = shop.root / "mine"
    save(proven(seed=0), folder)
    pages = shop.pages()
    pages.alias("mine", str(folder))
    ticket = pages.want("mine")
    old = waited(pages, ticket)
    before = said(pages, old)
    shutil.rmtree(folder)
    save(proven(seed=1), folder)
    new = waited(pages, pages.want("mine"))
    assert new is not old and new.digest != old.digest
    assert torch.equal(said(pages, old), before) and not torch.equal(said(pages, new), before)
    shutil.rmtree(folder)
    with pytest.raises(ServeError, match="no such adapter"):
        pages.want("mine")
    with pytest.raises(ServeError, match="no such adapter"):
        pages.alias("other", str(folder))


def test_a_folder_of_pefts_is_served_where_unproved_adapters_are(shop: Shop) -> None:
    folder = shop.root / "theirs"
    save(proven(), folder)
    for name in ("tarsia.json", "probe.safetensors"):
        (folder / name).unlink()
    strict = shop.pages()
    strict.alias("theirs", str(folder))
    assert "no probe" in str(ended(strict, strict.want("theirs")).error)
    strict.close()
    loose = shop.pages(unproved="allow")
    loose.alias("theirs", str(folder))
    page = waited(loose, loose.want("theirs"))
    found = said(loose, page)
    shop.publish("ours", proven())
    assert page.unproved and torch.equal(said(loose, waited(loose, loose.want("ours"))), found)


def test_every_tensor_of_a_file_ends_in_a_form(shop: Shop) -> None:
    computed = {"pissa", "vera", "dora", "oft"}
    for method in OPTIONS:
        value = proven(method)
        pages = shop.pages()
        folder = shop.root / method
        save(value, folder)
        pages.alias("it", str(folder))
        page = waited(pages, pages.want("it"))
        held = {tuple(t.flatten().tolist()) for form in page.forms.values() for t in tensors(form)}
        lost = [
            f"{path}.{name}"
            for path, patched in value.patches.items()
            for name, t in patched.tensors.items()
            if tuple(t.flatten().tolist()) not in held
        ]
        assert (not lost) or method in computed, lost
        pages.close()


def test_the_thread_says_what_it_could_not_foresee(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.publish("a", proven())
    pages = shop.pages()
    monkeypatch.setattr("tarsia.serve.pages.fetch", lambda *args: 1 / 0)
    error = ended(pages, pages.want("a")).error
    assert isinstance(error, ServeError) and error.kind == "internal"


def test_index_files_that_are_as_they_were_are_not_read_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.publish("a", proven())
    pages = shop.pages()
    asked: list[str] = []
    real = Library.version
    monkeypatch.setattr(
        Library, "version", lambda self, reference: asked.append(str(reference)) or real(self, reference)
    )
    for path in shop.library.places.root.iterdir():
        if path.is_file():
            os.utime(path, (1, 1))
    pages.resolve("a")
    count = len(asked)
    pages.resolve("a")
    assert count >= 1 and len(asked) <= count + 1  # reading may touch the write-ahead log's file once
    pages.resolve("a")
    assert len(asked) <= count + 1
    shop.publish("a", proven(seed=3))
    assert pages.resolve("a").number == 2
