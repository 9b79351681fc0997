"""Rows of the hub, and of a stream of them: spooled once into Parquet files, then read as those.

A stream has no length and no rows by number, but a run that is to be resumed exactly needs both: row n of a
mixture is a pure function of the recipe and n. A buffer that is shuffled as the stream goes by has to be
filled again by reading everything once more, and gives other rows where the stream has changed. So the
first ``limit`` rows are written to disk as they come, one part in memory at a time, and from then on they
are a table like any other: shuffled wholly, walked in epochs, hashed, and there without a network. A spool
that was cut off goes on after its last whole part, at the very commit that it began with.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from tarsia.core.errors import DataError

HUB: Final = "hub:"
PART_ROWS: Final = 256
"""Rows in one part of a spool, and so the most that a stream keeps in memory."""


def load(path: str, split: str | None, subset: str | None, revision: str | None, *, streaming: bool = False) -> Any:
    """A `datasets` dataset of the hub, or a stream of it. Raises DataError."""
    import datasets

    options: dict[str, Any] = {"split": split or "train"}
    options |= {"name": subset} if subset else {}
    options |= {"revision": revision} if revision else {}
    options |= {"streaming": True} if streaming else {}
    try:
        return datasets.load_dataset(path.removeprefix(HUB), **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, *_network()) as error:
        raise DataError(
            f"{path} can not be loaded from the hub: {error}.",
            given=f"split {split or 'train'}",
            do="check the name, the split and the network, or give a local file",
        ) from None


def spool(path: str, split: str | None, subset: str | None, revision: str | None, limit: int) -> tuple[Path, ...]:
    """The first ``limit`` rows of a stream (all, where it has fewer) as Parquet files, in order.

    They lie below TARSIA_CACHE (default: ~/.cache/tarsia). Raises DataError where the stream breaks off or
    there is no room; what was written stays, and the next call goes on from there.
    """
    wanted = {"path": path, "split": split, "subset": subset, "revision": revision, "limit": limit}
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("TARSIA_CACHE") or Path.home() / ".cache" / "tarsia") / "streams" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = folder / "stream.json"
        if not begun.exists():
            _write(begun, json.dumps(wanted | {"commit": _commit(path, revision)}).encode())
        done = folder / "rows.json"
        if not done.exists():
            commit = json.loads(begun.read_bytes())["commit"]
            rows = _fill(folder, load(path, split, subset, commit, streaming=True), limit, path)
            _write(done, json.dumps({"rows": rows}).encode())
        rows = json.loads(done.read_bytes())["rows"]
        parts = tuple(sorted(folder.glob("part-*.parquet")))
        held = sum(pq.read_metadata(part).num_rows for part in parts)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"The stream of {path} can not be kept on disk: {error}.", given=str(folder)) from None
    if held != rows:
        raise DataError(
            f"The stream of {path} is damaged on disk.",
            given=f"{held} rows of {rows} in {folder}",
            do="remove that folder: it is read from the hub again",
        )
    return parts


def _commit(path: str, revision: str | None) -> str | None:
    """The commit that a name points to now, so that a spool which is cut off goes on in the same rows."""
    import huggingface_hub

    if not path.startswith(HUB):
        return revision
    try:
        found = huggingface_hub.HfApi().dataset_info(path.removeprefix(HUB), revision=revision)
    except _network() as error:
        raise DataError(f"{path} can not be found on the hub: {error}.", do="check the name and the network") from None
    return found.sha


def _network() -> tuple[type[Exception], ...]:
    """What huggingface_hub's client raises without a network: httpx's errors, httpx2's from 2.0 on; no OSErrors."""
    return tuple(sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules)


def _fill(folder: Path, stream: Any, limit: int, path: str) -> int:
    parts = sorted(folder.glob("part-*.parquet"))
    rows: int = sum(pq.read_metadata(part).num_rows for part in parts)
    for number, table in enumerate(_tables(stream, rows, limit, path), start=len(parts)):
        name = folder / f"part-{number:06d}.parquet"
        part = name.with_suffix(f".{os.getpid()}.tmp")
        pq.write_table(table, part)
        _commit_file(part, name)
        rows += len(table)
    return rows


def _tables(stream: Any, first: int, limit: int, path: str) -> Iterator[pa.Table]:
    """The rows ``first`` to ``limit``, PART_ROWS at a time, pictures encoded."""
    import datasets

    schema = None if stream.features is None else stream.features.arrow_schema
    try:
        rest = stream.decode(False).skip(first).take(limit - first)
        for batch in rest.iter(batch_size=PART_ROWS):
            table = pa.Table.from_pydict(batch, schema=schema)
            schema = table.schema
            yield table
    except (
        *(OSError, ValueError, RuntimeError, pa.ArrowException, datasets.exceptions.DatasetsError),
        *_network(),
    ) as error:
        raise DataError(
            f"The stream of {path} broke off: {error}.", do="start again: it goes on after the last whole part"
        ) from None


def _write(path: Path, body: bytes) -> None:
    part = path.with_suffix(f".{os.getpid()}.tmp")
    part.write_bytes(body)
    _commit_file(part, path)


def _commit_file(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
