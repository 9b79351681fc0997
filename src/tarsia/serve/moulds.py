"""A page without its bytes: what is remembered of one that was made and proved, so that it is there again at once.

The forms of a page are views of one file at known places, and a few numbers that were computed of them. As long as the
system says the same of the file as it did when all of it was checked, the same views of the same bytes are the same
page: nothing is parsed, checked or computed a second time.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter import Adapter
from tarsia.adapter.files import TENSORS, stored
from tarsia.library.opening import stamp
from tarsia.serve.forms import COLUMNS, Form, Neck, Odd, Thin, Whole
from tarsia.serve.page import Page

_MOST: Final = 8192  # pages that are remembered

Piece = tuple[str, torch.dtype, tuple[int, ...], int]
"""A tensor of a form: its field, dtype, shape, and byte in the file; -1 where it is none of the file's."""


def there(adapter: Adapter, device: torch.device) -> Adapter:
    """The adapter with copies of its tensors on another device."""
    patches = {
        path: replace(patched, tensors={name: tensor.to(device) for name, tensor in patched.tensors.items()})
        for path, patched in adapter.patches.items()
    }
    return replace(adapter, patches=patches)


@dataclass(frozen=True, slots=True)
class Cast:
    """One form without its numbers."""

    path: str
    kind: Callable[..., Thin | Neck | Whole]
    pieces: tuple[Piece, ...]
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Kept:
    """What is remembered of one page. ``mould`` is shared by all that are alike; ``beside`` are tensors of its own.

    ``entries`` int64 [sites, 12] has bytes of the file in place of pointers into it, where ``inside``.
    """

    folder: Path
    files: tuple[str, ...]
    stamp: str
    mould: tuple[Cast, ...]
    beside: tuple[Tensor, ...]
    entries: Tensor
    inside: Tensor
    page: Mapping[str, Any]
    """The page's other fields."""

    @property
    def bytes(self) -> int:
        """What remembering it takes beside the mould."""
        return sum(t.nbytes for t in (*self.beside, self.entries, self.inside))


def keep(page: Page, whole: Tensor, folder: Path, files: tuple[str, ...], said: str) -> Kept | None:
    """What is to be remembered of a page that was made of the bytes ``whole`` of a file of ``folder``.

    ``said`` is what the system said of the files before they were looked at. None where the page has more in it than
    tensors.
    """
    if page.lead:
        return None
    first, end = whole.data_ptr(), whole.data_ptr() + whole.numel()
    casts: list[Cast] = []
    beside: list[Tensor] = []
    for path, form in page.forms.items():
        if isinstance(form, Odd):
            return None
        pieces, settings = [], []
        for one in fields(form):
            value = getattr(form, one.name)
            if not isinstance(value, Tensor):
                settings.append((one.name, value))
                continue
            inside = first <= value.data_ptr() < end and value.is_contiguous() and value.ndim in (1, 2)
            inside = inside and (value.data_ptr() - first) % value.itemsize == 0
            pieces.append((one.name, value.dtype, tuple(value.shape), value.data_ptr() - first if inside else -1))
            if not inside:
                beside.append(value.cpu())
        casts.append(Cast(path, type(form), tuple(pieces), tuple(settings)))
    within = (page.entries >= first) & (page.entries < end) & _pointers(page)
    left = {one.name: getattr(page, one.name) for one in fields(page) if one.name not in ("forms", "entries")}
    if page.device.type != "cpu" and beside:
        return None  # pointers to what was computed would be others
    return Kept(folder, files, said, tuple(casts), tuple(beside), page.entries - first * within, within, left)


def _pointers(page: Page) -> Tensor:
    """Which of the entries' numbers are pointers, bool [sites, 12]."""
    mask = torch.zeros(page.entries.shape, dtype=torch.bool)
    for column in range(COLUMNS):
        if column not in (2, 3):  # rank, scale; no address is as small as the other counts
            mask[:, column] = True
    return mask


def first_byte(adapter: Adapter, path: Path) -> int | None:
    """Where a file's first byte lies in memory; None where not all tensors of the adapter are views of the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table: dict[str, Any] = json.loads(file.read(length))
    table.pop("__metadata__", None)
    held = stored(adapter)
    if held.keys() != table.keys():
        return None
    places = {t.data_ptr() - 8 - length - table[key]["data_offsets"][0] for key, t in held.items() if t.numel()}
    first = places.pop() if places else 0
    last = first + path.stat().st_size
    own = [tensor for patched in adapter.patches.values() for tensor in patched.tensors.values()]
    within = all(t.is_contiguous() and first <= t.data_ptr() <= last - t.nbytes for t in own)
    return None if places or not within else first


def over(adapter: Adapter, first: int, whole: Tensor) -> Adapter:
    """The adapter with its tensors, views of the file at ``first``, as views of the same bytes in ``whole``."""

    def moved(tensor: Tensor) -> Tensor:
        place = tensor.data_ptr() - first
        return whole[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    patches = {
        path: replace(patched, tensors={name: moved(tensor) for name, tensor in patched.tensors.items()})
        for path, patched in adapter.patches.items()
    }
    return replace(adapter, patches=patches)


def again(kept: Kept, whole: Tensor) -> Page:
    """The page of the bytes ``whole`` uint8 [size] of the file that it was made of."""
    first, beside = whole.data_ptr(), iter(kept.beside)
    flats: dict[torch.dtype, Tensor] = {}
    forms: dict[str, Form] = {}
    for cast in kept.mould:
        made: dict[str, Any] = {}
        for name, dtype, shape, place in cast.pieces:
            if place < 0:
                made[name] = next(beside)
                continue
            if dtype not in flats:
                flats[dtype] = whole[: len(whole) // dtype.itemsize * dtype.itemsize].view(dtype)
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
            made[name] = flats[dtype].as_strided(shape, strides, place // dtype.itemsize)
        forms[cast.path] = cast.kind(**made, **dict(cast.settings))
    return Page(forms=forms, entries=kept.entries + first * kept.inside, **kept.page)


class Moulds:
    """Everything that is remembered, by digest; the least recently used is forgotten where it takes over ``budget``."""

    def __init__(self, budget: int) -> None:
        self._budget, self._bytes = budget, 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._shared: dict[tuple[Cast, ...], tuple[Cast, ...]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: bytes) -> Kept | None:
        """What is remembered of a content."""
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
        return found

    def add(self, digest: bytes, kept: Kept) -> None:
        """Remember it from now on."""
        self.drop(digest)
        shared = self._shared.setdefault(kept.mould, kept.mould)
        self._kept[digest] = Kept(**{one.name: getattr(kept, one.name) for one in fields(kept)} | {"mould": shared})
        self._bytes += kept.bytes
        while self._bytes > self._budget or len(self._kept) > _MOST:
            self.drop(next(iter(self._kept)))

    def drop(self, digest: bytes) -> None:
        """Forget it."""
        gone = self._kept.pop(digest, None)
        if gone is None:
            return
        self._bytes -= gone.bytes
        if not any(kept.mould is gone.mould for kept in self._kept.values()):
            del self._shared[gone.mould]


def refetched(kept: Kept, digest: bytes, opened: Callable[[bytes, Path], Tensor | None]) -> Tensor | None:
    """The file's bytes, None where the system says anything else of the files than when they were checked."""
    if kept.stamp != stamp(kept.folder, kept.files):
        return None
    whole = opened(digest, kept.folder / TENSORS)
    return whole if kept.stamp == stamp(kept.folder, kept.files) else None
