"""Bottleneck adapters beside the MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tarsia.core.method import method
from tarsia.core.site import Kind, Role, Site
from tarsia.methods.houlsby import Bottleneck, BottleneckConfig


@dataclass(frozen=True, slots=True)
class ParallelConfig(BottleneckConfig):
    """As of ``houlsby``, with the paper's activation and its wide bottleneck beside the MLP, 512 of 1024."""

    reduction: float = 2.0
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"


class Beside(Bottleneck):
    """A bottleneck that reads what its module is given."""

    @classmethod
    def misfit(cls, site: Site) -> str | None:
        if site.aligned:
            return None
        return "its module is not given hidden states such as it hands on, one for each of the same width"

    def neck(self) -> tuple[bool, float]:
        """It reads what its module is given."""
        return True, 1.0


@method(
    "parallel",
    config=ParallelConfig,
    source="arXiv:2110.04366, section 3.3 and table 1 (parallel adapter)",
    kinds={Kind.STREAM},
    roles={Role.MLP},
    folds=False,
    identity=True,
)
class Parallel(Beside):
    """y + B(x), where x is what the MLP is given (normed, where a norm stands before it) and y what it gives.

    The Llama that AdapterHub's `adapters` brings gives B the hidden states before that norm; its interface for other
    models gives it x, as here.
    """

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.through(x)
