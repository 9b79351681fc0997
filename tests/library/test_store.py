"""A library in one process: versions, tags, rollback, garbage, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.made import adapter
from tarsia.core.errors import LibraryError
from tarsia.library import Library, Reference, content, default_root, index, stages
from tarsia.library.journal import Entry
from tarsia.library.places import check_name
from tarsia.library.store import trail
from tarsia.library.sweep import contents, sweep
from tarsia.library.verify import verify


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library.make(tmp_path / "library")


def publish(library: Library, name: str, seed: int, base: str = "base-0", **options: object) -> str:
    folder = library.places.root.parent / f"made-{seed}"
    if not folder.exists():
        adapter(folder, seed, base)
    return library.publish(folder, name, **options).version.reference  # type: ignore[arg-type]


def test_versions_count_from_one_and_keep_what_they_were(library: Library, tmp_path: Path) -> None:
    assert [publish(library, "cats", seed, note=f"run {seed}", who="eve") for seed in (1, 2)] == ["cats@1", "cats@2"]
    assert publish(library, "dogs", 1) == "dogs@1"
    first, second = library.version("cats@1"), library.version("cats")
    assert (first.number, second.number, first.note, first.who) == (1, 2, "run 1", "eve")
    assert (first.methods, first.sites, first.numbers, first.base) == ("lora", 8, 8 * 2 * 4 * 32, "base-0")
    assert (first.passed, first.tags, second.tags) == (True, (), ("current",))
    assert first.hash == library.version("dogs").hash, "one content, kept once"
    assert len(list(contents(library.places))) == 2
    for name in content.FILES[:2]:
        assert (library.folder(first) / name).read_bytes() == (tmp_path / "made-1" / name).read_bytes()
    assert verify(library.places).faults == ()


def test_the_hash_is_what_sha256sum_says(library: Library) -> None:
    publish(library, "cats", 1)
    version = library.version("cats")
    script = "LC_ALL=C sha256sum * | sha256sum"
    done = subprocess.run(script, shell=True, cwd=library.folder(version), capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == version.hash


def test_what_is_published_is_read_only(library: Library) -> None:
    publish(library, "cats", 1)
    folder = library.folder(library.version("cats"))
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o444"}
    assert oct(folder.stat().st_mode & 0o777) == "0o555"


def test_the_same_content_gets_no_second_version(library: Library, tmp_path: Path) -> None:
    publish(library, "cats", 1)
    again = library.publish(tmp_path / "made-1", "cats", tags=["stable"])
    assert (again.fresh, again.version.reference, again.version.tags) == (False, "cats@1", ("current", "stable"))


def test_references(library: Library) -> None:
    for seed in (1, 2, 3):
        publish(library, "cats", seed)
    library.tag("cats@2", "stable")
    third = library.version("cats@3").hash
    wanted = {"cats": 3, "cats@1": 1, "cats@stable": 2, f"cats#{third[:8]}": 3, f"cats#{third}": 3, "cats@current": 3}
    assert {text: library.version(text).number for text in wanted} == wanted
    for text in ("cats@9", "cats@gone", "cats#0000", "cat", "cats@0", "Cats", "cats@@1", "cats#xyz", "", "cats@1#ab12"):
        with pytest.raises(LibraryError) as refusal:
            library.version(text)
        assert refusal.value.given is not None
    with pytest.raises(LibraryError, match=r"did you mean cats\?"):
        library.version("cat")


@pytest.mark.parametrize("text", ["name", "name@3", "name@stable", "name#ab12"])
def test_a_reference_is_written_as_it_is_read(text: str) -> None:
    assert str(Reference.parse(text)) == text


@pytest.mark.parametrize("name", ["", "A", "a b", "../x", ".x", "-x", "a/b", "a@b", "ä", "x" * 101, "a\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(LibraryError):
        check_name(name)


def test_a_hash_that_two_begin_with_is_refused(library: Library) -> None:
    for seed in (1, 2):
        publish(library, "cats", seed)
    with index.writing(library.places) as work:
        work.db.execute("PRAGMA defer_foreign_keys = ON")
        work.db.execute("UPDATE objects SET hash = 'abcd' || hash")
        work.db.execute("UPDATE versions SET hash = 'abcd' || hash")
    with pytest.raises(LibraryError, match="more than one"):
        library.version("cats#abcd")


def test_search(library: Library) -> None:
    publish(library, "cats", 1, base="llava")
    publish(library, "cats", 2, base="llava")
    publish(library, "dogs", 3, base="qwen")
    library.tag("cats@1", "stable")
    dogs = library.version("dogs")

    def found(*args: object, **options: object) -> list[str]:
        return [version.reference for version in library.search(*args, **options)]  # type: ignore[arg-type]

    assert found() == ["cats@2", "dogs@1"]
    assert found(every=True) == ["cats@1", "cats@2", "dogs@1"]
    assert found("c*") == ["cats@2"] and found("cat") == []
    assert found(tag="stable") == ["cats@1"]
    assert found(base="QWEN") == ["dogs@1"]
    assert found(base=str(dogs.weights).removeprefix("files:")[:10]) == ["dogs@1"]
    assert found(digest=dogs.hash[:6]) == ["dogs@1"]
    assert found("c*", base="qwen") == []


def test_another_base_is_refused_unless_it_is_meant(library: Library) -> None:
    publish(library, "cats", 1, base="llava")
    with pytest.raises(LibraryError, match="another base than cats@1") as refusal:
        publish(library, "cats", 2, base="qwen")
    assert "weights, architecture, processor, template" in str(refusal.value) and "--new-base" in str(refusal.value)
    assert [v.reference for v in library.search(every=True)] == ["cats@1"] and verify(library.places).garbage == ()
    assert publish(library, "cats", 2, base="qwen", new_base=True) == "cats@2"


def test_tags_move_and_go(library: Library) -> None:
    for seed in (1, 2):
        publish(library, "cats", seed)
    assert library.tag("cats@1", "stable", why="first").before is None
    assert (library.tag("cats", "stable").before, library.version("cats@stable").number) == (1, 2)
    assert library.untag("cats", "stable").after is None
    with pytest.raises(LibraryError, match="no such version"):
        library.version("cats@stable")
    for tag in ("current", "7", "Bad"):
        with pytest.raises(LibraryError):
            library.tag("cats", tag)
    with pytest.raises(LibraryError):
        library.tag("cats@9", "stable")
    assert [entry.action for entry in library.history("cats")] == ["publish", "publish", "tag", "tag", "untag"]


def test_rollback_goes_further_back_each_time_and_says_who_and_why(library: Library) -> None:
    for seed in (1, 2, 3):
        publish(library, "cats", seed)
    entry = library.rollback("cats", why="forgets too much", who="eve")
    assert (entry.before, entry.after, entry.who, entry.why) == (3, 2, "eve", "forgets too much")
    assert library.rollback("cats").after == 1
    with pytest.raises(LibraryError, match="never anywhere else"):
        library.rollback("cats")
    assert publish(library, "cats", 4) == "cats@4" and library.version("cats").number == 4
    assert library.rollback("cats").after == 1, "where it was before version 4"
    assert library.rollback("cats", to=3).after == 3
    for to in (3, 9, 0):
        with pytest.raises(LibraryError):
            library.rollback("cats", to=to)
    with pytest.raises(LibraryError):
        library.rollback("cats", "stable")
    assert library.history("cats")[-1] == library.history()[-1]


def test_the_trail_of_a_tag() -> None:
    def moves(*pairs: tuple[str, int | None]) -> list[int]:
        return trail([Entry("", "", action, "cats", "stable", None, after, "") for action, after in pairs])

    assert moves(("tag", 1), ("tag", 2), ("rollback", 1)) == [1]
    assert moves(("tag", 1), ("tag", 2), ("tag", 1), ("rollback", 2)) == [1, 2]
    assert moves(("tag", 1), ("untag", None), ("tag", 3)) == [3]
    assert moves(("tag", 1), ("tag", 1)) == [1]
    assert moves(("tag", 2), ("rollback", 1)) == [2, 1]


def test_garbage_is_what_no_version_refers_to(library: Library, tmp_path: Path) -> None:
    for seed in (1, 2):
        publish(library, "cats", seed)
    loose = library.places.object("e" * 64)
    adapter(loose, 5)
    loose.chmod(0o555)
    dead = library.places.stages / "dead"
    adapter(dead, 6)
    ahead = library.places.record("cats", 3)
    ahead.write_text("{}")
    found = verify(library.places)
    assert (found.faults, set(found.garbage)) == ((), {loose, dead, ahead})
    with stages.staged(library.places) as busy:
        (busy / "half").write_text("a publish")
        swept = sweep(library.places)
        assert (busy / "half").exists(), "what another process is writing stays"
    assert (swept.objects, swept.records, swept.stages) == (("e" * 64,), (str(ahead),), 1)
    assert swept.bytes > 0 and verify(library.places).garbage == ()
    assert [v.reference for v in library.search(every=True)] == ["cats@1", "cats@2"]


def test_a_retired_version_is_gone_and_its_number_is_not_given_again(library: Library) -> None:
    for seed in (1, 2, 3):
        publish(library, "cats", seed)
    library.tag("cats@2", "stable")
    for number in (2, 3, 9):
        with pytest.raises(LibraryError):
            library.retire("cats", number)
    library.rollback("cats")
    gone = library.version("cats@3").hash
    library.retire("cats", 3, why="useless")
    swept = sweep(library.places)
    assert swept.objects == (gone,) and verify(library.places).faults == ()
    with pytest.raises(LibraryError):
        library.retire("cats", 3)
    assert publish(library, "cats", 3) == "cats@4", "the same content again, under a number of its own"
    assert verify(library.places).faults == ()


def test_a_content_that_two_names_share_stays_while_one_has_it(library: Library) -> None:
    publish(library, "cats", 1), publish(library, "cats", 2), publish(library, "dogs", 1)
    library.retire("cats", 1)
    assert sweep(library.places).objects == ()
    assert library.whole("dogs")[0].number == 1


def test_publishing_again_puts_a_damaged_content_right(library: Library, tmp_path: Path) -> None:
    publish(library, "cats", 1)
    path = library.folder(library.version("cats")) / content.TENSORS
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(LibraryError, match=content.TENSORS):
        library.whole("cats")
    assert not library.publish(tmp_path / "made-1", "cats").fresh
    assert library.whole("cats")[0].number == 1 and verify(library.places).faults == ()


def test_what_is_no_whole_adapter_is_refused(library: Library, tmp_path: Path) -> None:
    def spoil(name: str, change: object) -> Path:
        folder = adapter(tmp_path / f"spoilt-{len(list(tmp_path.iterdir()))}", 1)
        if change is None:
            (folder / name).unlink()
        elif callable(change):
            (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder

    def edited(**values: object) -> object:
        return lambda raw: json.dumps(json.loads(raw) | values).encode()

    cases = [
        spoil(content.TENSORS, lambda raw: raw[:-1]),
        spoil(content.TENSORS, lambda raw: raw[:-1] + b"?"),
        spoil(content.TENSORS, None),
        spoil(content.CONFIG, None),
        spoil(content.CONFIG, lambda raw: b"[]"),
        spoil(content.OURSELVES, None),
        spoil(content.OURSELVES, lambda raw: raw[:-9]),
        spoil(content.OURSELVES, edited(format=9)),
        spoil(content.OURSELVES, edited(fingerprint={"weights": 1})),
        spoil(content.OURSELVES, edited(patches={})),
        spoil(content.OURSELVES, edited(probe={"difference": 1.0})),
        tmp_path / "nowhere",
    ]
    pipe = spoil(content.CONFIG, None)
    os.mkfifo(pipe / content.CONFIG)
    for folder in [*cases, pipe]:
        with pytest.raises(LibraryError) as refusal:
            library.publish(folder, "cats")
        assert str(folder) in str(refusal.value) or refusal.value.given == 9
    assert library.search(every=True) == [] and list(library.places.stages.iterdir()) == []


def test_what_is_no_part_of_an_adapter_is_told(library: Library, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "made", 1)
    (folder / "README.md").write_text("hello")
    (folder / "checkpoint-3").mkdir()
    made = library.publish(folder, "cats")
    assert made.left == ("README.md", "checkpoint-3")
    assert not (library.folder(made.version) / "README.md").exists()


def test_a_folder_that_is_something_else_is_not_made_a_library(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(LibraryError, match="no library"):
        Library.make(tmp_path)
    with pytest.raises(LibraryError, match="no library"):
        Library.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_where_the_library_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TARSIA_LIBRARY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_root() == tmp_path / "tarsia" / "library"
    monkeypatch.setenv("TARSIA_LIBRARY", "/elsewhere")
    assert default_root() == Path("/elsewhere")


def test_nothing_here_imports_torch() -> None:
    names = ("card", "content", "differ", "index", "places", "record", "repair", "stages", "store", "sweep", "verify")
    text = "import sys\n" + "".join(f"import tarsia.library.{name}\n" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", f"{text}print('torch' in sys.modules)"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "False\n", done.stderr


def test_text_that_is_no_unicode_is_refused(library: Library, tmp_path: Path) -> None:
    publish(library, "cats", 1)
    odd = os.fsdecode(b"caf\xe9")
    odd_base = adapter(tmp_path / "odd", 3)
    described = (odd_base / content.OURSELVES).read_text()
    (odd_base / content.OURSELVES).write_text(described.replace('"base": "base-0"', '"base": "\\ud800"'))
    for act in (
        lambda: publish(library, "cats", 2, note=odd),
        lambda: publish(library, "cats", 2, who=odd),
        lambda: library.tag("cats", "stable", why=odd),
        lambda: library.rollback("cats", why=odd),
        lambda: library.publish(odd_base, "dogs"),
    ):
        with pytest.raises(LibraryError):
            act()
    assert [v.reference for v in library.search(every=True)] == ["cats@1"] and verify(library.places).faults == ()


def test_a_full_disk_leaves_what_was_there(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(library, "cats", 1)
    before = library.search(every=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "rename", "replace", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(LibraryError, match="as it was"):
                publish(library, "cats", 2)
        assert library.search(every=True) == before and verify(library.places).faults == ()
    assert publish(library, "cats", 2) == "cats@2"


def test_everything_is_flushed_before_it_is_acknowledged(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what reaches the disk: files and their folder, the new name, the record, the journal, the index."""
    done: list[str] = []
    flush, rename, replace = os.fsync, os.rename, os.replace

    def told(handle: int) -> None:
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        flush(handle)

    monkeypatch.setattr(os, "fsync", told)
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(f"rename {Path(b).name}"), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"replace {Path(b).name}"), replace(a, b))[1])
    publish(library, "cats", 1)
    digest = library.version("cats").hash
    renamed, recorded = done.index(f"rename {digest}"), done.index("replace 1.json")
    assert {f"flush {name}" for name in (content.CONFIG, content.TENSORS, content.OURSELVES)} <= set(done[:renamed])
    assert done[renamed - 1] == "flush objects" and f"flush {digest[:2]}" in done[renamed:recorded]
    assert (
        done.index("flush 1.json") < recorded < done.index("flush cats", recorded) < done.index("flush journal.jsonl")
    )
    with index.reading(library.places) as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
