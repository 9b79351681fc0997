"""A library on any path that fsspec reaches: s3://, gs://, sftp://, a folder. Plain files; no database, no locks.

objects/ab/ab12.../FILE               one adapter's files under the hash of its content
versions/NAME/000003-ab12....json     the record of version 3, with the hash of each file and of itself

A push uploads the files first and the record last. Records are what is listed, so half an upload is never seen; done
again, it goes on from what is there. Where files appear while they are written (folders, sftp) they are written under
another name and then renamed. Nothing is ever overwritten: two that push different contents as one number at the same
moment leave two records of that number, which then must be told apart by their hashes. All that arrives is hashed.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

from tarsia.core.errors import LibraryError
from tarsia.library import address, content, record
from tarsia.library.cache import Cache, default_cache
from tarsia.library.content import File
from tarsia.library.places import Reference, check_name
from tarsia.library.record import Version
from tarsia.library.store import Library, Published

ATTEMPTS: Final = 3
"""How often a download that was cut, or whose hash is wrong, is tried."""

WHOLE_OBJECTS: Final = frozenset({"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"})
"""Protocols in which a file appears when all of it has been written."""

_RECORD = re.compile(r"(?P<number>\d{6,18})-(?P<hash>[0-9a-f]{64})\.json")
_RECORD_BYTES, _PIECE = 1 << 20, 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class Listed:
    """One version of a remote, as the name of its record says."""

    name: str
    number: int
    hash: str

    @property
    def reference(self) -> str:
        """``name@3``."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True)
class Pushed:
    """The version at the remote; ``sent`` counts the bytes that had to be uploaded, ``fresh`` says if it is new."""

    listed: Listed
    fresh: bool
    sent: int


@dataclass(frozen=True, slots=True)
class Remote:
    """The library at ``url``; ``options``, and credentials, are fsspec's. What is fetched goes through ``cache``."""

    url: str
    cache: Cache = field(default_factory=lambda: Cache(default_cache()))
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> str:
        """The address without what may be a secret: a user's name and password, a query."""
        return address.parted(self.url)[0]

    def _clean(self, text: object) -> str:
        """What a transport, or a path, tells, in the same way."""
        return address.clean(self.url, str(text))

    def list(self, name: str | None = None) -> list[Listed]:
        """Versions by name and number. Raises LibraryError where there is no remote, or none that can be reached."""
        with self._at() as at:
            found = at.every() if name is None else at.versions(check_name(name))
            if not found and not at.fs.exists(at.root):
                do = "see to the address; tarsia library push makes a remote"
                raise LibraryError("The remote has nothing there.", given=self.said, do=do)
            return found

    def find(self, reference: Reference | str) -> Listed:
        """The version that a reference means: of a name alone the last. Tags do not travel.

        Raises LibraryError where there is none, or more than one.
        """
        asked = Reference.parse(reference) if isinstance(reference, str) else reference
        with self._at() as at:
            return at.find(asked)

    def push(self, library: Library, reference: Reference | str) -> Pushed:
        """Bring a version of the library to the remote, under its own number if that is free there, else the next.

        Raises LibraryError where the version's files are not what was published, or the remote can not be written.
        """
        version, folder = library.whole(reference)
        files = {path.name: content.hashed(path) for path in folder.iterdir()}
        if content.hash_of(files) != version.hash:
            raise LibraryError("The files were changed while they were read.", given=str(folder), do="try again")
        with self._at() as at:
            sent = at.send_files(folder, version.hash, files)
            there = at.versions(version.name)
            same = next((one for one in there if one.hash == version.hash), None)
            if same is not None:
                return Pushed(same, False, sent)
            taken = max((one.number for one in there), default=0)
            number = version.number if version.number not in {one.number for one in there} else taken + 1
            listed = Listed(version.name, number, version.hash)
            at.send(at.record(listed), record.write(replace(version, number=number, tags=()), files))
            return Pushed(listed, True, sent)

    @contextmanager
    def held(self, reference: Reference | str) -> Iterator[tuple[Version, Path]]:
        """A version of the remote, and the folder in the cache that its files lie in, all hashed.

        The folder is there as long as this lasts. Raises LibraryError where it can not be had whole.
        """
        asked = Reference.parse(reference) if isinstance(reference, str) else reference
        with ExitStack() as stack:
            with self._at() as at:
                listed = at.find(asked)
                version, files = at.read_record(listed)
                fetch = partial(at.fetch, listed)
                folder = stack.enter_context(self.cache.held(files, fetch))
            yield version, folder

    def folder(self, reference: Reference | str) -> tuple[Version, Path]:
        """The same, not held: whoever else fetches may drop the folder for want of room."""
        with self.held(reference) as found:
            return found

    def pull(self, library: Library, reference: Reference | str, name: str | None = None, **how: Any) -> Published:
        """Publish a version of the remote here, under its own name or ``name``; ``how`` is ``Library.publish``'s.

        The number is the library's next. Raises LibraryError as ``held`` and ``publish`` do.
        """
        with self.held(reference) as (version, folder):
            note = f"pulled from {self.said}, {version.reference} of {version.who}, {version.at}"
            return library.publish(folder, name or version.name, **{"note": note, **how})

    @contextmanager
    def _at(self) -> Iterator[_At]:
        """The file system, and its refusals as ours."""
        try:
            from fsspec.core import url_to_fs

            fs, root = url_to_fs(self.url, **self.options)
            fs.invalidate_cache()
            yield _At(fs, root.rstrip("/"), self.said)
        except LibraryError as error:
            if error.given is None or self._clean(error.given) == str(error.given):
                raise
            given = self._clean(error.given)
            raise type(error)(error.what, given=given, allowed=error.allowed, do=error.do) from None
        except Exception as error:  # every transport has its own
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LibraryError(
                "The remote can not be used.",
                given=f"{self.said}: {self._clean(text)}",
                allowed="a folder, or an address that fsspec knows: s3://bucket/path, gs://..., sftp://...",
                do="see to the connection and the credentials"
                if not isinstance(error, ImportError)
                else "install the file system that it asks for with pip",
            ) from error


@dataclass(frozen=True, slots=True)
class _At:
    """A remote's files, by fsspec. Whatever that raises, ``Remote`` tells."""

    fs: Any
    root: str
    said: str

    def names(self) -> list[str]:
        found = (posixpath.basename(path.rstrip("/")) for path in self._ls(f"{self.root}/versions"))
        return sorted(name for name in found if _is_name(name))

    def versions(self, name: str) -> list[Listed]:
        return _listed(name, self._ls(f"{self.root}/versions/{name}"))

    def every(self) -> list[Listed]:
        """Of all names; in an object store by one request for each thousand files, not one for each name."""
        if not self._protocols & WHOLE_OBJECTS:
            return [one for name in self.names() for one in self.versions(name)]
        try:
            paths = [str(path) for path in self.fs.find(f"{self.root}/versions")]
        except FileNotFoundError:
            return []
        by_name: dict[str, list[str]] = {}
        for path in paths:
            above, name = posixpath.split(posixpath.dirname(path))
            if posixpath.basename(above) == "versions" and _is_name(name):
                by_name.setdefault(name, []).append(path)
        return [one for name in sorted(by_name) for one in _listed(name, by_name[name])]

    @property
    def _protocols(self) -> set[str]:
        return {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)

    def _ls(self, path: str) -> list[str]:
        try:
            return [str(one) for one in self.fs.ls(path, detail=False)]
        except FileNotFoundError:
            return []

    def find(self, asked: Reference) -> Listed:
        there = self.versions(asked.name)
        if asked.hash is not None:
            found = [one for one in there if one.hash.startswith(asked.hash)]
        elif asked.number is not None:
            found = [one for one in there if one.number == asked.number]
        elif str(asked) == asked.name:
            found = [one for one in there if one.number == there[-1].number]
        else:
            raise LibraryError("Tags do not travel.", given=str(asked), allowed="NAME, NAME@3 or NAME#HASH")
        if not found:
            numbers = ", ".join(f"@{one.number}" for one in there[-5:])
            allowed = numbers or ", ".join(self.names()[:10]) or "the remote is empty"
            raise LibraryError("The remote has no such version.", given=f"{self.said}: {asked}", allowed=allowed)
        if len({one.hash for one in found}) > 1:
            allowed = ", ".join(f"{one.name}#{one.hash[:16]}" for one in found)
            raise LibraryError("This means more than one version.", given=f"{self.said}: {asked}", allowed=allowed)
        return found[-1]

    def record(self, listed: Listed) -> str:
        return f"{self.root}/versions/{listed.name}/{listed.number:06d}-{listed.hash}.json"

    def read_record(self, listed: Listed) -> tuple[Version, dict[str, File]]:
        path = self.record(listed)
        with self.fs.open(path, "rb") as file:
            raw = file.read(_RECORD_BYTES + 1)
        try:
            version, files = record.parse(raw)
            if (version.name, version.number, version.hash) != (listed.name, listed.number, listed.hash):
                raise ValueError("it is another version's")
            _check_files(files, listed.hash)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            do = "push the version again under another name, or delete this file"
            raise LibraryError("A record of the remote is damaged.", given=f"{path}: {error}", do=do) from None
        return version, files

    def send_files(self, folder: Path, digest: str, files: Mapping[str, File]) -> int:
        """Upload what is not there in its length; returns the bytes."""
        sent = 0
        for name, file in files.items():
            path = f"{self.root}/objects/{digest[:2]}/{digest}/{name}"
            if self._length(path) != file.bytes:
                self.send(path, folder / name)
                if self._length(path) != file.bytes:
                    given = f"{path}: {self._length(path)} of {file.bytes} bytes"
                    raise LibraryError("The remote has not all that was sent.", given=given, do="push it again")
                sent += file.bytes
        return sent

    def _length(self, path: str) -> int | None:
        self.fs.invalidate_cache()
        try:
            size = self.fs.info(path)["size"]
        except FileNotFoundError:
            return None
        return None if size is None else int(size)

    def send(self, path: str, what: bytes | Path) -> None:
        """Write a file that is there wholly or not at all."""
        self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
        draft = path if self._protocols & WHOLE_OBJECTS else f"{path}.{secrets.token_hex(6)}.part"
        try:
            if isinstance(what, bytes):
                self.fs.pipe_file(draft, what)
            else:
                self.fs.put_file(str(what), draft)
            if draft != path:
                self.fs.mv(draft, path)
        except BaseException:
            if draft != path and self.fs.exists(draft):
                self.fs.rm_file(draft)
            raise

    def fetch(self, listed: Listed, name: str, file: File, target: Path) -> None:
        """Download one file, no byte more than it has; again where it was cut or changed on its way."""
        path = f"{self.root}/objects/{listed.hash[:2]}/{listed.hash}/{name}"
        seen = ""
        for _ in range(ATTEMPTS):
            # outside of what is tried again: that this disk is full is no fault of the transport
            with target.open("wb") as copy:
                try:
                    arrived = _copy(self._pieces(path, file.bytes), copy)
                except _Cut as error:
                    seen = str(error)
                    continue
            if arrived == file:
                return
            seen = f"{arrived.bytes} of {file.bytes} bytes, sha256 {arrived.sha256[:12]}, not {file.sha256[:12]}"
        raise LibraryError(
            f"{name} of {listed.reference} does not arrive whole.",
            given=f"{self.said}, {path}: {seen}, {ATTEMPTS} times",
            do="try again; if it stays so, delete that file at the remote and push the version again",
        )

    def _pieces(self, path: str, most: int) -> Iterator[bytes]:
        """A file as it arrives, one byte beyond ``most`` at the most. Raises _Cut where it does not go on."""
        length = 0
        try:
            with self.fs.open(path, "rb") as source:
                while length <= most and (piece := source.read(min(_PIECE, most + 1 - length))):
                    length += len(piece)
                    yield piece
        except OSError as error:
            raise _Cut(error.strerror or str(error) or type(error).__name__) from error


class _Cut(Exception):
    """A transport that failed while a file was read."""


def _copy(pieces: Iterable[bytes], target: BinaryIO) -> File:
    digest, length = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        target.write(piece)
        length += len(piece)
    return File(digest.hexdigest(), length)


def _listed(name: str, paths: Iterable[str]) -> list[Listed]:
    matches = (_RECORD.fullmatch(posixpath.basename(path)) for path in paths)
    return sorted(Listed(name, int(match["number"]), match["hash"]) for match in matches if match)


def _check_files(files: Mapping[str, File], digest: str) -> None:
    """Raises ValueError where these are not the files of the content, or one would lie elsewhere than in its folder."""
    if not set(files) <= set(content.FILES):
        raise ValueError("it names files that are no adapter's")
    if not all(type(file.bytes) is int and file.bytes >= 0 for file in files.values()):
        raise ValueError("it names lengths that are none")
    if content.hash_of(files) != digest:
        raise ValueError("the files that it names are not its content")


def _is_name(text: str) -> bool:
    try:
        return check_name(text) == text
    except LibraryError:
        return False
