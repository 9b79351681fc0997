"""Tables by row number: JSON Lines, JSON, CSV, Parquet, Arrow, a folder of pictures. Nothing is checked here."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from tarsia.core.errors import DataError

# Encoded row groups that are kept in memory, so that shuffled reading does not read a group for each row.
_KEEP_BYTES: Final = 512 * 2**20
_MOST_UNPACKED: Final = 2**31
"""Bytes that a .gz file may unpack to: it is held in memory."""
PICTURES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Endings of the files that a folder's pictures have, in small letters."""


class Table(Protocol):
    """Rows by number, as they are stored: pictures encoded, nothing checked.

    ``columnar``: rows have null in the columns and fields that other rows have and they do not.
    """

    @property
    def columnar(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> object: ...


class Held:
    """Rows in memory."""

    columnar = False

    def __init__(self, rows: Sequence[object]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> object:
        return self._rows[row]


class Lines:
    """A JSON Lines file: where each line begins is kept, the lines are not (those of a .gz file are)."""

    columnar = False

    def __init__(self, path: Path, title: str) -> None:
        self._path, self._title = path, title
        self._held = _unpacked(path, title) if path.suffix == ".gz" else None
        self._starts = array("q")
        with self._open() as file:
            start = 0
            for line in file:
                if line.strip():
                    self._starts.append(start)
                start += len(line)

    def _open(self) -> io.BufferedIOBase:
        return self._path.open("rb") if self._held is None else io.BytesIO(self._held)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> object:
        with self._open() as file:
            file.seek(self._starts[row])
            line = file.readline()
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
            raise DataError(
                f"Row {row} of {self._title} is not JSON: {error}.", given=f"{line[:60]!r}", do="correct the line"
            ) from None


def _unpacked(path: Path, title: str) -> bytes:
    try:
        with gzip.open(path) as file:
            body = file.read(_MOST_UNPACKED + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"The source {title} can not be unpacked: {error}.", given=str(path)) from None
    if len(body) > _MOST_UNPACKED:
        raise DataError(
            f"The source {title} is too large to be unpacked in memory.",
            given=str(path),
            allowed=f"{_MOST_UNPACKED / 2**30:g} GiB",
            do="unpack it: a .jsonl or .parquet file is read without being held",
        )
    return body


def _body(path: Path, title: str) -> bytes:
    return _unpacked(path, title) if path.suffix == ".gz" else path.read_bytes()


def read_json(path: Path, title: str) -> Table:
    """A JSON list of rows, held in memory."""
    try:
        rows = json.loads(_body(path, title))
    except (ValueError, RecursionError) as error:
        raise DataError(f"The source {title} is not JSON: {error}.", given=str(path)) from None
    if not isinstance(rows, list):
        raise DataError(f"The source {title} is not a list of rows.", given=type(rows).__name__, allowed="a JSON list")
    return Held(rows)


def read_csv(path: Path, title: str) -> Table:
    """Comma-separated texts under a line of column names, held in memory; an empty cell is absent."""
    try:
        text = io.StringIO(_body(path, title).decode("utf-8-sig"), newline="")
        lines = list(csv.reader(text, strict=True))
    except (ValueError, csv.Error) as error:
        raise DataError(f"The source {title} is not a CSV file in UTF-8: {error}.", given=str(path)) from None
    head, *body = [line for line in lines if line] or [[]]
    if len(set(head)) != len(head) or not all(head):
        raise DataError(f"The columns of {title} have no name, or one twice.", given=", ".join(head)[:200])
    wrong = next((i for i, line in enumerate(body) if len(line) != len(head)), None)
    if wrong is not None:
        raise DataError(f"Row {wrong} of {title} has {len(body[wrong])} cells under {len(head)} columns.")
    return Held([dict(zip(head, (cell or None for cell in line), strict=True)) for line in body])


class Parquet:
    """Parquet files one after another, read by row group; pictures stay encoded."""

    columnar = True

    def __init__(self, paths: Sequence[Path], title: str) -> None:
        self._title, self.paths = title, tuple(paths)
        try:
            self._files = [pq.ParquetFile(path) for path in paths]
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"The source {title} is not a Parquet file: {error}.", given=", ".join(map(str, paths))[:200]
            ) from None
        self._groups = [(f, group) for f in self._files for group in range(f.metadata.num_row_groups)]
        self._starts: list[int] = [0, *accumulate(f.metadata.row_group(g).num_rows for f, g in self._groups)]
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> object:
        group = bisect_right(self._starts, row) - 1
        try:
            return self._group(group).slice(row - self._starts[group], 1).to_pylist()[0]
        except (pa.ArrowException, OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
            raise DataError(f"Row group {group} of {self._title} can not be read: {error}.") from None

    def _group(self, group: int) -> pa.Table:
        if group not in self._kept:
            file, number = self._groups[group]
            self._kept[group] = file.read_row_group(number)
            while len(self._kept) > 1 and sum(table.nbytes for table in self._kept.values()) > _KEEP_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def holds(self, column: str) -> bool:
        """Whether all pictures of ``column`` are in the file itself, as its metadata tell."""
        for file, group in self._groups:
            meta = file.metadata.row_group(group)
            for i in range(meta.num_columns):
                leaf = meta.column(i)
                names = leaf.path_in_schema.split(".")
                if names[0] != column or names[-1] == "path":
                    continue
                text = file.metadata.schema.column(i).logical_type.type == "STRING"
                if text or leaf.statistics is None or leaf.statistics.null_count:
                    return False
        return True


class Arrow:
    """A `datasets` table, memory-mapped; in Arrow's format its pictures stay encoded."""

    columnar = True

    def __init__(self, dataset: Any) -> None:
        self.dataset: Any = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> object:
        return self.dataset[row].to_pylist()[0]


class Named:
    """A table beside a folder's pictures: its ``file_name`` is the row's picture, ``file_names`` several."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.columnar = table.columnar

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> object:
        found = self._table[row]
        if not isinstance(found, Mapping):
            return found
        return {_OURS.get(key, key): value for key, value in found.items()}


_OURS: Final = {"file_name": "image", "file_names": "images"}
_METADATA: Final = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def read_folder(path: Path, title: str) -> Table | None:
    """A folder of pictures as `datasets` reads one, or of Parquet files; None where it is neither.

    With a metadata.csv, .jsonl or .parquet beside them, that is the table, and its ``file_name`` says which
    picture is the row's. Without one each picture is a row with ``image`` and ``label``, the name of the
    folder that it lies in. Rows are in the order of their paths.
    """
    tables = [path / name for name in _METADATA if (path / name).is_file()]
    if len(tables) > 1:
        raise DataError(
            f"The folder of {title} has several tables.", given=", ".join(t.name for t in tables), allowed="one"
        )
    if tables:
        return Named(open_file(tables[0], title))
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if files:
        named = (p.relative_to(path) for p in files)
        return Held([{"image": str(p), "label": p.parent.name or None} for p in named])
    shards = sorted(path.glob("*.parquet"))
    return Parquet(shards, title) if shards else None


FILES: Final[Mapping[str, Callable[[Path, str], Table]]] = {
    ".jsonl": Lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": lambda path, title: Parquet([path], title),
    ".jsonl.gz": Lines,
    ".json.gz": read_json,
    ".csv.gz": read_csv,
}
"""How a file is opened, by its ending."""


def ending(path: Path) -> str:
    """The ending that FILES knows, .gz with the one before it."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def open_file(path: Path, title: str) -> Table:
    """Open one file by its ending. Raises DataError where it can not be read or is not what it ends in."""
    try:
        return FILES[ending(path)](path, title)
    except OSError as error:
        raise DataError(f"The source {title} can not be read.", given=f"{path}: {error.strerror}") from None
