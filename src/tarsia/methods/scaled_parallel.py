"""Bottleneck adapters beside the MLP, scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tarsia.core.errors import ConfigError
from tarsia.core.method import method
from tarsia.core.site import Kind, Role
from tarsia.methods.parallel import Beside, ParallelConfig


@dataclass(frozen=True, slots=True)
class ScaledConfig(ParallelConfig):
    """As of ``parallel``; ``scale`` is the paper's s, 4 in its tables."""

    scale: float = 4.0

    def __post_init__(self) -> None:
        ParallelConfig.__post_init__(self)
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not number or not math.isfinite(self.scale) or self.scale == 0:
            raise ConfigError("A scale must be a number, and not 0.", given=repr(self.scale))


@method(
    "scaled_parallel",
    config=ScaledConfig,
    source="arXiv:2110.04366, section 3.3 and table 1 (scaled parallel adapter)",
    kinds={Kind.STREAM},
    roles={Role.MLP},
    folds=False,
    identity=True,
)
class ScaledParallel(Beside):
    """y + s B(x), where x is what the MLP is given and y what it gives; s is fixed."""

    constants = ("activation", "scale")

    def __init__(self, activation: str, scale: float, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(activation, tensors)
        self.scale = scale

    def neck(self) -> tuple[bool, float]:
        """It reads what its module is given, and is added s times."""
        return True, self.scale

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.scale * self.through(x)
