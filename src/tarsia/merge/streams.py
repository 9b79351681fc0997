"""The files of a folded base, written shard by shard: what is not touched is copied as it is."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter.reading import AGAIN
from tarsia.adapter.tensors import DTYPES, TensorFile
from tarsia.core.errors import AdapterError
from tarsia.merge.folding import Folding, Job, Measure
from tarsia.merge.units import Stored
from tarsia.quant.codec import Quantised
from tarsia.quant.state import to_tensors

INDEX: Final = "model.safetensors.index.json"
_CHUNK: Final = 8 << 20
STRETCH: Final = 4 << 20
"""Bytes that are read, folded and written at once, where tensors are no larger."""
_GAP: Final = 1 << 16
"""Bytes between two touched tensors that are carried along: to copy them apart takes longer."""
_ALIGNED: Final = 8
_ELSEWHERE: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""What the system says where it does not copy between these two files itself."""


class Streams:
    """Writes the shards of one fold. A job whose keys lie apart is made once, and kept until all is written."""

    def __init__(self, folding: Folding) -> None:
        self.folding = folding
        self.waiting: dict[str, Tensor | Quantised] = {}
        self._arenas = [torch.empty(0, dtype=torch.uint8)] * 2

    def same_size(self, source: Path, target: Path) -> None:
        """Copy ``source`` to ``target`` with the touched tensors folded: every header and offset is what it was.

        One thread writes, copies and measures while this one reads and folds: each stretch waits for at most one other.
        """
        pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        with source.open("rb") as read, target.open("wb") as write, _one_thread(), pool as writer:
            one, other, at = read.fileno(), write.fileno(), 0
            under_way: deque[Future[None]] = deque()
            for keys, first, last in self._stretches(source):
                if len(under_way) > 1:
                    under_way.popleft().result()
                self._arenas.reverse()
                data, measures = self._bytes(keys, first, last, one)
                under_way.append(writer.submit(_between, one, other, at, first, data, measures))
                at = last
            under_way.append(writer.submit(copy_range, one, other, at, source.stat().st_size))
            for done in under_way:
                done.result()

    def _stretches(self, source: Path) -> Iterator[tuple[list[str], int, int]]:
        """Touched keys that are written at once, with the first and the last byte in the file; in the file's order.

        Tensors that are folded in place go together where they lie together; what is made otherwise goes alone.
        """
        folding, places = self.folding, self.folding.stored.places
        touched = [key for key in folding.stored.tables[source] if key in folding.by_key]
        keys: list[str] = []
        first = last = 0
        for key in sorted(touched, key=lambda key: places[key].begin):
            begin, end = places[key].begin, places[key].begin + places[key].bytes
            near = begin - last <= _GAP and end - first <= STRETCH and not (begin - first) % _ALIGNED
            if keys and near and self._quick(key) and self._quick(keys[-1]):
                keys.append(key)
            else:
                if keys:
                    yield keys, first, last
                keys, first = [key], begin
            last = end
        if keys:
            yield keys, first, last

    def _quick(self, key: str) -> bool:
        return self.folding.quick(self.folding.by_key[key]) is not None

    def other_size(self, source: Path, target: Path) -> dict[str, str]:
        """Write ``target`` anew, tensor by tensor; returns the file of each of its keys."""
        stored = self.folding.stored
        index: dict[str, str] = {}
        dropped = {key for unit in stored.units.values() if unit.packed for key in unit.keys[1:]}
        with source.open("rb") as read, TensorFile(target, {"format": "pt"}) as file:
            for key in stored.tables[source]:
                if key not in self.folding.by_key:
                    index[key] = target.name
                    _add(file, stored, key, read.fileno())
                elif key not in dropped:
                    value = self._value(key)
                    parts = to_tensors(key, value) if isinstance(value, Quantised) else {key: value}
                    for name, tensor in parts.items():
                        file.add(name, tensor)
                        index[name] = target.name
        return index

    def _bytes(self, keys: Sequence[str], first: int, last: int, source: int) -> tuple[memoryview, Sequence[Measure]]:
        """The bytes of a stretch, folded, and what measures them."""
        if not self._quick(keys[0]):
            value = self._value(keys[0])
            assert isinstance(value, Tensor)
            return _raw(value), ()
        held = self._read(first, last, source, self.folding.stored.places[keys[0]].path)
        measures = []
        for key in keys:
            job, place = self.folding.by_key[key], self.folding.stored.places[key]
            patch = self.folding.quick(job)
            assert patch is not None
            part = held[place.begin - first : place.begin - first + place.bytes]
            measures.append(self.folding.in_place(job, patch, part.view(DTYPES[place.dtype]).view(place.shape)))
        return _raw(held), measures

    def _read(self, first: int, last: int, source: int, path: Path) -> Tensor:
        """Bytes of a file in memory that is used again: fresh memory costs more than the arithmetic does.

        There are two such arenas in turn, so what was read before the last one has been written by now.
        """
        if len(self._arenas[0]) < last - first:
            self._arenas[0] = torch.empty(last - first, dtype=torch.uint8)
        held = self._arenas[0][: last - first]
        read_all(source, _raw(held), first, path)
        return held

    def _value(self, key: str) -> Tensor | Quantised:
        if key not in self.waiting:
            self.waiting |= self._made(self.folding.by_key[key])
        return self.waiting.pop(key)

    def _made(self, job: Job) -> Mapping[str, Tensor | Quantised]:
        made = self.folding.made(job)
        for key, value in made.items():
            place = self.folding.stored.places[key]
            if isinstance(value, Tensor) and not job.units[0].packed and tuple(value.shape) != place.shape:
                raise AdapterError("A folded tensor has another shape.", given=f"{key} {tuple(value.shape)}")
        return made


def _add(file: TensorFile, stored: Stored, key: str, source: int) -> None:
    """Put a tensor that nobody touches into ``file``, as its bytes are."""
    place, entry = stored.places[key], stored.tables[stored.places[key].path][key]
    raw = bytearray(place.bytes)
    read_all(source, memoryview(raw), place.begin, place.path)
    count = 1
    for size in place.shape:
        count *= size
    file.add_bytes(key, str(entry["dtype"]), list(place.shape), max(1, place.bytes // max(1, count)), raw)


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, and no copy of them where it is contiguous."""
    flat: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def read_all(source: int, into: memoryview, begin: int, path: Path) -> None:
    """Fill ``into`` from ``begin`` on. Raises AdapterError where the file ends too early."""
    done = 0
    while done < len(into):
        count = os.preadv(source, [into[done:]], begin + done)
        if not count:
            raise AdapterError(f"{path.name} is truncated.", given=str(path), do=AGAIN)
        done += count


def write_all(target: int, data: memoryview, begin: int) -> None:
    """Write all of ``data`` at ``begin``. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], begin + done)


def copy_range(source: int, target: int, begin: int, end: int) -> None:
    """Copy bytes ``begin`` to ``end`` to the same place, inside the system where it can. Raises OSError."""
    at = begin
    while at < end:
        try:
            count = os.copy_file_range(source, target, end - at, at, at)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _ELSEWHERE:
                raise
            count = _by_hand(source, target, at, min(end, at + _CHUNK))
        if not count:
            raise OSError(errno.EIO, "the file that is copied ends too early")
        at += count


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tiles that fit a cache are too small to be shared, and the writer needs a core too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _between(source: int, target: int, begin: int, end: int, data: memoryview, measures: Sequence[Measure]) -> None:
    """Copy what lies before a stretch, write the stretch after it, and measure it."""
    copy_range(source, target, begin, end)
    write_all(target, data, end)
    for measure in measures:
        measure()


def _by_hand(source: int, target: int, begin: int, end: int) -> int:
    data = os.pread(source, end - begin, begin)
    write_all(target, memoryview(data), begin)
    return len(data)


def write_index(folder: Path, names: Mapping[str, str], total: int) -> None:
    """The table of which file holds which tensor."""
    held = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    (folder / INDEX).write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
