"""A small proof that outputs are those of the day an adapter was saved, and differ from the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tarsia.adapter.host import Host


@dataclass(frozen=True)
class Probe:
    """A fixed batch and what the model gave for it, in float32."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    difference: float
    """Largest absolute difference of a logit from the base's."""
    dtype: str


def probe(host: Host, inputs: Mapping[str, Tensor]) -> Probe:
    """Run the batch (a processor's output: tensors by name) through the active adapters and through the base."""
    raise NotImplementedError


def prove(host: Host, name: str, recorded: Probe) -> float:
    """Run the recorded batch through the adapter ``name`` alone; returns the largest relative difference.

    Raises AdapterError where it is beyond 1e-4, or the outputs are the base's.
    """
    raise NotImplementedError
