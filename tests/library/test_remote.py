"""Versions go to a remote and come from one whole, or not at all; what is fetched is kept up to a limit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from library import shelved

from tarsia.adapter import save
from tarsia.core.errors import LibraryError
from tarsia.library import Library, content, opening
from tarsia.library import remote as remotes
from tarsia.library.cache import Cache, limit_of
from tarsia.library.opening import open_adapter, open_remote
from tarsia.library.remote import ATTEMPTS, Remote

TENSORS, OURS = "adapter_model.safetensors", "tarsia.json"
Make = Callable[..., Library]


class Faulty(MemoryFileSystem):
    """Memory, whose reads and writes go wrong when they are told to."""

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012 (as its parent has it)
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    left: int | None = None
    """Writes before the connection is lost (None: it is not)."""
    spoil: Callable[[bytes], bytes] | None = None
    """What happens to a file's bytes on their way."""
    reads = 0
    times = 10**6
    """How many reads are spoilt."""

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        held = super().open(path, mode, **options)
        if mode == "rb":
            type(self).reads += 1
            if Faulty.spoil is not None and path.endswith("safetensors") and Faulty.reads <= Faulty.times:
                import io

                return io.BytesIO(Faulty.spoil(held.read()))
        return held

    def _count(self) -> None:
        if Faulty.left is not None:
            Faulty.left -= 1
            if Faulty.left < 0:
                raise ConnectionResetError("the line is dead")

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._count()
        super().pipe_file(path, value, **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        if Path(lpath).is_file():
            self.pipe_file(rpath, Path(lpath).read_bytes())


@pytest.fixture
def faulty() -> Iterator[type[Faulty]]:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    Faulty.store.clear()
    Faulty.left, Faulty.spoil, Faulty.reads, Faulty.times = None, None, 0, 10**6
    yield Faulty
    Faulty.store.clear()


@pytest.fixture
def library(tmp_path: Path) -> Make:
    def make(name: str = "library", seeds: tuple[int, ...] = ()) -> Library:
        made = Library.make(tmp_path / name)
        for seed in seeds:
            save(shelved.adapter(seed), tmp_path / "draft")
            made.publish(tmp_path / "draft", "cat", who="kim", note=f"the {seed}th")
        return made

    return make


@pytest.fixture(params=["memory://shelf/of/ours", "file", "faulty://shelf"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, faulty: type[Faulty]) -> Remote:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    url = f"file://{tmp_path}/far" if request.param == "file" else request.param
    return Remote(url, Cache(tmp_path / "cache"))


def paths(remote: Remote) -> list[str]:
    fs, root = fsspec.core.url_to_fs(remote.url)
    return sorted(path.partition(root.strip("/"))[2] for path in fs.find(root)) if fs.exists(root) else []


def test_there_and_back(library: Make, remote: Remote) -> None:
    near, far = library(seeds=(0, 1)), library("other")
    for number in (1, 2):
        pushed = remote.push(near, f"cat@{number}")
        assert (pushed.fresh, pushed.listed.number, pushed.sent) == (True, number, near.version(f"cat@{number}").bytes)
    assert (
        [one.reference for one in remote.list()] == ["cat@1", "cat@2"] == [one.reference for one in remote.list("cat")]
    )
    pulled = remote.pull(far, "cat@2")
    assert pulled.fresh and pulled.version.hash == near.version("cat@2").hash
    assert pulled.version.number == 1 and "cat@2 of kim" in pulled.version.note and remote.url in pulled.version.note
    assert shelved.same(open_adapter(far, "cat"), shelved.adapter(1))
    assert shelved.same(open_remote(remote, "cat@1"), shelved.adapter(0))
    assert remote.pull(far, "cat", "feline").version.name == "feline"
    assert not [path for path in paths(remote) if path.endswith(".part")]


def test_the_same_again_sends_nothing(library: Make, remote: Remote) -> None:
    near = library(seeds=(0,))
    remote.push(near, "cat")
    before = paths(remote)
    again = remote.push(near, "cat")
    assert (again.fresh, again.sent, again.listed.number) == (False, 0, 1) and paths(remote) == before


def test_another_library_takes_the_next_number(library: Make, remote: Remote) -> None:
    near, other = library(seeds=(0, 1)), library("other", seeds=(2, 1))
    remote.push(near, "cat@1")
    assert remote.push(other, "cat@1").listed.number == 2
    assert remote.push(near, "cat@2").listed.number == 3
    same = remote.push(other, "cat@2")
    assert (same.fresh, same.sent, same.listed.number) == (False, 0, 3)
    assert remote.find("cat").number == 3 and remote.find("cat@2").hash == other.version("cat@1").hash


def test_two_at_one_number_are_told_apart(library: Make, remote: Remote, tmp_path: Path) -> None:
    """As two pushes leave it that did not see each other."""
    near, other = library(seeds=(0,)), library("other", seeds=(1,))
    remote.push(near, "cat")
    beside = Remote(f"file://{tmp_path}/beside", remote.cache)
    beside.push(other, "cat")
    fs, root = fsspec.core.url_to_fs(remote.url)
    fs.put(str(tmp_path / "beside") + "/", root, recursive=True)
    assert [one.number for one in remote.list("cat")] == [1, 1]
    for reference in ("cat", "cat@1"):
        with pytest.raises(LibraryError, match="more than one"):
            remote.find(reference)
    digest = other.version("cat").hash
    assert shelved.same(open_remote(remote, f"cat#{digest[:9]}"), shelved.adapter(1))


@pytest.mark.parametrize("reference", ["dog", "cat@7", "cat#abcdef", "cat@stable", "no name"])
def test_what_is_not_there(library: Make, remote: Remote, reference: str) -> None:
    remote.push(library(seeds=(0,)), "cat")
    with pytest.raises(LibraryError):
        remote.find(reference)


def test_an_empty_remote(remote: Remote) -> None:
    fs, root = fsspec.core.url_to_fs(remote.url)
    fs.makedirs(root)
    assert remote.list() == []
    with pytest.raises(LibraryError, match="no such version"):
        remote.find("cat")


def test_a_remote_that_is_not_there(library: Make, remote: Remote) -> None:
    remote.push(library(seeds=(0,)), "cat")
    assert [one.reference for one in remote.list()] == ["cat@1"] and remote.list("dog") == []
    for name in (None, "cat"):
        with pytest.raises(LibraryError, match=r"nothing there(.|\n)*/typo"):
            Remote(f"{remote.url}/typo", remote.cache).list(name)


def test_a_push_that_ends_anywhere_is_not_seen(library: Make, faulty: type[Faulty], tmp_path: Path) -> None:
    near, remote = library(seeds=(0, 1)), Remote("faulty://shelf", Cache(tmp_path / "cache"))
    writes = len(content.FILES) + 1
    for done in range(writes):
        faulty.store.clear()
        faulty.left = None
        remote.push(near, "cat@1")
        faulty.left = done
        with pytest.raises(LibraryError, match="the line is dead"):
            remote.push(near, "cat@2")
        assert [one.number for one in remote.list()] == [1]
        assert shelved.same(open_remote(remote, "cat"), shelved.adapter(0))
    # all but the record had arrived: it alone is sent
    faulty.left = 1
    assert remote.push(near, "cat@2").sent == 0
    assert shelved.same(open_remote(remote, "cat"), shelved.adapter(1))


@pytest.mark.parametrize("name", [TENSORS, OURS])
def test_a_file_that_was_cut_at_the_remote_is_sent_again(library: Make, remote: Remote, name: str) -> None:
    near = library(seeds=(0,))
    remote.push(near, "cat")
    fs, root = fsspec.core.url_to_fs(remote.url)
    (path,) = [path for path in fs.find(root) if path.endswith(name)]
    fs.pipe_file(path, fs.cat_file(path)[:-1])
    with pytest.raises(LibraryError, match=f"{name} of cat@1 does not arrive whole"):
        remote.folder("cat")
    again = remote.push(near, "cat")
    assert again.sent == near_bytes(near, name) and not again.fresh
    assert shelved.same(open_remote(remote, "cat"), shelved.adapter(0))


def near_bytes(near: Library, name: str) -> int:
    return (near.folder(near.version("cat")) / name).stat().st_size


SPOILS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[:-1],
    "empty": lambda raw: b"",
    "flipped": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "longer": lambda raw: raw + b"\0",
    "endless": lambda raw: raw * 1000,
}


@pytest.mark.parametrize("how", SPOILS)
def test_a_download_that_goes_wrong(library: Make, faulty: type[Faulty], tmp_path: Path, how: str) -> None:
    near, remote = library(seeds=(0,)), Remote("faulty://shelf", Cache(tmp_path / "cache"))
    remote.push(near, "cat")
    faulty.spoil = staticmethod(SPOILS[how])
    with pytest.raises(LibraryError, match=f"{TENSORS}.*\n.*{ATTEMPTS} times"):
        remote.pull(library("other"), "cat")
    assert list(remote.cache.contents.iterdir()) == [] and library("other").search() == []
    # once, and the next attempt is right: the record, then adapter_config.json and the tensors
    faulty.reads, faulty.times = 0, 3
    assert remote.pull(library("other"), "cat").fresh


RECORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another hash": lambda r: r.update(hash="0" * 64),
    "another number": lambda r: r.update(number=2),
    "a path out of the folder": lambda r: r["files"].update({"../../x": r["files"].pop(OURS)}),
    "a file that is no adapter's": lambda r: r["files"].update({"run.sh": r["files"][OURS]}),
    "a length below zero": lambda r: r["files"][OURS].update(bytes=-1),
    "an enormous length": lambda r: r["files"][OURS].update(bytes=1 << 60),
    "no files": lambda r: r.update(files={}),
    "files in a list": lambda r: r.update(files=[1]),
    "one more field": lambda r: r.update(more=1),
    "no check": lambda r: r.pop("check"),
}


@pytest.mark.parametrize("how", RECORDS)
@pytest.mark.parametrize("checked", [False, True])
def test_a_record_that_was_tampered_with(library: Make, tmp_path: Path, how: str, checked: bool) -> None:
    """Found by its check, and where that was made anew, by what it says."""
    from tarsia.library import record

    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache"))
    remote.push(library(seeds=(0,)), "cat")
    (path,) = (tmp_path / "far/versions/cat").iterdir()
    values = json.loads(path.read_text())
    RECORDS[how](values)
    if checked and "check" in values:
        del values["check"]
        values["check"] = record._check(values)
    path.write_text(json.dumps(values))
    with pytest.raises(LibraryError):
        remote.folder("cat")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["cache", "draft", "far", "library"]
        or not (tmp_path / "cache").exists()
    )


def test_half_a_record_is_damage_and_a_part_is_nothing(library: Make, tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache"))
    remote.push(library(seeds=(0,)), "cat")
    (path,) = (tmp_path / "far/versions/cat").iterdir()
    path.with_name(f"{path.name.replace('000001', '000002')}.ab12.part").write_text("{")
    (path.parent / "notes.txt").touch()
    assert [one.number for one in remote.list("cat")] == [1]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(LibraryError, match="record of the remote is damaged"):
        remote.folder("cat")


def test_a_killed_push_into_a_folder_leaves_only_parts(
    library: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files get their names when all of them is there."""
    from fsspec.implementations.local import LocalFileSystem

    remote, near = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache")), library(seeds=(0,))

    def died(self: LocalFileSystem, path: str, value: bytes, **_: Any) -> None:
        Path(path).write_bytes(value[:20])
        os._exit(9)

    child = os.fork()
    if not child:
        monkeypatch.setattr(LocalFileSystem, "pipe_file", died)
        remote.push(near, "cat")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert remote.list() == [] and any(path.endswith(".part") for path in paths(remote))
    assert remote.push(near, "cat").sent == 0
    assert shelved.same(open_remote(remote, "cat"), shelved.adapter(0))


def test_what_is_in_the_cache_is_not_fetched_again(library: Make, faulty: type[Faulty], tmp_path: Path) -> None:
    remote = Remote("faulty://shelf", Cache(tmp_path / "cache"))
    remote.push(library(seeds=(0,)), "cat")
    remote.folder("cat")
    faulty.reads = 0
    _, folder = remote.folder("cat")
    assert faulty.reads == 1  # the record
    (folder / TENSORS).chmod(0o644)
    (folder / TENSORS).write_bytes(b"damaged")
    assert shelved.same(open_remote(remote, "cat"), shelved.adapter(0)) and faulty.reads > 2


def test_the_least_recently_used_goes_first(library: Make, tmp_path: Path) -> None:
    near = library(seeds=(0, 1, 2, 3))
    size = near.version("cat@1").bytes
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache", limit=int(3.5 * size)))
    for number in (1, 2, 3, 4):
        remote.push(near, f"cat@{number}")

    def held() -> set[int]:
        names = {path.name for path in remote.cache.contents.iterdir()}
        return {version.number for version in near.search(every=True) if version.hash in names}

    for number, time in ((1, 100), (2, 200), (3, 300)):
        os.utime(remote.folder(f"cat@{number}")[1], (time, time))
    remote.folder("cat@1")  # used now
    remote.folder("cat@4")
    assert held() == {1, 3, 4}
    # one that is larger than the limit is kept as long as it is the last
    tight = Remote(remote.url, Cache(remote.cache.root, limit=1))
    assert shelved.same(open_remote(tight, "cat@2"), shelved.adapter(1)) and held() == {2}
    assert list((remote.cache.root / "stages").iterdir()) == []


def test_a_cache_of_dead_stages_is_swept(library: Make, tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache"))
    remote.push(library(seeds=(0,)), "cat")
    (tmp_path / "cache/stages/dead").mkdir(parents=True)
    (tmp_path / "cache/stages/dead/x").touch()
    remote.folder("cat")
    assert list((tmp_path / "cache/stages").iterdir()) == []


def test_a_cache_that_can_not_be_written(library: Make, tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache"))
    remote.push(library(seeds=(0,)), "cat")
    (tmp_path / "cache").touch()
    with pytest.raises(LibraryError, match="cache of remotes can not be written"):
        remote.folder("cat")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOSPC])
def test_a_cache_that_takes_no_name_says_so(
    library: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache"))
    remote.push(library(seeds=(0,)), "cat")
    rename = os.rename

    def refused(source: Path, target: Path) -> None:
        if Path(target).parent == remote.cache.contents:
            raise OSError(code, os.strerror(code))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(LibraryError, match="cache of remotes can not be written"):
        remote.folder("cat")


def test_a_content_that_another_brought_meanwhile_is_taken(
    library: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache"))
    near = library(seeds=(0,))
    remote.push(near, "cat")
    rename = os.rename

    def overtaken(source: Path, target: Path) -> None:
        if Path(target).parent == remote.cache.contents:
            shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    assert not content.damage(remote.folder("cat")[1], {p.name: content.hashed(p) for p in _files(near)})


def _files(near: Library) -> list[Path]:
    return list(near.folder(near.version("cat")).iterdir())


def test_what_is_in_use_is_not_dropped(library: Make, tmp_path: Path) -> None:
    near = library(seeds=(0, 1, 2))
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache", limit=1))
    for number in (1, 2, 3):
        remote.push(near, f"cat@{number}")
    with remote.held("cat@1") as (version, folder):
        other = remote.folder("cat@2")[1]
        assert version.number == 1 and (folder / TENSORS).is_file() and other.is_dir()
    last = remote.folder("cat@3")[1]
    assert not folder.exists() and not other.exists() and last.is_dir()


@pytest.mark.parametrize("act", [lambda r, near: r.pull(near, "cat@1", "new"), lambda r, _: open_remote(r, "cat@1")])
def test_pulls_and_opens_hold_what_they_read(
    library: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Remote, Library], object]
) -> None:
    near = library(seeds=(0, 1))
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache", limit=1))
    for number in (1, 2):
        remote.push(near, f"cat@{number}")
    publish, mapped = Library.publish, opening.load_mapped

    def first(inner: Callable[..., Any]) -> Callable[..., Any]:
        def act(*values: Any, **options: Any) -> Any:
            remote.folder("cat@2")  # as another process does, which makes room
            return inner(*values, **options)

        return act

    monkeypatch.setattr(Library, "publish", first(publish))
    monkeypatch.setattr(opening, "load_mapped", first(mapped))
    assert act(remote, near)


def test_what_is_damaged_is_replaced_when_nobody_uses_it(library: Make, tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache"))
    remote.push(library(seeds=(0,)), "cat")
    done: list[bool] = []
    with remote.held("cat") as (_, folder):
        (folder / TENSORS).chmod(0o644)
        (folder / TENSORS).write_bytes(b"damaged")
        later = threading.Thread(target=lambda: done.append(remote.folder("cat")[1].is_dir()))
        later.start()
        later.join(0.2)
        assert not done and folder.is_dir()
    later.join(60)
    assert done == [True] and shelved.same(open_remote(remote, "cat"), shelved.adapter(0))


def test_what_a_library_has_damaged_is_not_pushed(library: Make, remote: Remote) -> None:
    near = library(seeds=(0,))
    place = near.folder(near.version("cat"))
    (place / TENSORS).chmod(0o644)
    (place / TENSORS).write_bytes(b"damaged")
    with pytest.raises(LibraryError, match=TENSORS):
        remote.push(near, "cat")
    assert paths(remote) == []


@pytest.mark.parametrize("url", ["nosuch://x/y", "s3://user:secret@bucket/x"])
def test_an_address_that_nothing_knows(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs is not installed here, or has no credentials."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setitem(
        sys.modules["fsspec.registry"].known_implementations, "s3", {"class": "no.such.FS", "err": "Install s3fs"}
    )
    with pytest.raises(LibraryError, match="can not be used") as told:
        Remote(url, Cache(tmp_path / "cache")).list()
    assert "secret" not in str(told.value)


SECRETS = {
    "sftp://user:p@ss@host/lib": "sftp://***@host/lib",
    "sftp://user@host/lib": "sftp://***@host/lib",
    "s3://KEY:a/b@host/lib": "s3://***@host/lib",
    "s3://KEY:a/b@c/d@host": "s3://***@host",
    "https://host/lib?X-Amz-Signature=1a2b3c&part=4": "https://host/lib?***",
    "https://me:12/34@host/lib?token=99#x": "https://***@host/lib?***",
    "simplecache::s3://KEY:a/b@host/lib": "simplecache::s3://***@host/lib",
    "s3://bucket/some@where": "s3://bucket/some@where",
    "gs://bucket/lib": "gs://bucket/lib",
    "/home/kim/what?/a@b": "/home/kim/what?/a@b",
}


@pytest.mark.parametrize("url", SECRETS)
def test_what_an_address_keeps_to_itself(url: str) -> None:
    assert Remote(url).said == SECRETS[url]


@pytest.mark.parametrize("told", ["{url}", "{query}", "login of {user} with {password} failed", "as {quoted}"])
def test_what_a_transport_says_of_an_address(
    library: Make, faulty: type[Faulty], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """And neither a note, a record nor the journal holds any of it."""
    url = "faulty://KIMS-KEY:pa%2Fss/word@shelf/ours?X-Sig=1a2b3c"
    words = {"user": "KIMS-KEY", "password": "pa%2Fss/word", "quoted": "pa/ss/word", "query": "X-Sig=1a2b3c"}
    whole = MemoryFileSystem._strip_protocol
    monkeypatch.setattr(Faulty, "_strip_protocol", staticmethod(lambda path: whole(path.partition("://")[2] or path)))
    monkeypatch.setattr(remotes, "WHOLE_OBJECTS", frozenset({"faulty"}))  # its renaming takes ? for a pattern
    remote, near = Remote(url, Cache(tmp_path / "cache")), library(seeds=(0,))
    remote.push(near, "cat")
    far = library("other")
    remote.pull(far, "cat")
    held = [far.places.journal, *far.places.records.rglob("*.json")]
    texts = [path.read_text() for path in held]

    def dead(*_: object, **__: object) -> None:
        raise ConnectionResetError(told.format(url=url, **words))

    faulty.spoil = staticmethod(SPOILS["cut"])
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(LibraryError) as cut:
        remote.folder("cat")
    with pytest.raises(LibraryError) as none:
        remote.find("dog")
    monkeypatch.setattr(Faulty, "open", dead)
    with pytest.raises(LibraryError) as error:
        remote.folder("cat")
    texts += [str(cut.value), str(none.value), str(error.value)]
    assert not [text for text in texts if any(word in text for word in (*words.values(), "1a2b3c"))]


def test_a_full_disk_here_is_no_fault_of_the_remote(
    library: Make, faulty: type[Faulty], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote("faulty://shelf", Cache(tmp_path / "cache"))
    remote.push(library(seeds=(0,)), "cat")
    faulty.reads, opened = 0, Path.open

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        return opened(Path("/dev/full") if mode == "wb" and "stages" in path.parts else path, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(LibraryError, match=r"cache of remotes can not be written(.|\n)*No space") as error:
        remote.folder("cat")
    assert faulty.reads == 2 and "delete" not in str(error.value)  # the record and one file, once


def test_a_source_that_may_not_be_read_is_no_fault_of_the_library(
    library: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, opened = library(seeds=(0,)), os.open

    def refused(path: Any, flags: int, *rest: Any, dir_fd: int | None = None) -> int:
        if path == TENSORS:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(LibraryError, match=rf"can not be read(.|\n)*draft/{TENSORS}: Permission denied"):
        near.publish(tmp_path / "draft", "dog")


def test_object_stores_are_listed_by_one_request(
    library: Make, faulty: type[Faulty], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, remote = library(seeds=(0, 1)), Remote("faulty://shelf", Cache(tmp_path / "cache"))
    for name in ("dog", "eel"):
        near.publish(tmp_path / "draft", name)
    for reference in ("cat@1", "cat@2", "dog", "eel"):
        remote.push(near, reference)
    fs = fsspec.filesystem("faulty")
    fs.pipe_file("/shelf/versions/notes.txt", b"")
    fs.pipe_file("/shelf/versions/cat/deeper/" + "000009-" + "0" * 64 + ".json", b"")
    wanted = [one.reference for one in remote.list()]
    assert wanted == ["cat@1", "cat@2", "dog@1", "eel@1"]
    asked: list[str] = []

    def requests(name: str) -> Callable[..., Any]:
        inner = getattr(MemoryFileSystem, name)

        def request(self: Faulty, path: str, *rest: Any, **options: Any) -> Any:
            depth.append(name)
            if len(depth) == 1:
                asked.append(name)
            try:
                return inner(self, path, *rest, **options)
            finally:
                depth.pop()

        return request

    depth: list[str] = []
    for name in ("ls", "find", "info", "exists"):
        monkeypatch.setattr(Faulty, name, requests(name), raising=False)
    monkeypatch.setattr(remotes, "WHOLE_OBJECTS", frozenset({"faulty"}))
    assert [one.reference for one in remote.list()] == wanted and asked == ["find"]


def test_hashes_are_what_holds_it_all(library: Make, remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a reader that takes every file for right. The library still does not."""
    near = library(seeds=(0,))
    remote.push(near, "cat")
    fs, root = fsspec.core.url_to_fs(remote.url)
    (path,) = [path for path in fs.find(root) if path.endswith(TENSORS)]
    raw = fs.cat_file(path)
    fs.pipe_file(path, raw[:-1] + bytes([raw[-1] ^ 1]))
    hashed = content.hashed
    monkeypatch.setattr(content.File, "__eq__", lambda self, other: True)
    monkeypatch.setattr(content, "hashed", hashed)
    with pytest.raises(LibraryError, match=TENSORS):
        remote.pull(library("other"), "cat")


@pytest.mark.parametrize(
    "text, size", [("10", 10), ("2KB", 2000), ("1.5 MiB", 3 << 19), ("10GiB", 10 << 30), ("1t", 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert limit_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1 PB", "ten", "1.2.3"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(LibraryError, match="no size"):
        limit_of(text)


def test_the_object_folder_can_be_read_by_a_person(library: Make, tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache"))
    near = library(seeds=(0,))
    remote.push(near, "cat")
    digest = near.version("cat").hash
    shutil.copytree(tmp_path / f"far/objects/{digest[:2]}/{digest}", tmp_path / "by-hand")
    from tarsia.adapter import load

    assert shelved.same(load(tmp_path / "by-hand"), shelved.adapter(0))
