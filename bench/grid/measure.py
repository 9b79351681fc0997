"""One configuration in this process: ``python -m bench.grid.measure SEED FOLDER`` prints a line of JSON.

Whatever would leave a trace in the process's memory (building the world, planning, recording every allocation) is done
in copies of the process that are made once everything is imported; then the run itself, with no instrument at all.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench.grid.configurations import configuration
from bench.grid.worlds import speak

BEGINS: Final = "measured: "
"""What the line of results begins with, among all that libraries print."""
KIB: Final = 1024

Values = dict[str, Any]


def main(seed: int, folder: Path) -> Values:
    """All that is measured and planned of one seed; whatever fails is an ``error``, with the part that failed."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401 (what any run imports)

    import tarsia.train  # noqa: F401
    from tarsia.plan.heap import standing

    speak()
    torch.set_num_threads(1)
    found: Values = {"seed": seed}
    before = standing()
    seconds = {"imports": round(time.process_time(), 2)}
    parts: dict[str, Callable[[], Values]] = {
        "built": lambda: built(seed, folder),
        "planned": lambda: planned(folder, before),
        "live": lambda: live_bytes(folder),
    }
    for name, part in parts.items():
        found[name] = apart(part)
        seconds[name] = found[name].pop("seconds")
        if "error" in found[name] and name != "planned":
            return found | {"seconds": seconds, "error": f"{name}: {found[name]['error']}"}
    found["process"] = guarded(lambda: process(folder))
    seconds["process"] = found["process"].pop("seconds")
    failed = [f"{name}: {found[name]['error']}" for name in ("process", "planned") if "error" in found[name]]
    return found | {"seconds": seconds} | ({"error": "; ".join(failed)} if failed else {})


def built(seed: int, folder: Path) -> Values:
    """Write the configuration's files. Returns the bytes of the weights' files."""
    configuration(seed).write(folder)
    return {"files": sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))}


def planned(folder: Path, before: int) -> Values:
    """What the plan foretells of the recipe: the seam to ``tarsia.plan``. A copy holds less than the process did."""
    from bench.grid.foretold import foretold

    return foretold(_recipe(folder, "planned"), before)


def live_bytes(folder: Path) -> Values:
    """The run with every allocation recorded once the base is open: the peak, when it was, and what stays throughout.

    Opening is not recorded, for Transformers reads weights in threads of its own, whose allocations nothing tells.
    """
    from tarsia.train import Step, fit
    from tarsia.train.memory import live

    recipe = _recipe(folder, "live")
    host = recipe.open()
    gc.collect()  # what an earlier run left in cycles would go during this one
    standing = _everything()
    there = sum(block.nbytes() for block in standing)
    held: Values = {}
    steps = 0
    watching = live(standing)
    with watching as watched, borrowed(watched):
        standing.clear()  # so that what ends is seen to end
        watched.mark("preparing")
        for event in fit(recipe, host=host):
            if isinstance(event, Step):
                steps += 1
                held = held or _held(host.model)
                watched.mark("saving" if steps == recipe.steps else "between")
    if steps != recipe.steps:
        raise RuntimeError(f"{steps} of {recipe.steps} steps were seen")
    peaks = {name: there + peak for name, peak in watched.peaks.items() if name}
    return {"open": there, "peak": there + watched.peak, "phase": watched.phase, "peaks": peaks, "held": held}


@contextmanager
def borrowed(watched: Any) -> Iterator[None]:
    """Count the memory of numpy's that tensors stand on, as processors hand over pictures: no allocator tells of it."""
    import torch

    place: Any = torch
    given = place.from_numpy
    alive: list[weakref.ref[Any]] = []

    def counted(array: Any) -> Any:
        tensor = given(array)
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        watched._sign(-size)
        alive.append(weakref.ref(storage, lambda _: watched._sign(size)))
        return tensor

    place.from_numpy = counted
    try:
        yield
    finally:
        place.from_numpy = given
        alive.clear()


def process(folder: Path) -> Values:
    """The run as a user has it. Returns the process's memory before it, the most there ever was, what the run says."""
    from tarsia.train import fit
    from tarsia.train.events import Memory, Step

    recipe = _recipe(folder, "process")
    before = _status()
    events = list(fit(recipe))
    after = _status()
    (memory,) = (event for event in events if isinstance(event, Memory))
    losses = [event.loss for event in events if isinstance(event, Step)]
    return {"before": before["VmRSS"], "peak": after["VmHWM"], "losses": losses, "memory": asdict(memory)}


def _recipe(folder: Path, part: str) -> Any:
    """The recipe, with folders of this part's own for what a run writes, so that none goes on with another's."""
    from tarsia.train import Recipe

    recipe = Recipe.load(folder / "recipe.yaml")
    changed = [f"out={folder / part}"]
    if recipe.features is not None:
        changed.append(f"features.path={folder / part}-features")
    return Recipe.load(folder / "recipe.yaml", changed)


def _held(model: Any) -> Values:
    """Bytes of what stays from step to step, by category, each storage once."""
    import torch

    from tarsia.core.attach import patches
    from tarsia.core.packed import Packed
    from tarsia.train.run import NAME

    own = [p for patch in patches(model, NAME).values() for p in patch.parameters()]
    mine = {id(parameter) for parameter in own}
    weights, quantised = [], []
    for value in [*model.parameters(), *model.buffers()]:
        if isinstance(value, Packed):
            quantised += [*value.value.tensors.values(), value.levels]  # type: ignore[attr-defined]
        elif id(value) not in mine:
            weights.append(value)
    optimisers = [held for held in gc.get_objects() if isinstance(held, torch.optim.Optimizer)]
    states = [v for o in optimisers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    groups = {"weights": weights, "quantised": quantised, "patches": own, "states": states}
    return {name: _bytes(tensors) for name, tensors in groups.items()}


def _everything() -> list[Any]:
    """The memory of every tensor of this process, each block once."""
    import torch

    from tarsia.train.taken import storages

    # by the type alone: asking an object for its class can run code of its own
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    return list({block._cdata: block for tensor in tensors for block in storages(tensor)}.values())


def _bytes(tensors: list[Any]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _status() -> dict[str, int]:
    """The memory entries of /proc/self/status in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf8").splitlines())
    return {words[0][:-1]: int(words[1]) * KIB for words in lines if words[0].startswith(("Vm", "Rss"))}


def guarded(part: Callable[[], Values]) -> Values:
    """What ``part`` returns, or its error in words; with the processor's seconds."""
    began = time.process_time()
    try:
        found = part()
    except Exception as error:  # noqa: BLE001 (whatever a configuration comes to is its result)
        print(traceback.format_exc(), file=sys.stderr)
        found = {"error": f"{type(error).__name__}: {error}"[:800]}
    return found | {"seconds": round(time.process_time() - began, 2)}


def apart(part: Callable[[], Values]) -> Values:
    """What ``part`` returns in a copy of this process, whose memory it leaves alone."""
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(read)
        with os.fdopen(write, "w", encoding="utf8") as pipe:
            pipe.write(json.dumps(guarded(part)))
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    found: Values = json.loads(text) if text else {"error": f"the copy ended with the status {status}", "seconds": 0.0}
    return found


if __name__ == "__main__":
    print(BEGINS + json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]))))
