"""Seconds that a device's kernels take, from single operations that were timed on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from tarsia.plan.grid import Grid
from tarsia.plan.work import Kind, Work


class Point(BaseModel):
    """One operation: the median of its samples, and half the middle half of them as a share of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    dtype: str
    size: tuple[Annotated[int, Field(gt=0)], ...]
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]


_SAME: Final[Mapping[str, str]] = {"float16": "bfloat16", "float64": "float32"}
"""Whose time stands for a dtype that is not measured; all others are taken for float32, byte by byte."""


@dataclass(frozen=True)
class Kernels:
    """Grids of measured seconds, by kind and dtype."""

    grids: Mapping[tuple[Kind, str], Grid]

    @classmethod
    def of(cls, points: Iterable[Point]) -> Kernels:
        """From what was measured."""
        sorted_out: dict[tuple[Kind, str], list[tuple[tuple[int, ...], float]]] = defaultdict(list)
        for point in points:
            sorted_out[point.kind, point.dtype].append((point.size, point.seconds))
        return cls({key: Grid.of(found) for key, found in sorted_out.items()})

    def seconds(self, work: Work) -> float:
        """Seconds of one such operation; an empty one takes none beyond its dispatch."""
        if work.kind is Kind.NOTHING or not all(work.size):
            return 0.0
        dtype = _SAME.get(work.dtype, work.dtype)
        grid = self.grids.get((work.kind, dtype))
        return (grid or self.grids[work.kind, "float32"]).seconds(work.size)

    @cached_property
    def dtypes(self) -> frozenset[str]:
        """Those that were measured."""
        return frozenset(dtype for _, dtype in self.grids)
