"""What the same bits depend on: random numbers of the run's own, threads, and deterministic kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class OwnRandom:
    """The run's random numbers (dropout): nobody outside moves them, and they move nobody outside's."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.devices = [device.index or 0] if device.type == "cuda" else []
        with torch.random.fork_rng(self.devices):
            torch.manual_seed(seed)
            self._state = self._current()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Draw from the run's own stream inside."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self._state["cpu"])
            for device in self.devices:
                torch.cuda.set_rng_state(self._state["cuda"], device)
            yield
            self._state = self._current()

    def state(self) -> dict[str, Tensor]:
        """The generators' states: ``cpu``, and ``cuda`` on a GPU."""
        return dict(self._state)

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave; a GPU that the state knows nothing of keeps its seeded stream."""
        self._state |= {key: value for key, value in state.items() if key in self._state}

    def _current(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        for device in self.devices:
            state["cuda"] = torch.cuda.get_rng_state(device)
        return state


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels inside, on a CPU; a GPU keeps its fast ones."""
    memory: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    try:
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            # filling fresh memory finds bugs and costs time; it changes no result
            memory.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Compute with ``count`` threads inside (None: as many as it is now). Gives the number."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield count or before
    finally:
        torch.set_num_threads(before)
