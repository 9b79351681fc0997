"""An adapter's folder as the library holds it: its files, their hashes, what tarsia.json says. Nothing imports torch.

The hash of a content is that of its files' names and SHA-256, as any system can compute it in that folder:
``LC_ALL=C sha256sum * | sha256sum``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from tarsia.core import seal, tables
from tarsia.core.errors import LibraryError
from tarsia.library.numbers import EXPONENTS, unreal

CONFIG, TENSORS, PROBE, OURSELVES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "probe.safetensors",
    "tarsia.json",
)
FILES: Final = (CONFIG, TENSORS, PROBE, OURSELVES)
"""What an adapter is made of; PROBE may be missing."""

JSON_BYTES: Final = 1 << 27
"""The longest description that is read."""

FORMAT: Final = 1
"""The format of tarsia.json that is understood."""

FINGERPRINT: Final = ("weights", "architecture", "quantisation", "processor", "template")
AGAIN: Final = "save or fetch the adapter again, all of one version"


@dataclass(frozen=True, slots=True)
class File:
    """One file: hexadecimal SHA-256 of its bytes, and how many."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Content:
    """Files by name, what tarsia.json says, and how many numbers the tensors hold."""

    files: Mapping[str, File]
    described: Mapping[str, Any]
    numbers: int

    @property
    def hash(self) -> str:
        """The content's own: 64 hexadecimal digits."""
        return hash_of(self.files)

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.bytes for file in self.files.values())


def hash_of(files: Mapping[str, File]) -> str:
    """The hash of a content, from the hashes of its files."""
    lines = "".join(f"{files[name].sha256}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def hashed(path: Path) -> File:
    """Size and hash of a file as it lies there now. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(digest, file.tell())


def damage(folder: Path, files: Mapping[str, File]) -> tuple[str, ...]:
    """What is wrong with the folder of a content that should hold ``files``, each with its file; empty: nothing is."""
    try:
        there = {path.name for path in folder.iterdir()}
    except OSError as error:
        return (f"{folder}: {error.strerror or error}",)
    found = [f"{folder / name}: belongs to nothing" for name in sorted(there - set(files))]
    for name, wanted in files.items():
        try:
            held = hashed(folder / name)
        except OSError as error:
            found.append(f"{folder / name}: {error.strerror or error}")
            continue
        if held.bytes != wanted.bytes:
            found.append(f"{folder / name}: {held.bytes} bytes, not {wanted.bytes}")
        elif held != wanted:
            found.append(f"{folder / name}: sha256 {held.sha256[:12]}, not {wanted.sha256[:12]}")
    return tuple(found)


def take(source: Path, target: Path) -> tuple[Content, tuple[str, ...]]:
    """Copy an adapter's files into the empty folder ``target`` and look at the copies; also what was not taken.

    Files are hashed as they lie in ``target``, and held to the hashes in tarsia.json. Raises LibraryError where the
    source is no whole adapter of ours.
    """
    try:
        handle = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise LibraryError(
            "There is no such adapter.", given=f"{source}: {error.strerror}", do="give the folder that it was saved in"
        ) from None
    try:
        there = sorted(os.listdir(handle))
        if OURSELVES not in there:
            raise LibraryError(
                "This is no adapter that Tarsia saved.",
                given=f"{source}: no {OURSELVES}",
                do="an adapter of PEFT's is imported against its base first" if CONFIG in there else None,
            )
        for name in FILES:
            if name in there:
                _copy(source, name, handle, target)
    finally:
        os.close(handle)
    return look(target, source), tuple(name for name in there if name not in FILES)


def _copy(source: Path, name: str, folder: int, target: Path) -> None:
    # by the folder's handle: should another take its place now, these are still files of the first
    with _read(source / name):
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise LibraryError("This is no file.", given=str(source / name), do=AGAIN)
        _check_length(source / name, file)
        with (target / name).open("xb") as copy:
            while part := _part(source / name, file):
                copy.write(part)


@contextmanager
def _read(path: Path) -> Iterator[None]:
    """What the system refuses, told of the file: it is no fault of the library's."""
    try:
        yield
    except OSError as error:
        given = f"{path}: {error.strerror or error}"
        raise LibraryError("A file of the adapter can not be read.", given=given, do="see to its rights") from None


def _part(path: Path, file: BinaryIO) -> bytes:
    with _read(path):
        return file.read(1 << 20)


def _check_length(path: Path, file: BinaryIO) -> None:
    """Refuse, before it is copied, a file that can be seen to be none by its length. It is read from its beginning."""
    size = os.fstat(file.fileno()).st_size
    if path.name.endswith(".safetensors"):
        most = min(size - 8, tables.LONGEST)
        if not 0 < int.from_bytes(file.read(8), "little") <= most:
            given = f"{path}, {size} bytes"
            raise LibraryError(f"{path.name} is truncated or no safetensors file.", given=given, do=AGAIN)
    elif size > JSON_BYTES:
        raise LibraryError(f"{path.name} is too long.", given=f"{path}, {size} bytes", allowed=JSON_BYTES, do=AGAIN)
    file.seek(0)


def look(folder: Path, said: Path | None = None) -> Content:
    """What a folder holds, with all that can be checked without torch. ``said`` is the folder named in refusals.

    Raises LibraryError where a file is missing, tarsia.json is none, or tensors are not those that it names.
    """
    said = folder if said is None else said
    files = {name: hashed(folder / name) for name in FILES if (folder / name).is_file()}
    missing = [name for name in (CONFIG, TENSORS) if name not in files]
    if missing:
        raise LibraryError("The adapter is not whole.", given=f"{said}: no {' and no '.join(missing)}", do=AGAIN)
    read_json(folder / CONFIG, said / CONFIG)
    described = read_json(folder / OURSELVES, said / OURSELVES)
    if described.get("format") != FORMAT:
        raise LibraryError(
            "tarsia.json is of another format.", given=described.get("format"), allowed=FORMAT, do="update tarsia"
        )
    try:
        wrong = _wrong(described, files)
        held = {name: table(folder / name, said / name) for name in files if name.endswith(".safetensors")}
        wanted = [str(key) for patch in described["patches"].values() for key in patch["tensors"].values()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        wrong = f"{type(error).__name__} {error}"
    if wrong:
        raise LibraryError("tarsia.json is incomplete, or was edited.", given=f"{said / OURSELVES}: {wrong}", do=AGAIN)
    for name, file in files.items():
        if described["sha256"].get(name, file.sha256) != file.sha256:
            raise LibraryError(
                f"{name} is not the file that was saved: truncated, or changed since.",
                given=f"{said / name}, {file.bytes} bytes",
                do=AGAIN,
            )
    if "seal" in described and not seal.intact((folder / OURSELVES).read_bytes(), described["seal"]):
        given = str(said / OURSELVES)
        raise LibraryError("tarsia.json is not the file that was saved: damaged or edited.", given=given, do=AGAIN)
    if set(held[TENSORS]) != set(wanted):
        differing = sorted(set(held[TENSORS]) ^ set(wanted))
        given = f"{said}: {', '.join(differing[:3])}"
        raise LibraryError(f"{TENSORS} and tarsia.json do not agree.", given=given, do=AGAIN)
    return Content(files, described, sum(math.prod(shape) for shape in held[TENSORS].values()))


def _wrong(described: Mapping[str, Any], files: Mapping[str, File]) -> str:
    """What is wrong with what tarsia.json says; empty: nothing is seen. Raises KeyError and the like as well."""
    base, fingerprint = described["base"], described["fingerprint"]
    if not (base is None or isinstance(base, str)):
        return f"base {base!r}"
    plain = isinstance(fingerprint, dict) and all(isinstance(v, str) for v in fingerprint.values())
    if fingerprint is not None and not (plain and sorted(fingerprint) == sorted(FINGERPRINT)):
        return "the fingerprint is none"
    if not isinstance(described["card"], dict) or not isinstance(described["layout"], dict):
        return "no card or no layout"
    if not described["patches"] or not all(isinstance(p["method"], str) for p in described["patches"].values()):
        return "no patches"
    if not all(isinstance(part["method"], str) for part in described["parts"]):
        return "parts without a method"
    hashes = described["sha256"]
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        return "the hashes are none"
    expected = {TENSORS} | ({PROBE} if described["probe"] is not None else set())
    if set(hashes) - {CONFIG} != expected or expected != {n for n in files if n.endswith(".safetensors")}:
        return f"hashes of {', '.join(hashes)}"
    return ""


def read_json(path: Path, said: Path | None = None) -> dict[str, Any]:
    """A JSON object. Raises LibraryError, naming ``said``, where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LibraryError(f"{path.name} can not be read.", given=f"{said or path}: {error}", do=AGAIN) from None
    if not isinstance(value, dict):
        raise LibraryError(f"{path.name} is no JSON object.", given=str(said or path), do=AGAIN)
    return value


def table(path: Path, said: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, by key.

    Raises LibraryError where it is no whole one, or the adapter's own and holds what is no number.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= min(size - 8, tables.LONGEST) else b""
    try:
        entries = tables.parse(raw, size - 8 - length)
        odd = [key for key, entry in entries.items() if path.name == TENSORS and entry["dtype"] not in EXPONENTS]
        if odd or not entries:
            raise ValueError(f"{odd[0][:80]} is no number that is trained" if odd else "there is no tensor")
    except ValueError as error:
        raise LibraryError(
            f"{path.name} is truncated or no safetensors file.", given=f"{said}, {size} bytes: {error}", do=AGAIN
        ) from None
    if path.name == TENSORS and (key := unreal(path, entries, 8 + length)) is not None:
        raise LibraryError("The adapter holds values that are no numbers.", given=f"{said}: {key}", do=AGAIN)
    return {key: tuple(entry["shape"]) for key, entry in entries.items()}
