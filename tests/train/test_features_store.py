"""The folder of features: what is read is what was put, the bound holds, and nobody's death spoils it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.core.errors import ConfigError
from tarsia.train import store as module
from tarsia.train.store import Store

WIDE = 10**9
FRESH = itertools.count()


def key(n: int) -> bytes:
    return hashlib.sha256(b"%d" % n).digest()


def value(n: int, size: int = 100) -> dict[str, torch.Tensor]:
    return {"output": torch.full((size,), n, dtype=torch.float32)}


def taken(folder: Path) -> int:
    """Bytes of every file but the lock, half-written ones too."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def counted_bytes(folder: Path) -> int:
    """What the writers believe; no lock yet is no entry yet."""
    lock = folder / ".lock"
    return int((lock.read_bytes() if lock.exists() else b"") or b"0")


def whole(folder: Path, numbers: range) -> int:
    """How many of the entries are there; each must hold what was put."""
    store = Store(folder, WIDE)
    found = [(n, store.get(key(n))) for n in numbers]
    assert all(torch.equal(held["output"], torch.full_like(held["output"], n)) for n, held in found if held)
    return sum(held is not None for _, held in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_what_is_read_is_what_was_put(dtype, tmp_path):
    put = {"a": torch.randn(3, 5).to(dtype), "b.1": torch.zeros(0, 4, dtype=dtype), "c": torch.arange(6).view(2, 3).T}
    Store(tmp_path, WIDE).put(key(1), put)
    got = Store(tmp_path, WIDE).get(key(1))
    assert set(got) == set(put)
    for name, tensor in put.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    assert Store(tmp_path, WIDE).get(key(2)) is None


def test_bits_that_are_no_number_are_kept(tmp_path):
    put = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000], dtype=torch.int64).to(torch.int32).view(torch.float32)
    store = Store(tmp_path, WIDE)
    store.put(key(1), {"output": put})
    assert torch.equal(store.get(key(1))["output"].view(torch.int32), put.view(torch.int32))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("written"), WIDE)
    store.put(key(1), value(1, 20))
    return store, store._path(key(1)), store._path(key(1)).read_bytes()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_entry_that_was_changed_is_seen_removed_and_told(written, data):
    store, path, content = written
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        mask = data.draw(st.integers(1, 255))
        bad = content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]
    else:
        bad = content[: data.draw(st.integers(0, len(content) - 1))] + data.draw(st.sampled_from([b"", b"\0"]))
    if bad == content:
        return
    path.write_bytes(bad)
    before = store.damaged
    assert store.get(key(1)) is None
    assert not path.exists()
    assert store.damaged == before + 1 and "damaged" in store.told[0]
    store.put(key(1), value(1, 20))
    assert torch.equal(store.get(key(1))["output"], value(1, 20)["output"])


def test_an_entry_under_anothers_name_is_seen(tmp_path):
    store = Store(tmp_path, WIDE)
    store.put(key(1), value(1))
    wrong = store._path(key(2))
    wrong.parent.mkdir(exist_ok=True)
    store._path(key(1)).rename(wrong)
    assert store.get(key(2)) is None
    assert store.damaged == 1


def test_many_damaged_entries_are_told_once_and_counted(tmp_path):
    store = Store(tmp_path, WIDE)
    for n in range(5):
        store.put(key(n), value(n))
        store._path(key(n)).write_bytes(b"no")
    assert [store.get(key(n)) for n in range(5)] == [None] * 5
    assert (store.damaged, len(store.told)) == (5, 1)
    assert store.size() == (0, 0)


def test_a_checksum_that_is_not_looked_at_is_caught(tmp_path, monkeypatch):
    """The planted bug of the tests above: without the checksum a changed entry is taken for whole."""
    store = Store(tmp_path, WIDE)
    store.put(key(1), value(1))
    path = store._path(key(1))
    content = path.read_bytes()
    monkeypatch.setattr(module, "_sum", lambda key, body: module._HEADER.unpack_from(content)[3])
    path.write_bytes(content[:-1] + b"\x01")
    assert not torch.equal(store.get(key(1))["output"], value(1)["output"])


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    return tmp_path_factory.mktemp("bounded")


@settings(max_examples=40, deadline=None)
@given(
    limit=st.integers(0, 6000),
    acts=st.lists(
        st.tuples(st.sampled_from(["put", "get", "spoil", "open"]), st.integers(0, 9), st.integers(0, 400)), max_size=40
    ),
)
def test_the_bound_holds_after_every_act_of_two_writers(bounded, limit, acts):
    folder = bounded / f"{next(FRESH)}"
    stores = [Store(folder, limit), Store(folder, limit)]
    for i, (act, n, size) in enumerate(acts):
        store = stores[i % 2]
        if act == "put":
            store.put(key(n), value(n, size))
        elif act == "get":
            held = store.get(key(n))
            assert held is None or (held["output"] == n).all()
        elif act == "spoil" and store._path(key(n)).exists():
            store._path(key(n)).write_bytes(b"")
        elif act == "open":
            stores[i % 2] = Store(folder, limit)
        assert taken(folder) <= limit
        assert counted_bytes(folder) >= taken(folder)


def test_what_was_used_longest_ago_goes_first(tmp_path):
    one = len(module._encode(key(0), value(0)))
    store, other = Store(tmp_path, 10 * one), Store(tmp_path, 10 * one)
    for n in range(10):
        store.put(key(n), value(n))
    for n in (0, 1, 2):  # another process's use counts too
        other.get(key(n))
    store.put(key(10), value(10))
    assert store.evicted >= 1
    assert [n for n in range(11) if store.get(key(n)) is None] == [3, 4][: store.evicted]


def test_without_use_being_noted_the_wrong_ones_go(tmp_path, monkeypatch):
    """The planted bug of the test above."""
    one = len(module._encode(key(0), value(0)))
    store = Store(tmp_path, 10 * one)
    for n in range(10):
        store.put(key(n), value(n))
    monkeypatch.setattr(module.os, "utime", lambda *args, **keywords: None)
    store.get(key(0))
    store.put(key(10), value(10))
    monkeypatch.undo()
    assert store.get(key(0)) is None


def test_a_value_beyond_the_whole_bound_is_told_and_not_written(tmp_path):
    store = Store(tmp_path, 500)
    store.put(key(1), value(1, 1000))
    store.put(key(2), value(2, 1000))
    store.put(key(3), value(3, 10))
    assert (store.unwritten, len(store.told), store.size()[1]) == (2, 1, 1)


def test_leftovers_of_killed_writers_are_cleared(tmp_path):
    for n in range(3):
        (tmp_path / f".writing-{n}").write_bytes(bytes(1000))
    store = Store(tmp_path, 2000)
    assert taken(tmp_path) == 0
    (tmp_path / ".writing-9").write_bytes(bytes(100))
    for n in range(6):
        store.put(key(n), value(n))
    assert not list(tmp_path.glob(".writing-*"))


def refusing(number):
    def refuse(*args, **keywords):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number, said", [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota")])
def test_a_full_disk_is_told_once_and_reading_goes_on(number, said, tmp_path, monkeypatch):
    store = Store(tmp_path, WIDE)
    store.put(key(1), value(1))
    monkeypatch.setattr(module.os, "replace", refusing(number))
    for n in (2, 3):
        store.put(key(n), value(n))
    assert len(store.told) == 1 and said in store.told[0]
    assert store.unwritten == 2
    assert not list(tmp_path.glob(".writing-*"))
    assert store.get(key(2)) is None
    assert torch.equal(store.get(key(1))["output"], value(1)["output"])


def test_a_folder_that_is_only_read_serves(tmp_path, monkeypatch):
    Store(tmp_path, WIDE).put(key(1), value(1))
    monkeypatch.setattr(module.os, "open", refusing(errno.EROFS))
    monkeypatch.setattr(module.os, "utime", refusing(errno.EROFS))
    store = Store(tmp_path, WIDE)
    store.put(key(2), value(2))
    assert store.get(key(1)) is not None and store.get(key(2)) is None
    assert len(store.told) == 1 and "Read-only" in store.told[0]


def test_a_folder_that_is_removed_meanwhile_is_told_and_stops_nothing(tmp_path):
    store = Store(tmp_path / "kept", WIDE)
    store.put(key(1), value(1))
    shutil.rmtree(tmp_path / "kept")
    assert store.get(key(1)) is None
    assert store.size() == (0, 0)
    store.put(key(2), value(2))
    assert store.unwritten == 1
    assert len(store.told) == 2 and "can no longer be read" in store.told[0]


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="can not be used"):
        Store(tmp_path / "file", WIDE)


def test_a_writer_that_was_stopped_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.01)
    store = Store(tmp_path, WIDE)
    with (tmp_path / ".lock").open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        store.put(key(1), value(1))
        store.put(key(2), value(2))
    assert (store.unwritten, len(store.told)) == (2, 1)
    store.put(key(3), value(3))
    assert store.get(key(3)) is not None


def fill(folder: str, limit: int, seed: int) -> None:
    """Put and get at random; dies with a wrong value."""
    store, chance = Store(Path(folder), limit), random.Random(seed)
    for _ in range(120):
        n = chance.randrange(30)
        held = store.get(key(n))
        if held is None:
            store.put(key(n), value(n))
        else:
            assert torch.equal(held["output"], value(n)["output"])
    assert (store.damaged, store.unwritten) == (0, 0)


@pytest.mark.parametrize("share", [2.0, 0.3])
def test_two_processes_fill_one_folder(share, tmp_path):
    limit = int(30 * len(module._encode(key(0), value(0))) * share)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tarsia.train.store"])
    processes = [context.Process(target=fill, args=(str(tmp_path), limit, seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert taken(tmp_path) <= limit
    assert whole(tmp_path, range(30)) > 0


def killed_at(folder: Path, limit: int, moment: int) -> None:
    """A child that writes and reads, and is killed at the given call that touches the disk."""
    child = os.fork()
    if not child:
        left = [moment]

        def counted(function):
            def call(*args, **keywords):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **keywords)

            return call

        for name in ("open", "close", "pwrite", "pread", "replace", "utime", "scandir", "mkdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        Path.open, Path.unlink, Path.mkdir = counted(Path.open), counted(Path.unlink), counted(Path.mkdir)
        store = Store(folder, limit)
        while True:
            for n in range(40):
                store.put(key(n), value(n))
                store.get(key(n))
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_while_writing_nothing_is_corrupt_and_the_bound_holds(seed, tmp_path):
    chance = random.Random(seed)
    limit = 12 * len(module._encode(key(0), value(0)))
    for moment in [*range(0, 24, 2), *(chance.randrange(800) for _ in range(8))]:
        killed_at(tmp_path, limit, moment)
        assert taken(tmp_path) <= limit
        assert counted_bytes(tmp_path) >= taken(tmp_path)
        store = Store(tmp_path, limit)
        assert not list(tmp_path.glob(".writing-*"))
        whole(tmp_path, range(40))
        assert store.damaged == 0


@pytest.mark.slow
def test_killed_by_the_clock_nothing_is_corrupt(tmp_path):
    chance = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    limit = 20 * len(module._encode(key(0), value(0)))
    for seed in range(20):
        process = context.Process(target=fill, args=(str(tmp_path), limit, seed))
        process.start()
        time.sleep(chance.uniform(0.0, 0.2))
        process.kill()
        process.join()
        whole(tmp_path, range(30))
        assert taken(tmp_path) <= limit


def test_a_count_made_after_writing_breaks_the_bound_when_killed(tmp_path, monkeypatch):
    """The planted bug: counted after the rename, a kill in between leaves a number that is too low."""
    store = Store(tmp_path, WIDE)
    monkeypatch.setattr(module, "_note", lambda handle, total: None)
    store.put(key(1), value(1))
    assert counted_bytes(tmp_path) < taken(tmp_path)
