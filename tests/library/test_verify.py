"""Faults are found, each with its file; what can be made anew is."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.made import adapter
from tarsia.core.errors import LibraryError
from tarsia.library import Library, content, index, record
from tarsia.library.journal import Entry
from tarsia.library.places import Places
from tarsia.library.record import Version
from tarsia.library.repair import repair
from tarsia.library.sweep import sweep
from tarsia.library.verify import verify


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """cats@1 (stable), cats@2, cats@3 (current after a rollback is 2), dogs@1; cats@3 was retired."""
    made = Library.make(tmp_path / "library")
    for seed, name in ((1, "cats"), (2, "cats"), (3, "cats"), (4, "dogs")):
        made.publish(adapter(tmp_path / f"made-{seed}", seed), name)
    made.tag("cats@1", "stable")
    made.rollback("cats")
    made.retire("cats", 3)
    sweep(made.places)
    return made


def spoil(path: Path, change: Callable[[bytes], bytes] | None) -> Path:
    path.parent.chmod(0o755)
    if change is None:
        path.unlink()
    else:
        path.chmod(0o644)
        path.write_bytes(change(path.read_bytes()))
    return path


def flip(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


def files(places: Places) -> list[Path]:
    """Every file of a library without an index, whose bytes all count."""
    found = [path for folder in (places.objects, places.records) for path in folder.rglob("*") if path.is_file()]
    return sorted([*found, places.journal])


def test_a_sound_library_has_no_fault(library: Library) -> None:
    found = verify(library.places)
    assert (found.faults, found.garbage, found.versions, found.objects) == ((), (), 3, 3)
    assert found.bytes == sum(version.bytes for version in library.search(every=True))


@pytest.mark.parametrize("change", [flip, lambda raw: raw[:-1], lambda raw: raw + b"\n", None])
def test_every_file_is_looked_at(library: Library, change: Callable[[bytes], bytes] | None) -> None:
    for path in files(library.places):
        if path == library.places.journal and change is not None and change(b"ab") == b"ab\n":
            continue  # what follows what the index knows is a killed writer's
        before = path.read_bytes()
        spoil(path, change)
        found = verify(library.places)
        assert [fault.file for fault in found.faults] == [path], path
        path.write_bytes(before)
    assert verify(library.places).faults == ()


def test_a_file_too_many_is_seen(library: Library) -> None:
    extra = library.folder(library.version("cats")) / "model.bin"
    extra.parent.chmod(0o755)
    extra.write_text("a pickle")
    (fault,) = verify(library.places).faults
    assert (fault.file, fault.what) == (extra, "belongs to nothing")


def test_some_versions_alone(library: Library) -> None:
    path = spoil(library.folder(library.version("dogs")) / content.CONFIG, flip)
    assert verify(library.places, ["cats"]).faults == ()
    found = verify(library.places, ["dogs", "cats@1"])
    assert ([fault.file for fault in found.faults], found.versions) == ([path], 2)
    with pytest.raises(LibraryError):
        verify(library.places, ["birds"])


def edit(library: Library, *statements: str) -> None:
    db = sqlite3.connect(library.places.index)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE tags SET number = 1 WHERE tag = 'current' AND name = 'cats'",
        "DELETE FROM tags WHERE name = 'dogs'",
        "INSERT INTO tags VALUES ('dogs', 'stable', 7)",
        "DELETE FROM versions WHERE name = 'cats' AND number = 1",
        "UPDATE versions SET note = 'another' WHERE name = 'dogs'",
        "UPDATE versions SET hash = (SELECT hash FROM versions WHERE name = 'dogs')",
        "UPDATE journal SET why = 'another' WHERE id = 2",
        "DELETE FROM journal WHERE id = 5",
        "UPDATE objects SET files = replace(files, '[', '[1')",
        "UPDATE objects SET files = '{}'",
        "DROP TABLE tags",
        "UPDATE facts SET value = value - 1",
    ],
)
def test_an_index_that_was_edited_is_seen(library: Library, statement: str) -> None:
    edit(library, statement)
    assert verify(library.places).faults != ()


def seen(library: Library) -> tuple[list[Version], list[Entry]]:
    return library.search(every=True), library.history()


@pytest.mark.parametrize(
    "change",
    [None, lambda raw: b"", lambda raw: raw[:5000], lambda raw: b"junk" + raw[4:], lambda raw: b"\xff" * len(raw)],
    ids=["lost", "empty", "cut", "no database", "overwritten"],
)
def test_an_index_is_made_anew(library: Library, change: Callable[[bytes], bytes] | None) -> None:
    before = seen(library)
    spoil(library.places.index, change)
    for act in (lambda: library.search(), lambda: library.rollback("cats"), lambda: sweep(library.places)):
        with pytest.raises(LibraryError, match=r"damaged or lost(.|\n)*--repair"):
            act()
    assert [fault.file for fault in verify(library.places).faults] == [library.places.index]
    assert repair(library.places).lost == ()
    assert seen(library) == before
    found = verify(library.places)
    assert (found.faults, found.garbage) == ((), ())


def test_pages_of_an_index_that_rot_are_seen_and_made_anew(library: Library) -> None:
    before = seen(library)
    raw = library.places.index.read_bytes()
    size = 4096
    for page in range(1, len(raw) // size):
        spoil(library.places.index, lambda _, page=page: raw[: page * size] + b"\x00" * size + raw[(page + 1) * size :])
        assert verify(library.places).faults, f"page {page} of zeros is not seen"
        assert repair(library.places).lost == ()
        assert seen(library) == before


def test_a_damaged_index_is_kept_beside(library: Library) -> None:
    spoil(library.places.index, lambda raw: b"junk" + raw)
    done = repair(library.places).done
    kept = next(library.places.root.glob("index.sqlite.before-repair-*"))
    assert kept.read_bytes().startswith(b"junkSQLite") and any(str(kept) in text for text in done)


def test_records_and_journal_are_made_anew_from_the_index(library: Library) -> None:
    before = seen(library)
    spoil(library.places.record("cats", 1), flip)
    spoil(library.places.record("dogs", 1), None)
    spoil(library.places.journal, lambda raw: raw[:100])
    with pytest.raises(LibraryError, match=r"lost its end(.|\n)*--repair"):
        library.tag("dogs", "stable")
    assert len(repair(library.places).done) == 4, "three files, and where the journal that was there is kept"
    assert verify(library.places).faults == () and seen(library) == before
    assert repair(library.places).done == ()
    library.tag("dogs", "stable")


def test_what_a_killed_writer_left_in_the_journal_is_cut_off(library: Library) -> None:
    whole = library.places.journal.read_bytes()
    with library.places.journal.open("ab") as file:
        file.write(whole[:150])
    assert verify(library.places).faults == ()
    library.tag("dogs", "stable")
    assert library.places.journal.read_bytes().startswith(whole)
    assert len(library.places.journal.read_bytes().splitlines()) == len(library.history())
    assert verify(library.places).faults == ()


def test_an_index_that_lost_commits_is_caught_up_by_the_journal(library: Library, tmp_path: Path) -> None:
    """An older copy was put back, or the -wal file removed: what was acknowledged stays done."""
    older = library.places.index.read_bytes()
    library.publish(adapter(tmp_path / "made-7", 7), "birds", tags=["stable"])
    library.publish(adapter(tmp_path / "made-8", 8), "birds")
    library.untag("birds", "stable")
    library.rollback("birds")
    library.retire("birds", 2)
    wanted = seen(library)
    library.places.index.write_bytes(older)
    assert seen(library) != wanted
    swept = sweep(library.places)
    assert seen(library) == wanted and len(swept.objects) == 1, "the retired one alone"
    assert verify(library.places).faults == ()
    library.places.index.write_bytes(older)
    library.tag("birds", "good")
    assert library.version("birds@good").number == 1 and verify(library.places).faults == ()


def test_half_a_transaction_of_the_journal_is_not_done(library: Library, tmp_path: Path) -> None:
    older, before = library.places.index.read_bytes(), seen(library)
    library.publish(adapter(tmp_path / "made-7", 7), "birds", tags=["stable"])
    lines = library.places.journal.read_bytes().splitlines(keepends=True)
    for cut in (b"".join(lines[:-1]), b"".join(lines)[:-1]):
        library.places.index.write_bytes(older)
        library.places.journal.write_bytes(cut)
        found = verify(library.places)
        assert found.faults == () and library.places.record("birds", 1) in found.garbage and seen(library) == before
    sweep(library.places)
    assert seen(library) == before and not library.places.record("birds", 1).exists()


def test_an_end_of_the_journal_whose_record_is_damaged_is_told(library: Library, tmp_path: Path) -> None:
    older, before = library.places.index.read_bytes(), seen(library)
    library.publish(adapter(tmp_path / "made-7", 7), "birds")
    library.places.index.write_bytes(older)
    path = spoil(library.places.record("birds", 1), flip)
    assert [fault.file for fault in verify(library.places).faults] == [path]
    with pytest.raises(LibraryError, match="record of a version is damaged"):
        library.rollback("cats")
    assert str(path) in repair(library.places).lost[0]
    assert seen(library) == before and verify(library.places).faults == ()


def test_a_record_that_is_lost_with_the_index_is_told_and_its_content_kept(library: Library) -> None:
    digest = library.version("cats").hash
    spoil(library.places.record("cats", 2), flip)
    spoil(library.places.index, None)
    lost = "\n".join(repair(library.places).lost)
    assert "cats/2.json" in lost and "cats@current: version 2 is not there any more" in lost
    assert library.version("cats").number == 1 and library.version("cats@stable").number == 1
    assert [fault.file for fault in verify(library.places).faults] == [library.places.record("cats", 2)]
    with pytest.raises(LibraryError, match="what is garbage can not be told"):
        sweep(library.places)
    assert library.places.object(digest).is_dir()
    library.retire("cats", 2, why="lost")
    assert sweep(library.places).objects == (digest,)
    found = verify(library.places)
    assert (found.faults, found.garbage) == ((), ())


def test_a_lost_number_is_not_given_again(library: Library, tmp_path: Path) -> None:
    spoil(library.places.record("dogs", 1), flip)
    spoil(library.places.index, None)
    repair(library.places)
    assert library.publish(adapter(tmp_path / "made-9", 9), "dogs").version.reference == "dogs@2"


def test_a_damaged_line_of_the_journal_is_told(library: Library) -> None:
    spoil(library.places.journal, lambda raw: raw.replace(b'"rollback"', b'"rollbacc"'))
    spoil(library.places.index, None)
    lost, gap, gone = repair(library.places).lost
    assert "line 6" in lost and "changed" in lost and "entry 6 is missing" in gap
    assert "cats@current: version 3 is not there any more" in gone and library.version("cats").number == 2
    assert verify(library.places).faults == ()


def test_without_a_journal_the_highest_versions_are_current(library: Library) -> None:
    spoil(library.places.index, None)
    spoil(library.places.journal, None)
    assert repair(library.places).lost != ()
    assert {v.reference for v in library.search()} == {"cats@2", "dogs@1"}
    assert verify(library.places).faults == ()


def test_a_journal_says_what_it_said(library: Library) -> None:
    lines = library.places.journal.read_text().splitlines()
    assert [Entry.parse(line) for line in lines] == list(enumerate(library.history(), 1))
    for line in lines:
        values = json.loads(line)
        with pytest.raises(ValueError, match="changed"):
            Entry.parse(json.dumps(values | {"after": 9}))


def test_a_record_says_what_the_index_says(library: Library) -> None:
    for version in library.search(every=True):
        written, held = record.read(library.places, version.name, version.number)
        with index.reading(library.places) as db:
            assert held == record.files_of(db, version.hash)
        assert content.hash_of(held) == written.hash == version.hash
    raw = library.places.record("cats", 1).read_bytes()
    library.places.record("dogs", 2).write_bytes(raw)
    with pytest.raises(LibraryError, match="record"):
        record.read(library.places, "dogs", 2)


def test_repair_waits_for_those_who_have_the_index_open(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "PATIENCE", 0.05)
    with index.reading(library.places), pytest.raises(LibraryError, match="busy"):
        repair(library.places)
    with index.held(library.places, alone=True), pytest.raises(LibraryError, match="busy"):
        library.search()


def test_two_writers_wait_for_each_other(library: Library, tmp_path: Path) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        with index.writing(library.places):
            entered.set()
            release.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    entered.wait(10)
    threading.Timer(0.1, release.set).start()
    library.tag("dogs", "stable")
    assert release.is_set()
    other.join()


def test_a_newer_format_is_refused(library: Library) -> None:
    edit(library, "PRAGMA user_version = 2")
    with pytest.raises(LibraryError, match="another format"):
        library.search()
    with pytest.raises(LibraryError, match="another format"):
        verify(library.places)
    library.places.marker.write_text('{"format": 2}')
    with pytest.raises(LibraryError, match="another format"):
        Library.open(library.places.root)
