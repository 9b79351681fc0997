"""Spoilt files are refused with their name: by ``load``, by publish, by open and by verify. No crash, hang or heap."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from library import corruptions, shelved
from library.corruptions import Corruption
from safetensors.torch import save_file

from tarsia.adapter import load, save
from tarsia.adapter.files import load_mapped
from tarsia.core.errors import LibraryError, TarsiaError
from tarsia.library import Library, content
from tarsia.library.opening import open_adapter
from tarsia.library.verify import verify

MEMORY = 1 << 30
SECONDS = 20
SEED = 20_260


class TooLongError(Exception):
    """A file kept its reader busy."""


@contextmanager
def bounded() -> Iterator[None]:
    """No more than another GiB of addresses, and 20 seconds."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def late(_: int, __: FrameType | None) -> None:
        raise TooLongError

    old = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def fault(corruption: Corruption, read: Callable[[], object]) -> str | None:
    """What is wrong with how a corruption was met; None: it was refused, with its file."""
    try:
        with bounded():
            read()
    except TarsiaError as error:
        named = any(name in str(error) for name in corruption.files)
        return None if named else f"{corruption.what}: refused without its file: {error}"
    except (Exception, MemoryError) as error:  # noqa: BLE001 (whatever comes is the finding)
        return f"{corruption.what}: {type(error).__name__} {str(error)[:200]}"
    return f"{corruption.what}: not refused"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter in PEFT's form, and another one."""
    root = tmp_path_factory.mktemp("whole")
    save(shelved.adapter(0), root / "a")
    save(shelved.adapter(1), root / "b")
    # their configurations are to differ too, as an exchange of equal files is none
    return root / "a", root / "b"


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


def met(source: Path, spoilt: Path, every: Iterator[Corruption], read: Callable[[Path], object] = load) -> list[str]:
    """The faults of ``load``, or of another reader, at each corruption."""
    found = []
    for corruption in every:
        corruption.spoil(copied(source, spoilt))
        found.append(fault(corruption, lambda: read(spoilt)))
    return [text for text in found if text is not None]


def shelf(root: Path, source: Path) -> Library:
    """A library that holds the adapter, which was read once."""
    library = Library.make(root)
    library.publish(source, "a")
    open_adapter(library, "a")
    return library


def met_on_the_shelf(library: Library, every: Iterator[Corruption]) -> list[str]:
    """The faults of open and of verify where a version's own files are spoilt behind the library's back."""
    place = library.folder(library.version("a"))
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    place.chmod(0o755)
    found: list[str | None] = []
    for corruption in every:
        for path in place.iterdir():
            path.chmod(0o644)
        corruption.spoil(place)
        found.append(fault(corruption, lambda: open_adapter(library, "a")))
        said = str(verify(library.places, ["a"]).faults)
        if not any(name in said for name in corruption.files):
            found.append(f"{corruption.what}: verify says {said[:200]}")
        for path in list(place.iterdir()):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, raw in whole.items():
            (place / name).write_bytes(raw)
    open_adapter(library, "a")
    return [text for text in found if text is not None]


def met_at_the_door(library: Library, source: Path, spoilt: Path, every: Iterator[Corruption]) -> list[str]:
    """The faults of publish, and of open where publish, which looks at no number, has let something in."""
    found = []

    def brought() -> None:
        published = library.publish(spoilt, f"n{len(found)}")
        open_adapter(library, published.version.reference)

    for corruption in every:
        corruption.spoil(copied(source, spoilt))
        found.append(fault(corruption, brought))
    return [text for text in found if text is not None]


def test_a_sample_of_accidents(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert met(folders[0], tmp_path / "s", corruptions.accidents(SEED, 200, folders[1])) == []


def test_every_hostile_file_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert met(folders[0], tmp_path / "s", corruptions.hostile(SEED, 160)) == []


def test_no_hostile_file_is_mapped(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Where nothing but our own reading stands between a table and the memory."""
    assert met(folders[0], tmp_path / "s", corruptions.hostile(SEED, 160), load_mapped) == []


def test_accidents_on_the_shelf(folders: tuple[Path, Path], tmp_path: Path) -> None:
    library = shelf(tmp_path / "library", folders[0])
    assert met_on_the_shelf(library, corruptions.accidents(SEED, 60, folders[1])) == []


def test_hostile_files_at_the_door(folders: tuple[Path, Path], tmp_path: Path) -> None:
    library = shelf(tmp_path / "library", folders[0])
    assert met_at_the_door(library, folders[0], tmp_path / "s", corruptions.hostile(SEED, 60)) == []


@pytest.mark.slow
def test_a_thousand_spoilt_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    every = [*corruptions.accidents(SEED + 1, 840, folders[1]), *corruptions.hostile(SEED, 160)]
    assert len(every) == 1000 and met(folders[0], tmp_path / "s", iter(every)) == []


@pytest.mark.slow
def test_a_thousand_in_a_library(folders: tuple[Path, Path], tmp_path: Path) -> None:
    library = shelf(tmp_path / "library", folders[0])
    assert met_on_the_shelf(library, corruptions.accidents(SEED + 2, 840, folders[1])) == []
    assert met_at_the_door(library, folders[0], tmp_path / "s", corruptions.hostile(SEED, 160)) == []


def test_what_is_met_with_nothing_is_seen(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The check itself: what is not refused, refused without a file, or refused by another exception."""
    harmless = Corruption("nothing", ("x",), lambda folder: None)
    assert "not refused" in met(folders[0], tmp_path / "s", iter([harmless]))[0]
    misnamed = Corruption("no weights", ("x",), lambda folder: (folder / corruptions.TENSORS).unlink())
    assert "without its file" in met(folders[0], tmp_path / "s", iter([misnamed]))[0]
    assert "ZeroDivisionError" in str(fault(harmless, lambda: 1 // 0))
    assert "MemoryError" in str(fault(harmless, lambda: bytearray(4 * MEMORY)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_publish_finds_what_is_no_number(tmp_path: Path, dtype: torch.dtype) -> None:
    """Wherever it lies, beyond the first piece too, and nothing else is taken for it."""
    path = tmp_path / corruptions.TENSORS
    greatest = torch.finfo(dtype).max
    values = torch.full(((1 << 20) // dtype.itemsize + 7,), greatest, dtype=dtype)
    for place in (None, 0, 5, -8, -1):
        for wrong in (torch.nan, torch.inf, -torch.inf) if place is not None else (-greatest,):
            held = values.clone()
            held[place or 0] = wrong
            save_file({"a": torch.zeros(3, dtype=dtype), "b": torch.zeros(0, dtype=dtype), "c": held}, path)
            if place is None:
                assert content.table(path, path)["c"] == held.shape
                continue
            with pytest.raises(LibraryError, match=f"no numbers.*\n.*{path.name}: c"):
                content.table(path, path)
