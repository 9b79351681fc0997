"""Where rows come from: JSON Lines, JSON, Parquet, a folder of `datasets`, the hub."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol, overload

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from tarsia.core.errors import DataError
from tarsia.data.formats import Place, Row, read_row
from tarsia.data.samples import Sample

_HUB: Final = "hub:"
# Encoded row groups that are kept in memory, so that shuffled reading does not read a group for each row.
_KEEP_BYTES: Final = 512 * 2**20


class Source(BaseModel):
    """One source of rows, as a recipe writes it.

    ``path`` is a .jsonl, .json or .parquet file, a folder written by ``datasets.save_to_disk``, or
    ``hub:owner/name``. ``name`` is what reports and errors call it (default: the path's last part).
    ``split`` is for folders and the hub. ``limit`` keeps the first rows. ``columns`` maps a format's
    column to the table's; ``ignore`` names columns to leave aside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    name: str = ""
    split: str | None = None
    limit: int | None = Field(default=None, gt=0)
    columns: Mapping[str, str] = Field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name, or else the path's last part without its ending."""
        return self.name or Path(self.path.removeprefix(_HUB)).stem


class Table(Protocol):
    """Rows by number, as they are stored: pictures encoded, nothing checked."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> object: ...


class Rows(Sequence[Sample]):
    """The samples of one source, in the source's order; a row is read when it is asked for."""

    def __init__(self, source: Source, table: Table, folder: Path) -> None:
        self.source, self._table, self._folder = source, table, folder
        self._length = min(len(table), source.limit or len(table))
        if not self._length:
            raise DataError(f"The source {source.title} has no rows.", given=source.path)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number = index % len(self)
        place = Place(self.source.title, number, self._folder)
        row = self._table[number]
        if not isinstance(row, Mapping):
            raise place.error("not an object with columns.", given=f"{row!r:.60}")
        return read_row(self._rename(row, place), place)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _rename(self, row: Row, place: Place) -> Row:
        missing = [theirs for theirs in self.source.columns.values() if theirs not in row]
        if missing:
            raise place.error(
                "the source's `columns` names columns that are not there.",
                given=", ".join(missing),
                allowed=", ".join(row),
            )
        ours = {theirs: name for name, theirs in self.source.columns.items()}
        return {ours.get(key, key): value for key, value in row.items() if key not in self.source.ignore}


def read(source: Source) -> Rows:
    """Open a source. Raises DataError where it is missing, of no known kind, empty or has no such split."""
    if source.path.startswith(_HUB):
        return Rows(source, _hub(source), Path())
    path = Path(source.path)
    if not path.exists():
        raise DataError(f"The source {source.title} is missing.", given=source.path, do="check the path")
    if path.is_dir():
        return Rows(source, _saved(source, path), path)
    if path.suffix not in _FILES:
        raise DataError(
            f"The source {source.title} is of no known kind.",
            given=path.name,
            allowed=", ".join([*_FILES, "a folder of datasets.save_to_disk", "hub:owner/name"]),
        )
    if source.split is not None:
        raise DataError(
            f"The source {source.title} is one file and has no splits.", given=source.split, do="leave `split` out"
        )
    try:
        table = _FILES[path.suffix](path, source.title)
    except OSError as error:
        raise DataError(f"The source {source.title} can not be read.", given=f"{path}: {error.strerror}") from None
    return Rows(source, table, path.parent)


class _Lines:
    """A JSON Lines file: where each line begins is kept, the lines are not."""

    def __init__(self, path: Path, title: str) -> None:
        self._path, self._title = path, title
        self._starts = array("q")
        with path.open("rb") as file:
            start = 0
            for line in file:
                if line.strip():
                    self._starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> object:
        with self._path.open("rb") as file:
            file.seek(self._starts[row])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:  # a UnicodeDecodeError is one too
            raise DataError(
                f"Row {row} of {self._title} is not JSON: {error}.", given=f"{line[:60]!r}", do="correct the line"
            ) from None


def _json(path: Path, title: str) -> Table:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"The source {title} is not JSON: {error}.", given=str(path)) from None
    if not isinstance(rows, list):
        raise DataError(f"The source {title} is not a list of rows.", given=type(rows).__name__, allowed="a JSON list")
    return rows


class _Parquet:
    """A Parquet file, read by row group; pictures stay encoded."""

    def __init__(self, path: Path, title: str) -> None:
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"The source {title} is not a Parquet file: {error}.", given=str(path)) from None
        meta = self._file.metadata
        groups = range(meta.num_row_groups)
        self._title = title
        self._starts: list[int] = [0, *accumulate(meta.row_group(g).num_rows for g in groups)]
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> object:
        group = bisect_right(self._starts, row) - 1
        return self._group(group).slice(row - self._starts[group], 1).to_pylist()[0]

    def _group(self, group: int) -> pa.Table:
        if group not in self._kept:
            try:
                self._kept[group] = self._file.read_row_group(group)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"Row group {group} of {self._title} can not be read: {error}.") from None
            while len(self._kept) > 1 and sum(table.nbytes for table in self._kept.values()) > _KEEP_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]


_FILES: Final = {".jsonl": _Lines, ".json": _json, ".parquet": _Parquet}


class _Arrow:
    """A `datasets` table, memory-mapped; in Arrow's format its pictures stay encoded."""

    def __init__(self, dataset: Any) -> None:
        self._dataset: Any = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> object:
        return self._dataset[row].to_pylist()[0]


def _saved(source: Source, path: Path) -> Table:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The source {source.title} is not a folder of datasets.save_to_disk.",
            given=f"{path}: {error}",
            do="give a .jsonl, .json or .parquet file of it",
        ) from None
    if not isinstance(loaded, datasets.DatasetDict):
        if source.split is not None:
            raise DataError(f"The source {source.title} has no splits.", given=source.split, do="leave `split` out")
        return _Arrow(loaded)
    split = source.split or (next(iter(loaded)) if len(loaded) == 1 else None)
    if split not in loaded:
        raise DataError(
            f"The source {source.title} has several splits." if split is None else f"No such split: {split}.",
            given=f"split {split}",
            allowed=", ".join(map(str, loaded)),
        )
    return _Arrow(loaded[split])


def _hub(source: Source) -> Table:
    import datasets

    name = source.path.removeprefix(_HUB)
    try:
        return _Arrow(datasets.load_dataset(name, split=source.split or "train"))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"The source {source.title} can not be loaded from the hub: {error}.",
            given=source.path,
            do="check the name, the split and the network, or give a local file",
        ) from None
