"""What a run took of memory: measured in the steps where it can have been most, by what it was for.

On a CPU a step is watched where a micro-batch is larger, in one of four ways, than all before it: of n steps in random
order about 4 log n. Watching takes some 10 microseconds for each block and 75 milliseconds to look for all tensors of
the process. On a GPU all steps are watched, for its allocator counts anyhow. The count of the largest begins anew at
the second step: the first has no states of the optimiser yet.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, UntypedStorage
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tarsia.core.attach import base_parameters
from tarsia.data import Batch
from tarsia.train.events import Memory
from tarsia.train.memory import OnDevice, Phase, can_watch, forget, listening, live
from tarsia.train.process import Peak, resident

if TYPE_CHECKING:
    from tarsia.train.run import Run

PERSISTENT: Final = ("weights", "quantised", "patches", "states", "other")
"""What is there between two steps, in the order in which a block that is of several is counted."""


def storages(tensor: Tensor) -> Iterator[UntypedStorage]:
    """The memory that a tensor lies in; of one in 4 bits its codes, scales and levels."""
    inner: Any = tensor
    if _packed(tensor):
        for name in inner.__tensor_flatten__()[0]:
            yield from storages(getattr(inner, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()


def _packed(tensor: Tensor) -> bool:
    """Whether it only stands for its numbers, and lies in other tensors."""
    return bool(is_traceable_wrapper_subclass(tensor))


def held(run: Run, batches: Sequence[Batch], *, everything: bool) -> Iterator[tuple[str, UntypedStorage]]:
    """All that lies on the run's device, each block once, with what it is for.

    ``everything``: also ``other``, the tensors of this process that are for none of the rest (buffers of kernels, what
    models keep from call to call, whatever else the program has made). Looking for them takes some 50 ms.
    """
    ours = {id(tensor): tensor for patch in run.patches.values() for tensor in _own(patch)}
    base = [*base_parameters(run.model).values(), *(b for b in run.model.buffers() if id(b) not in ours)]
    groups: list[tuple[str, Iterable[Tensor]]] = [
        ("quantised", [tensor for tensor in base if _packed(tensor)]),
        ("weights", [tensor for tensor in base if not _packed(tensor)]),
        ("patches", ours.values()),
        ("states", [v for state in run.optimiser.state.values() for v in state.values() if isinstance(v, Tensor)]),
        ("inputs", [tensor for batch in batches for tensor in _given(batch)]),
    ]
    if everything:
        groups.append(("other", _all()))
    seen: set[int] = set()
    for category, tensors in groups:
        for tensor in tensors:
            for storage in storages(tensor):
                if storage._cdata not in seen and storage.device == run.device:
                    seen.add(storage._cdata)
                    yield category, storage


def _own(patch: torch.nn.Module) -> Iterator[Tensor]:
    yield from patch.parameters()
    yield from patch.buffers()


def _given(batch: Batch) -> list[Tensor]:
    return [*batch.inputs.values(), batch.labels, *([] if batch.owners is None else [batch.owners])]


def _all() -> list[Tensor]:
    # by the type alone: asking an object for its class can run code of its own
    return [found for found in gc.get_objects() if issubclass(type(found), Tensor) and not is_lazy(found)]


def totals(blocks: Iterable[tuple[str, UntypedStorage]]) -> dict[str, int]:
    """Bytes of each category."""
    found = dict.fromkeys((*PERSISTENT, "inputs"), 0)
    for category, storage in blocks:
        found[category] += storage.nbytes()
    return found


def sizes(batch: Batch) -> tuple[int, int, int, int]:
    """What a micro-batch's memory grows with: tokens, the longest line, numbers of pictures, labelled tokens."""
    pixels = sum(value.numel() for value in batch.inputs.values() if value.is_floating_point())
    return (batch.labels.numel(), batch.labels.shape[1], pixels, int((batch.labels >= 0).sum()))


@dataclass(frozen=True, slots=True)
class _Step:
    """One step that was watched: ``peaks`` are all bytes on the device by phase, ``held`` what was there before it."""

    number: int
    device: str
    peaks: Mapping[str, int]
    held: Mapping[str, int]
    gradients: int
    batch: Mapping[str, Any]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        return max(self.peaks, key=lambda name: self.peaks[name])


class Meter:
    """Measures a run from now on, before anything is loaded."""

    def __init__(self) -> None:
        self._process = Peak()
        self._earlier: int | None = None
        forget()
        self._device: OnDevice | None = None
        self._largest: tuple[int, ...] = ()
        self._steps = 0
        self._gradients = 0
        self._held: Mapping[str, int] = {}
        self._most: _Step | None = None
        self.watched = 0
        """Steps in which the peak was measured."""
        self.why = ""
        """Why it was not in a step that should have been."""

    @contextmanager
    def over(self, run: Run, batches: Sequence[Batch]) -> Iterator[None]:
        """One step of the run, with these micro-batches: it is watched where it can be the one that takes most."""
        larger = self._larger(batches)
        place = run.device.type
        if place == "cuda":
            watching = self._counted(run, batches, larger)
        elif larger and place == "cpu" and can_watch():
            watching = self._recorded(run, batches)
        else:
            if larger:
                self.why = "a profiler is running" if place == "cpu" else f"{place} has no record of its blocks"
            yield
            return
        with watching as peaks, listening(lambda name: self._note(run, name)):
            yield
        self.watched += 1
        # a run that goes on elsewhere begins anew: what one device took says nothing of another
        if self._most is None or self._most.device != str(run.device) or max(peaks.values()) > self._most.peak:
            found = described(batches)
            self._most = _Step(run.step + 1, str(run.device), peaks, self._held, self._gradients, found)

    def _larger(self, batches: Sequence[Batch]) -> bool:
        self._steps += 1
        if self._steps == 2:  # what came before it had no states beside it
            self._largest = ()
        largest = tuple(map(max, zip(*map(sizes, batches), *([self._largest] if self._largest else []), strict=True)))
        larger, self._largest = largest != self._largest, largest
        return larger

    def _note(self, run: Run, name: str) -> None:
        """Before the update, note the gradients."""
        if name == Phase.UPDATE:
            grads = [p.grad for group in run.optimiser.param_groups for p in group["params"] if p.grad is not None]
            self._gradients = sum({s._cdata: s.nbytes() for grad in grads for s in storages(grad)}.values())

    @contextmanager
    def _recorded(self, run: Run, batches: Sequence[Batch]) -> Iterator[dict[str, int]]:
        """Gives all bytes of tensors at most, by phase, once the step is over."""
        blocks = list(held(run, batches, everything=True))
        self._held = totals(blocks)
        watching = live([storage for _, storage in blocks])
        blocks.clear()  # they shall die when their tensors do
        peaks: dict[str, int] = {}
        with watching as watched:
            watched.mark(Phase.FORWARD)
            yield peaks
        there = sum(self._held.values())
        peaks |= {name: there + peak for name, peak in watched.peaks.items() if name}

    @contextmanager
    def _counted(self, run: Run, batches: Sequence[Batch], larger: bool) -> Iterator[dict[str, int]]:
        """Gives what the device's allocator had handed out at most, by phase, once the step is over."""
        if self._device is None:
            self._device = OnDevice(run.device)
        if larger:  # what persists changes no more
            self._held = totals(held(run, batches, everything=True))
        with self._device.step() as peaks:
            self._device.mark(Phase.FORWARD)
            yield peaks
        peaks.pop("", None)

    def state(self) -> dict[str, Any]:
        """What was found, as JSON values for a checkpoint."""
        most = None if self._most is None else asdict(self._most)
        return {"most": most, "watched": self.watched, "unwatched": self.why, "process": self._taken()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave, in another process."""
        self._most = None if state["most"] is None else _Step(**state["most"])
        self.watched, self.why, self._earlier = state["watched"], state["unwatched"], state["process"]

    def _taken(self) -> int | None:
        """The most that a process of this run held, of all its stretches."""
        return max((peak for peak in (self._process.read(), self._earlier) if peak is not None), default=None)

    def event(self, run: Run) -> Memory:
        """What was found, up to now."""
        most, process, now = self._most, self._process, resident()
        there = totals(held(run, (), everything=False)) if most is None else most.held
        lasting = {name: there[name] for name in PERSISTENT}
        if self._device is not None:
            self._device.mark("")
        return Memory(
            device=str(run.device),
            **lasting,
            step=None if most is None else most.peak - sum(lasting.values()),
            inputs=None if most is None else there["inputs"],
            gradients=None if most is None else most.gradients,
            peak=None if most is None else most.peak,
            phase=None if most is None else most.phase,
            phases={} if most is None else most.peaks,
            number=None if most is None else most.number,
            batch={} if most is None else most.batch,
            watched=self.watched,
            unwatched=self.why,
            allocated=None if self._device is None else self._device.allocated,
            reserved=None if self._device is None else self._device.reserved,
            process=self._taken(),
            before=None if process.before is None else asdict(process.before),
            after=None if now is None else asdict(now),
        )


def described(batches: Sequence[Batch]) -> dict[str, Any]:
    """A step's batches: how many, and of the one with most tokens the rows, tokens, pictures and shapes."""
    batch = max(batches, key=sizes)
    return {
        "batches": len(batches),
        "rows": len(batch.rows),
        "tokens": batch.labels.numel(),
        "labelled": sizes(batch)[3],
        "pictures": sum(batch.n_pictures),
        "shapes": {name: list(value.shape) for name, value in batch.inputs.items()},
    }
