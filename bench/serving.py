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
from typing import TYPE_CHECKING, Any, Final

from bench import smol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tarsia.adapter import Host
    from tarsia.library import Library
    from tarsia.serve.engine import Engine
    from tarsia.serve.load.drawn import Make
    from tarsia.serve.load.inside import Text

COUNT: Final = 2000
RANK: Final = 8
SELECT: Final = "language.*.{q,v}; vision.*.{q,v}"
_BESIDE: Final = 1 << 17
"""Bytes of a page besides its numbers, at most."""
SMOL, MINI = "SmolLM2-135M", "mini-1"
WHERE: Final = {"all": "language.*.{q,k,v,o,gate,up,down}", "qv": "language.*.{q,v}"}
"""Where the adapters of a mixed batch lie: at every linear layer of the language model, or at queries and values."""
THICK: Final = 16
"""Their rank."""


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


def host(model: str = SMOL) -> Host:
    """The base, in float32 on the processor."""
    from tarsia.adapter import open_base

    return open_base(str(smol.folder("small")) if model == SMOL else model, dtype="float32", device="cpu")


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


def engine(held: Library, pool: int, model: str = SMOL) -> Engine:
    """An engine on a base of its own, whose pages hold so many of the library's adapters."""
    from tarsia.serve.engine import Engine
    from tarsia.serve.pages import Pages

    own = host(model)
    first = held.search()[0]
    room = pool * (4 * first.numbers + _BESIDE)
    return Engine(own, Pages(own, held, budget=room))


def prove(served: Engine, names: Sequence[str]) -> None:
    """Let each adapter be read once, so that none has to be proved while time is taken."""
    from tarsia.serve.load import inside

    prompt = inside.encoded(served.host, inside.Text("So?"))
    for i in range(0, len(names), 8):
        some = names[i : i + 8]
        inside.run(served, [prompt] * len(some), some, 1)


def thick(count: int, where: str = "all", model: str = SMOL) -> Library:
    """A library of so many adapters of rank 16, at ``WHERE`` of a base."""
    prefix = "thick" if (where, model) == ("all", SMOL) else f"{where}-{model.lower()}".replace(".", "-")
    made = lora(WHERE[where], THICK)
    return library(count, made, prefix, root() / prefix, host(model) if model != SMOL else None)


def loaded(count: int, where: str = "all", model: str = SMOL) -> tuple[Engine, list[str]]:
    """An engine that holds so many of these, proved, and their names."""
    held = thick(count, where, model)
    names = sorted(version.name for version in held.search())[:count]
    served = engine(held, 2 * count, model)
    prove(served, names)
    return served, names


def peft(plain: Host, names: Sequence[str], model: str = SMOL) -> Any:
    """PEFT's model over the host's, with these adapters, at every linear layer, loaded."""
    from peft import PeftModel

    held = thick(len(names), "all", model)
    folders = [str(held.folder(held.version(name))) for name in names]
    made: Any = PeftModel.from_pretrained(plain.model, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        made.load_adapter(folder, adapter_name=name)
    return made.eval()


def alone(plain: Host, name: str, asked: Text, tokens: int, held: Library) -> tuple[int, ...]:
    """What Transformers says with the adapter attached to a host of its own, alone."""
    from tarsia.adapter import put
    from tarsia.core.attach import activate, detach
    from tarsia.library.opening import open_adapter
    from tarsia.serve.load import inside

    activate(plain.model)
    put(plain, open_adapter(held, name), name)
    try:
        return inside.plainly(plain, [asked], tokens).ids[0]
    finally:
        detach(plain.model, name)


def same(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], what: str) -> None:
    """Raise RuntimeError where answers differ: a time of other answers is none."""
    apart = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if tuple(a) != tuple(b)]
    if apart:
        raise RuntimeError(f"{what} differ in rows {apart}: {list(ours[apart[0]])} is not {list(theirs[apart[0]])}")


if __name__ == "__main__":
    library(int(sys.argv[1]) if sys.argv[1:] else COUNT)
