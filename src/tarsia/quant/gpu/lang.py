"""Triton's language, as the other modules take it, with words for what a kernel's arguments are.

Triton has no annotations of its own. Its compiler reads ours for ``tl.constexpr`` alone, so that the words below are
for the reader; the type checker sees Any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

Pointer: TypeAlias = Any
"""To the first number of a tensor; None where an optional one is not there."""

Number: TypeAlias = Any
"""An integer or a float32 that is one for all programs."""

Tile: TypeAlias = Any
"""A block of numbers that one program holds."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run on the processor: TRITON_INTERPRET, as it was when Triton was imported."""


def jit(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return triton.jit(function)


def kernel(*general: str) -> Callable[[Callable[..., Any]], Any]:
    """A kernel. One is compiled for integers that 16 divides, one for others, one for 1; not so for those in ``general``."""
    return lambda function: triton.jit(function, do_not_specialize=general)


__all__ = ["INTERPRETED", "Number", "Pointer", "Tile", "jit", "kernel", "tl"]
