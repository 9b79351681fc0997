"""What serving computes itself: adapters over a line of rows, paged attention, and the writing of its cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tarsia.serve import reference
from tarsia.serve.reference import Row


def grouped(x: Tensor, y: Tensor, starts: Tensor, forms: Sequence[Row], entries: Tensor) -> Tensor:
    """``y`` [T, out], the base's output for ``x`` [T, in], changed in place by each row's form and returned.

    Row i has the tokens ``starts[i]`` to ``starts[i + 1] - 1`` (int32 [rows + 1]); ``entries`` int64 [rows, 12] says
    the forms again as the kernels read them. x carries a form's ``inner`` already. Sums are float32, rounded once.
    """
    return reference.grouped(x, y, starts, forms)


def inner(x: Tensor, starts: Tensor, forms: Sequence[Row], entries: Tensor) -> Tensor:
    """``x`` [T, in] with the tokens of rows whose form has an ``inner`` scaled by it: a copy where any has, else x."""
    return reference.inner(x, starts, forms)


def attend(  # noqa: PLR0913
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    before: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of a line's rows over their own cached positions, [T, heads, dim]: see `reference.attend`."""
    return reference.attend(q, keys, values, tables, starts, before, scale, window, softcap)


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write the line's ``k`` and ``v`` [T, kv heads, dim] to flat ``slots`` int64 [T] of the pools."""
    reference.store(k, v, keys, values, slots)
