"""Triton's language, as the other modules take it.

What kernels are given is a ``tl.tensor``, be it a pointer, a number or a tile; an optional pointer may be None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run on the processor: TRITON_INTERPRET, as it was when Triton was imported."""

VERSION: str = triton.__version__


def jit(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return triton.jit(function)


def kernel(*general: str) -> Callable[[Callable[..., Any]], Any]:
    """A kernel. It is compiled again for integers that are 1 or that 16 divides, except those named in ``general``."""
    return lambda function: triton.jit(function, do_not_specialize=general)


__all__ = ["INTERPRETED", "VERSION", "jit", "kernel", "tl"]
