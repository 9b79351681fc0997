"""A library that lost parts of itself, that may not be written, or whose disk or user says no in the middle."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tarsia.cli
from bench.made import adapter
from tarsia.core.errors import LibraryError
from tarsia.library import Library, Reference, content, index, opening
from tarsia.library import verify as verifying
from tarsia.library.places import Places
from tarsia.library.repair import repair
from tarsia.library.sweep import contents, sweep
from tarsia.library.verify import verify


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """cats@1 (stable), cats@2 (current), dogs@1."""
    made = Library.make(tmp_path / "library")
    for seed, name in ((1, "cats"), (2, "cats"), (3, "dogs")):
        made.publish(adapter(tmp_path / f"made-{seed}", seed), name)
    made.tag("cats@1", "stable")
    return made


def seen(library: Library) -> tuple[object, object, bytes]:
    return library.search(every=True), library.history(), library.places.journal.read_bytes()


def command(library: Library, *arguments: str) -> int:
    return tarsia.cli.main(["library", *arguments, "--library", str(library.places.root)])


# a lost marker


def test_a_lost_marker_costs_nothing(library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = seen(library)
    library.places.marker.unlink()
    for act in (Library.make, Library.open):
        with pytest.raises(LibraryError, match=r"tarsia-library\.json(.|\n)*--repair"):
            act(library.places.root)
    assert command(library, "add", str(tmp_path / "made-3"), "birds") == 2
    assert command(library, "verify") == 2
    assert seen(library) == before and len(list(contents(library.places))) == 3
    assert command(library, "verify", "--repair") == 0
    assert f"repaired: {library.places.marker}" in capsys.readouterr().out
    assert seen(Library.open(library.places.root)) == before and sweep(library.places).objects == ()


@pytest.mark.parametrize("left", ["records", "objects", "journal.jsonl", "index.sqlite"])
def test_any_part_of_a_library_is_enough_to_be_one(library: Library, left: str) -> None:
    root = library.places.root
    for path in root.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(LibraryError, match="lost"):
        Library.make(root)
    assert [path.name for path in root.iterdir()] in ([left], ["lock", left], [left, "lock"])
    repair(Places(root))
    Library.make(root)


def test_what_is_no_library_is_not_repaired(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    (tmp_path / "objects" / "ab").mkdir(parents=True)  # as git keeps its own
    (tmp_path / "objects" / "ab" / ("c" * 38)).write_text("")
    for act in (lambda: repair(Places(tmp_path)), lambda: Library.make(tmp_path), lambda: Library.open(tmp_path)):
        with pytest.raises(LibraryError, match="no library"):
            act()
    assert {path.name for path in tmp_path.iterdir()} == {"letters.txt", "objects"}


def test_a_damaged_marker_is_written_anew(library: Library) -> None:
    before = seen(library)
    library.places.marker.write_bytes(b"")
    with pytest.raises(LibraryError, match="--repair"):
        Library.open(library.places.root)
    repair(library.places)
    assert seen(Library.open(library.places.root)) == before
    library.places.marker.write_text('{"format": 2}')
    with pytest.raises(LibraryError, match="another format"):
        repair(library.places)


def test_nothing_that_sqlite_writes_while_a_library_is_made_lies_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, there = tmp_path / "library", set()
    made = index.make

    def watched(db: sqlite3.Connection) -> None:
        def look(*_: object) -> int:
            there.update(path.name for path in root.iterdir())
            return 0

        db.set_trace_callback(look)
        db.set_progress_handler(look, 1)
        made(db)

    monkeypatch.setattr(index, "make", watched)
    Library.make(root)
    assert there and there <= {"lock", "objects", "records", "stages"}


def test_a_library_that_was_not_made_to_its_end_is_made(tmp_path: Path) -> None:
    names = ("tarsia-library.json", "journal.jsonl", "index.sqlite")
    for number in (1, 2, 3):
        places = Library.make(tmp_path / f"library-{number}").places
        for name in names[:number]:
            (places.root / name).unlink()
        Library.make(places.root).publish(adapter(tmp_path / f"made-{number}", number), "cats")
        assert verify(places).faults == ()


# a transaction that was refused


class Refusing(sqlite3.Connection):
    """Does ``Refusing.act`` in the place of a commit."""

    act: Callable[[Refusing], object]

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if sql == "COMMIT":
            type(self).act(self)
        return super().execute(sql, *values)


def full(db: Refusing) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def full_and_rolled_back(db: Refusing) -> None:
    db.execute("ROLLBACK")  # as SQLite does by itself
    raise sqlite3.OperationalError("database or disk is full")


def interrupted(db: Refusing) -> None:
    raise KeyboardInterrupt


def interrupted_afterwards(db: Refusing) -> None:
    super(Refusing, db).execute("COMMIT")
    raise KeyboardInterrupt


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    connect = sqlite3.connect
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Refusing))
        yield patch


@pytest.mark.parametrize("act", [full, full_and_rolled_back, interrupted])
def test_what_was_refused_does_not_happen_later(
    library: Library, tmp_path: Path, refusing: pytest.MonkeyPatch, act: Callable[[Refusing], object]
) -> None:
    before = seen(library)
    new = adapter(tmp_path / "made-9", 9)
    refusing.setattr(Refusing, "act", act, raising=False)
    for work in (lambda: library.rollback("cats"), lambda: library.publish(new, "cats", tags=["good"])):
        with pytest.raises((sqlite3.Error, LibraryError, KeyboardInterrupt)):
            work()
        assert seen(library) == before
    refusing.undo()
    library.tag("dogs", "stable")
    assert library.version("cats").number == 2 and len(library.search(every=True)) == 3
    assert verify(library.places).faults == ()


def test_the_next_writer_waits_until_the_line_is_taken_back(library: Library, refusing: pytest.MonkeyPatch) -> None:
    """SQLite's lock is gone with its own rollback, the journal's is not."""
    other = threading.Thread(target=lambda: library.tag("dogs", "stable"))

    def act(db: Refusing) -> None:
        if not other.is_alive():
            db.execute("ROLLBACK")
            other.start()
            other.join(0.2)
            assert other.is_alive(), "it did not wait"
            raise sqlite3.OperationalError("database or disk is full")

    refusing.setattr(Refusing, "act", act, raising=False)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        library.rollback("cats")
    other.join(30)
    refusing.undo()
    assert library.version("cats").number == 2 and library.version("dogs@stable").number == 1
    assert verify(library.places).faults == ()


def test_what_was_done_before_the_interruption_stays(library: Library, refusing: pytest.MonkeyPatch) -> None:
    refusing.setattr(Refusing, "act", interrupted_afterwards, raising=False)
    with pytest.raises(KeyboardInterrupt):
        library.rollback("cats")
    refusing.undo()
    assert library.version("cats").number == 1 and verify(library.places).faults == ()


# a disk, or rights, that refuse


@pytest.mark.parametrize("name", ["SQLITE_CANTOPEN", "SQLITE_READONLY_DIRECTORY", "SQLITE_IOERR_READ", "SQLITE_FULL"])
def test_a_disk_that_refuses_is_no_damage(library: Library, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refused(_: object) -> None:
        error = sqlite3.OperationalError("refused")
        error.sqlite_errorname = name
        raise error

    before = seen(library)
    with monkeypatch.context() as patch:
        patch.setattr(verifying.Known, "read", refused)
        for act in (verify, repair):
            with pytest.raises(LibraryError, match=f"can not be used(.|\n)*{name}"):
                act(library.places)
    assert seen(library) == before and not list(library.places.root.glob("*before-repair*"))


def test_a_journal_that_loses_lines_is_kept_beside(library: Library) -> None:
    raw = library.places.journal.read_bytes().replace(b'"dogs"', b'"dugs"')
    library.places.journal.write_bytes(raw)
    library.places.index.unlink()
    done = repair(library.places).done
    (kept,) = library.places.root.glob("journal.jsonl.before-repair-*")
    assert kept.read_bytes() == raw and any(str(kept) in text for text in done)
    assert verify(library.places).faults == ()


READER = """
import json, os, sys
from tarsia.library import Library
from tarsia.library.verify import verify
from tarsia.core.errors import LibraryError
from tarsia.library.opening import open_adapter
if os.getuid() == 0:  # after what is imported: another user may not reach that
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
library = Library.open(sys.argv[1])
print(json.dumps([v.reference for v in library.search(every=True)]))
print(json.dumps([str(fault) for fault in verify(library.places).faults]))
print(json.dumps(open_adapter(library, "cats").base))
try:
    library.tag("cats", "good", who="another")
except LibraryError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def shown(library: Library) -> Iterator[Path]:
    """A copy of the library that the reader may not write, where another user can reach it."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o755)
    root = Path(shutil.copytree(library.places.root, place / "library"))
    yield root
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    shutil.rmtree(place)


def read_by_another(root: Path) -> list[Any]:
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(root)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_library_that_may_not_be_written_can_be_read(shown: Path) -> None:
    found, faults, base, refusal = read_by_another(shown)
    assert (found, faults, base) == (["cats@1", "cats@2", "dogs@1"], [], "base-0")
    assert "can not be used" in refusal and "rights" in refusal
    assert not list(shown.glob("index.sqlite-*"))


def test_what_lies_beside_the_index_is_not_passed_over(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, sys\nfrom tarsia.library import Library, index\n"
        "with index.reading(Library.open(sys.argv[1]).places) as db:\n"
        "    db.execute('COMMIT'), db.execute('UPDATE versions SET note = 1'), os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(library.places.root)], check=False, env=environment)
    wal = library.places.root / "index.sqlite-wal"
    assert wal.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(index, "writable", lambda places: False)
        with pytest.raises(LibraryError, match=r"index\.sqlite-wal(.|\n)*library list"):
            library.search()
    library.search()
    monkeypatch.setattr(index, "writable", lambda places: False)
    assert [version.note for version in library.search(every=True)] == ["1"] * 3 and not wal.exists()


# others at work, and what they took away


def test_a_version_that_another_retires_meanwhile_is_no_fault(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = verifying.Known.read
    done: list[object] = []

    def overtaken(db: sqlite3.Connection) -> verifying.Known:
        known = read(db)
        if not done and not db.in_transaction:
            return known  # the first look, at the index itself
        if not done:
            db.execute("COMMIT")
            library.rollback("cats")
            library.untag("cats", "stable")
            library.rollback("cats", to=2)
            library.retire("cats", 1)
            done.append(sweep(library.places))
        return known

    monkeypatch.setattr(verifying.Known, "read", overtaken)
    found = verify(library.places)
    assert done and found.faults == () and found.garbage == ()


def test_a_fault_stays_one_at_the_second_look(library: Library) -> None:
    library.places.record("cats", 1).unlink()
    spoilt = library.folder(library.version("dogs"))
    spoilt.chmod(0o755)
    (spoilt / content.CONFIG).unlink()
    assert {fault.file for fault in verify(library.places).faults} == {
        library.places.record("cats", 1),
        spoilt / content.CONFIG,
    }


@pytest.mark.parametrize("names", [("stages",), ("lock",), ("records",), ("objects",), ("lock", "stages")])
def test_folders_and_the_lock_are_made_again(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    before = seen(library)
    for name in names:
        path = library.places.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert command(library, "verify") == 1
    said = capsys.readouterr().out
    assert all(f"FAULT {library.places.root / name}: is not there" in said for name in names)
    assert command(library, "add", str(adapter(tmp_path / "made-9", 9)), "birds") == 2
    refusal = capsys.readouterr().err
    assert any(str(library.places.root / name) in refusal for name in names) and "--repair" in refusal
    command(library, "verify", "--repair")
    assert all((library.places.root / name).exists() for name in names)
    assert seen(library) == before
    if names != ("objects",):
        assert verify(library.places).faults == ()


def test_a_rollback_passes_over_what_was_retired(library: Library, tmp_path: Path) -> None:
    for seed in (4, 5):
        library.publish(adapter(tmp_path / f"made-{seed}", seed), "cats")
    library.retire("cats", 3)
    assert library.rollback("cats").after == 2
    library.rollback("cats", to=4)
    library.rollback("cats", to=2)
    library.retire("cats", 4)
    assert library.rollback("cats").after == 1


# input


@pytest.mark.parametrize(
    "hashes", [["adapter_model.safetensors"], "adapter_model.safetensors", {"adapter_model.safetensors": 1}, 3, None]
)
def test_hashes_that_are_none_are_refused(library: Library, tmp_path: Path, hashes: object) -> None:
    folder = adapter(tmp_path / "odd", 9)
    described = json.loads((folder / content.OURSELVES).read_text())
    described.pop("seal", None)
    if described["probe"] is not None:
        described["probe"] = None
        (folder / content.PROBE).unlink(missing_ok=True)
    (folder / content.OURSELVES).write_text(json.dumps({**described, "sha256": hashes}))
    with pytest.raises(LibraryError, match=r"tarsia\.json is incomplete"):
        library.publish(folder, "cats")


@pytest.mark.parametrize("number", ["1" * 5000, "٣", "0", "03", "1" * 19, "³"])
def test_numbers_that_are_none(library: Library, number: str) -> None:
    with pytest.raises(LibraryError):
        Reference.parse(f"cats@{number}")
    assert Reference.parse("cats@3").number == 3


@pytest.mark.parametrize("number", [0, -1, 2**63, 10**40])
def test_a_rollback_to_a_number_that_is_none(library: Library, number: int) -> None:
    with pytest.raises(LibraryError, match="no such version"):
        library.rollback("cats", to=number)


# opening


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "SETTLED", -60.0)


@pytest.mark.usefixtures("settled")
def test_an_open_does_not_wait_to_note_that_it_was_done(library: Library) -> None:
    before = time.monotonic()
    with index.writing(library.places):
        assert opening.open_adapter(library, "cats").base == "base-0"
    assert time.monotonic() - before < index.PATIENCE / 2


@pytest.mark.usefixtures("settled")
def test_an_open_passes_over_a_full_disk_alone(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(code: int) -> Callable[..., None]:
        def refused(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        return refused

    for code in (errno.ENOSPC, errno.EDQUOT):
        with monkeypatch.context() as patch:
            patch.setattr(index.journal, "catch_up", refusing(code))
            assert opening.open_adapter(library, "cats").base == "base-0"
    with monkeypatch.context() as patch:
        patch.setattr(index.journal, "catch_up", refusing(errno.EIO))
        with pytest.raises(LibraryError, match="can not be used"):
            opening.open_adapter(library, "cats")
    library.places.journal.write_bytes(b"")
    with pytest.raises(LibraryError, match="lost its end"):
        opening.open_adapter(library, "cats")
