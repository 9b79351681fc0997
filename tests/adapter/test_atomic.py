"""Killed at any moment, or out of room: a folder is the old adapter or the new one, whole."""

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tarsia.adapter import Adapter, Fingerprint, Patched, atomic, files, load, save
from tarsia.adapter.layout import Layout
from tarsia.core.attach import Part
from tarsia.core.errors import AdapterError
from tarsia.methods.lora import LoRAConfig


def adapter(value, size=64):
    """An adapter whose every number is ``value``."""
    tensors = {"A": torch.full((4, size), float(value)), "B": torch.full((size, 4), float(value))}
    held = {f"m.{i}": Patched("lora", {"scale": 2.0, "dropout": 0.0}, tensors) for i in range(4)}
    held = {k: Patched(p.method, p.constants, {n: t.clone() for n, t in p.tensors.items()}) for k, p in held.items()}
    part = Part("lora", "*", LoRAConfig(rank=4, alpha=8.0))
    base = Fingerprint("files:0", "1", "2", "3", "4")
    return Adapter((part,), held, Layout(tuple(held), (), {}, ()), None, base, {"value": value})


def value_of(folder):
    """The number that the whole folder agrees on."""
    held = load(folder)
    numbers = {float(n) for p in held.patches.values() for t in p.tensors.values() for n in t.unique()}
    assert numbers == {float(held.card["value"])}
    return held.card["value"]


KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from test_atomic import adapter, value_of
from tarsia.adapter import save
folder = {folder!r}

def killed(act, moment):
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    moment(child)
    return os.waitpid(child, 0)[1] != 0

def at_line(number):
    # SIGKILL on the n-th line that runs in the files that write
    seen = 0
    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(("adapter/atomic.py", "adapter/files.py")):
            return None
        if event == "line":
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

results = []
save(adapter(0), folder)
number = 0
while True:
    number += {step}
    before = value_of(folder)
    def act():
        new = adapter(number)
        at_line(number)
        save(new, folder)
        sys.settrace(None)
    dead = killed(act, lambda child: None)
    now = value_of(folder)
    assert now in (before, number), (before, number, now)
    results.append(now == number)
    if not dead:
        assert now == number
        break
print("lines", number, "old", results.count(False), "new", results.count(True))

draw = random.Random(0)
start = time.perf_counter()
save(adapter(1), folder)
once = time.perf_counter() - start
kills = old = 0
for attempt in range(10000, 10020):
    before = value_of(folder)
    def act():
        while True:
            save(adapter(attempt), folder)
    def moment(child):
        time.sleep(draw.uniform(0, 3 * once))
        os.kill(child, signal.SIGKILL)
    kills += killed(act, moment)
    now = value_of(folder)
    assert now in (before, attempt)
    old += now == before
print("moments", kills, "old", old)
save(adapter(5), folder)
assert value_of(folder) == 5
assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)], os.listdir(os.path.dirname(folder))
"""


def test_sigkill_at_every_step_and_at_random_moments(tmp_path):
    program = KILLER.format(here=str(Path(__file__).parent), folder=str(tmp_path / "shelf" / "a"), step=12)
    paths = [str(Path(files.__file__).parents[2]), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    _, old, new = map(int, re.search(r"lines (\d+) old (\d+) new (\d+)", run.stdout).groups())
    assert old > 8  # kills before the step that counts
    assert new >= 1  # and after it
    assert "moments 20" in run.stdout


def test_a_save_that_is_not_atomic_is_found(tmp_path, monkeypatch):
    """Planted: the folder is emptied and written in place; the same check as above then fails."""

    def in_place(folder, write, mine):
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        write(folder)

    save(adapter(1), tmp_path / "a")
    monkeypatch.setattr(files, "write_folder", in_place)
    monkeypatch.setattr(files, "_write_text", lambda text, path: os._exit(9))
    child = os.fork()
    if child == 0:
        save(adapter(2), tmp_path / "a")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(AdapterError):
        value_of(tmp_path / "a")


def check_as_before(folder):
    assert value_of(folder) == 1
    assert os.listdir(folder.parent) == [folder.name]


@pytest.mark.parametrize("name", ["_write_tensors", "_write_text"])
def test_no_space(tmp_path, monkeypatch, name):
    def full(value, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    save(adapter(1), tmp_path / "a")
    monkeypatch.setattr(files, name, full)
    with pytest.raises(AdapterError, match="No space left"):
        save(adapter(2), tmp_path / "a")
    check_as_before(tmp_path / "a")
    with pytest.raises(AdapterError, match="No space left"):
        save(adapter(2), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_system_takes_no_more(tmp_path):
    """A real failing write: the system limits the size of a file."""
    save(adapter(1), tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        with pytest.raises(AdapterError, match="can not be written"):
            save(adapter(2), tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_as_before(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_that_can_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(AdapterError, match="can not be written"):
        save(adapter(1), tmp_path / "a")
    tmp_path.chmod(0o700)


def test_a_file_in_the_way_of_the_parent(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="can not be written"):
        save(adapter(1), tmp_path / "file" / "a")


def test_what_is_no_adapter_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    for name in ("thesis", "file", "link"):
        with pytest.raises(AdapterError, match="no adapter"):
            save(adapter(1), tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save(adapter(1), tmp_path / "empty")
    assert value_of(tmp_path / "empty") == 1


def test_a_file_system_that_can_not_exchange(tmp_path, monkeypatch):
    """Nothing is lost: both adapters are there, and the message says where."""

    class Refusing:
        def renameat2(self, *_):
            return -1

    save(adapter(1), tmp_path / "a")
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: Refusing())
    with pytest.raises(AdapterError, match="beside the old one") as raised:
        save(adapter(2), tmp_path / "a")
    kept = next(path for path in tmp_path.iterdir() if path.name != "a")
    assert str(kept) in str(raised.value)
    assert (value_of(tmp_path / "a"), value_of(kept)) == (1, 2)


def test_names_with_signs_of_patterns(tmp_path):
    (tmp_path / ".a[1]*.saving-dead").mkdir()
    (tmp_path / ".a1x.saving-other").mkdir()
    save(adapter(1), tmp_path / "a[1]*")
    assert sorted(os.listdir(tmp_path)) == [".a1x.saving-other", "a[1]*"]


def test_a_save_under_way_is_left_alone(tmp_path):
    """The temporary folder of a writer that lives is locked."""

    def write(fresh):
        save(adapter(2), tmp_path / "a")
        (fresh / files.OURSELVES).write_text("{}")

    atomic.write_folder(tmp_path / "a", write, files.is_adapter)
    assert (tmp_path / "a" / files.OURSELVES).read_text() == "{}"
