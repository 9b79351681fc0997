"""The library of adapters that serving is measured with: ``python -m bench.serving [COUNT]`` makes it.

SmolLM2-135M in a LLaVA (``bench.smol``), float32. An adapter ``task-0001`` is a LoRA of rank 8 at the queries and
values of the language model and of the vision tower, drawn by its number and proved on a picture with a question. The
library lies in ``$TARSIA_SERVE_LIB``, or in ``~/.cache/tarsia/serve``; what is there stays, and a run that was stopped
goes on.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench import smol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tarsia.adapter import Host
    from tarsia.library import Library
    from tarsia.serve.load.drawn import Make

COUNT: Final = 2000
RANK: Final = 8
SELECT: Final = "language.*.{q,v}; vision.*.{q,v}"


def root() -> Path:
    """Where the library lies."""
    return Path(os.environ.get("TARSIA_SERVE_LIB") or Path.home() / ".cache" / "tarsia" / "serve")


def name(i: int) -> str:
    """What adapter ``i`` is called."""
    return f"task-{i:04d}"


def lora(select: str = SELECT, rank: int = RANK) -> Make:
    """A LoRA, as it is drawn."""
    from tarsia.core.attach import Part
    from tarsia.core.method import find
    from tarsia.serve.load.drawn import Make

    return Make((Part("lora", select, find("lora").configure({"rank": rank, "alpha": 2.0 * rank})),))


def host() -> Host:
    """The base, in float32 on the processor."""
    from tarsia.adapter import open_base

    return open_base(str(smol.folder("small")), dtype="float32", device="cpu")


def scene(base: Host) -> Mapping[str, Tensor]:
    """The probe's row: one picture and a question."""
    from tarsia.data import Encoder, Source, read
    from tarsia.labs import sources

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "rows.parquet")
        sources.write(path, sources.scenes(1, "held-out"))
        rows = list(read(Source(path=str(path), name="scenes")))
        return Encoder(base.processor, variables=base.variables).batch(rows).inputs


def library(
    count: int = COUNT, make: Make | None = None, prefix: str = "task", at: Path | None = None, base: Host | None = None
) -> Library:
    """The library with so many adapters ``PREFIX-0000`` and on, made where they are not there yet."""
    from tarsia.library import Library
    from tarsia.serve.load import drawn

    found = Library.make(at or root())
    names = [f"{prefix}-{i:04d}" for i in range(count)]
    there = {version.name for version in found.search()}
    if set(names) - there:
        base = base or host()
        drawer = drawn.Drawer(base, scene(base))
        wanted = [(name, make or lora(), i) for i, name in enumerate(names)]
        for _ in drawn.publish(drawer, found, wanted, lambda i, name: print(name, flush=True)):
            pass
    return found


if __name__ == "__main__":
    library(int(sys.argv[1]) if sys.argv[1:] else COUNT)
