"""A version is looked at wholly once, then only mapped; whatever changes a file is seen; nothing gets into a file."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from library import shelved
from safetensors.torch import load_file, save_file

from tarsia.adapter import files as adapter_files
from tarsia.adapter import load, save
from tarsia.adapter.files import load_mapped
from tarsia.adapter.mapped import map_tensors
from tarsia.adapter.reading import check_finite
from tarsia.core.errors import AdapterError, LibraryError
from tarsia.library import Library, index, opening
from tarsia.library.opening import open_adapter

TENSORS, OURS = "adapter_model.safetensors", "tarsia.json"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """With one adapter of two versions; times count as settled at once."""
    monkeypatch.setattr(opening, "SETTLED", -60.0)
    made = Library.make(tmp_path / "library")
    for seed in (0, 1):
        save(shelved.adapter(seed), tmp_path / "a")
        made.publish(tmp_path / "a", "a")
    return made


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose numbers were looked at, in order."""
    seen: list[Path] = []
    header = adapter_files.header

    def watched(path: Path) -> object:
        seen.append(path)
        return header(path)

    monkeypatch.setattr(adapter_files, "header", watched)
    return seen


def folder(library: Library, reference: str = "a") -> Path:
    place = library.folder(library.version(reference))
    place.chmod(0o755)
    return place


def test_a_version_is_the_adapter_that_was_saved(library: Library) -> None:
    for number, seed in ((1, 0), (2, 1), (1, 0)):
        opened = open_adapter(library, f"a@{number}")
        assert shelved.same(opened, shelved.adapter(seed))
        assert not shelved.same(opened, shelved.adapter(1 - seed))
        probe, saved = opened.probe, shelved.adapter(seed).probe
        assert probe is not None and saved is not None and torch.equal(probe.logits, saved.logits)


def test_it_is_looked_at_once(library: Library, looked: list[Path]) -> None:
    open_adapter(library, "a")
    assert {path.name for path in looked} == {TENSORS, "probe.safetensors"}
    looked.clear()
    for _ in range(3):
        open_adapter(library, "a")
    assert looked == []
    open_adapter(library, "a@1")
    assert looked != []


def same_length(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def same_times(path: Path) -> None:
    """Whoever sets the times back still can not set that of the inode."""
    was = path.stat()
    same_length(path)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def another_inode(path: Path) -> None:
    beside = path.with_name("beside")
    shutil.copy2(path, beside)
    same_times(beside)
    os.replace(beside, path)


@pytest.mark.parametrize("name", [TENSORS, "probe.safetensors", OURS, "adapter_config.json"])
@pytest.mark.parametrize("change", [same_length, same_times, another_inode, Path.unlink])
def test_a_change_since_is_seen(library: Library, name: str, change: object) -> None:
    open_adapter(library, "a")
    assert callable(change)
    change(folder(library) / name)
    with pytest.raises(LibraryError, match=name):
        open_adapter(library, "a")
    open_adapter(library, "a@1")


def test_a_touched_file_is_looked_at_again(library: Library, looked: list[Path]) -> None:
    open_adapter(library, "a")
    (folder(library) / TENSORS).touch()
    looked.clear()
    open_adapter(library, "a")
    assert looked != []
    looked.clear()
    open_adapter(library, "a")
    assert looked == []


def test_a_file_that_changes_while_it_is_read(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """First read or later one: what was given out is what the index knows, or nothing is."""
    read = opening.load_mapped

    def meddling(place: Path, *, whole: bool = False) -> object:
        adapter = read(place, whole=whole)
        same_length(place / TENSORS)
        return adapter

    place = folder(library)
    content = (place / TENSORS).read_bytes()
    monkeypatch.setattr(opening, "load_mapped", meddling)
    with pytest.raises(LibraryError, match="while they were read"):
        open_adapter(library, "a")
    monkeypatch.setattr(opening, "load_mapped", read)
    (place / TENSORS).write_bytes(content)
    open_adapter(library, "a")
    monkeypatch.setattr(opening, "load_mapped", meddling)
    with pytest.raises(LibraryError, match=TENSORS):
        open_adapter(library, "a")


def test_fresh_times_are_not_trusted(library: Library, looked: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file could be changed twice within one tick of the clock that its times are told by."""
    monkeypatch.setattr(opening, "SETTLED", 3600.0)
    for _ in range(2):
        looked.clear()
        open_adapter(library, "a")
        assert looked != []


def test_when_times_are_settled(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    changed = path.stat().st_ctime_ns / 1e9
    assert not opening.settled(tmp_path, ["x"], changed + 0.05)
    assert opening.settled(tmp_path, ["x"], changed + 0.2)


def test_what_is_written_to_a_tensor_stays_out_of_the_file(library: Library) -> None:
    before = (folder(library) / TENSORS).read_bytes()
    opened = open_adapter(library, "a")
    for patched in opened.patches.values():
        for value in patched.tensors.values():
            value.fill_(7.0)
    assert (folder(library) / TENSORS).read_bytes() == before
    assert shelved.same(open_adapter(library, "a"), shelved.adapter(1))


def test_tensors_outlive_the_adapter_and_the_file(library: Library) -> None:
    value = open_adapter(library, "a").patches[shelved.SITES[0]].tensors["A"]
    wanted = shelved.adapter(1).patches[shelved.SITES[0]].tensors["A"]
    shutil.rmtree(folder(library))
    gc.collect()
    assert torch.equal(value, wanted)


def test_no_file_stays_open_and_no_mapping_either(library: Library) -> None:
    def state() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count(TENSORS)
        return len(os.listdir("/proc/self/fd")), maps

    open_adapter(library, "a")
    before = state()
    opened = [open_adapter(library, "a") for _ in range(20)]
    assert state() == (before[0], before[1] + 20)
    del opened
    assert state() == before


def test_an_opened_adapter_can_be_saved(library: Library, tmp_path: Path) -> None:
    save(open_adapter(library, "a"), tmp_path / "again")
    assert shelved.same(load(tmp_path / "again"), shelved.adapter(1))


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("probed", [True, False])
def test_mapped_and_loaded_are_one(tmp_path: Path, peft: bool, probed: bool) -> None:
    save(shelved.adapter(3, peft=peft, probed=probed), tmp_path / "a")
    assert shelved.same(load(tmp_path / "a"), shelved.adapter(3, probed=probed))
    assert shelved.same(load_mapped(tmp_path / "a"), load(tmp_path / "a"))
    assert shelved.same(load_mapped(tmp_path / "a", whole=True), load(tmp_path / "a"))


def test_a_folder_of_before_is_read_as_ever(tmp_path: Path) -> None:
    """Without sizes, seal and the digest of the configuration."""
    save(shelved.adapter(), tmp_path / "a")
    path = tmp_path / "a" / OURS
    described = json.loads(path.read_text())
    del described["seal"], described["bytes"], described["sha256"]["adapter_config.json"]
    path.write_text(json.dumps(described, indent=2))
    assert shelved.same(load(tmp_path / "a"), shelved.adapter())


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.float64]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_mapped_tensors_are_those_of_safetensors(tmp_path_factory: pytest.TempPathFactory, drawn: list) -> None:
    path = tmp_path_factory.mktemp("m") / "x.safetensors"
    save_file({f"t{n}": (torch.randn(shape) * 9).to(dtype) for n, (dtype, shape) in enumerate(drawn)}, path)
    held, mapped = load_file(path), map_tensors(path)
    assert held.keys() == mapped.keys()
    for key, value in held.items():
        assert (value.dtype, value.shape) == (mapped[key].dtype, mapped[key].shape) and torch.equal(value, mapped[key])


def test_a_tensor_that_lies_askew_is_copied(tmp_path: Path) -> None:
    """A table whose length is no multiple of 8, as no present writer makes it."""
    table = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    table += b" " * ((3 - len(table)) % 8)
    data = torch.tensor([1.5, -2.0])
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(table).to_bytes(8, "little") + table + data.numpy().tobytes())
    assert torch.equal(map_tensors(path)["a"], data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_is_found_wherever_it_lies(dtype: torch.dtype, wrong: float) -> None:
    if dtype.itemsize == 1 and wrong == wrong:
        wrong = torch.nan  # this one has no infinity
    for length in (1, 7, 33, 130):
        for place in {0, 1, length // 2, length - 1} & set(range(length)):
            value = torch.linspace(-3, 3, length).to(dtype)
            check_finite({"x": value})
            value[place] = wrong
            with pytest.raises(AdapterError, match="no numbers"):
                check_finite({"x": value})


def test_a_full_disk_keeps_nobody_from_reading(
    library: Library, looked: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def refused(_: object, patience: float) -> Iterator[None]:
        raise index.Full("The library can not be used; what was published is as it was.")
        yield

    monkeypatch.setattr(index, "writing", refused)
    for _ in range(2):
        looked.clear()
        assert shelved.same(open_adapter(library, "a"), shelved.adapter(1))
        assert looked != []
