"""What serving computes itself: adapters over a line of rows, paged attention, and the writing of its cache.

On the processor compiled C, on a GPU Triton, and where neither is there the plain torch of `reference`, which is what
both are held against: said once by a warning in the log, and by ``tarsia doctor`` through `status`. The environment's
TARSIA_SERVE_KERNEL forces an instruction set, or ``reference``.

Sums are float32 and rounded once. In C the bits of a row do not depend on the rows beside it, nor those of a token on
how its row was cut into calls.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from tarsia.quant import build, loader
from tarsia.quant.loader import Status, Team
from tarsia.serve import reference
from tarsia.serve.forms import Neck, Thin
from tarsia.serve.reference import Row

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
INTERFACE = loader.Interface(
    library=build.SERVING,
    abi=1,
    signatures={
        "grouped": [_I, _I, _P, _L, _L, _I, _P, _L, _L, _I, _L, _P, _L, _P, _P],
        "linear": [_I, _P, _L, _L, _I, _P, _L, _L, _I, _L, _P, _I, _P, _P],
        "inner": [_I, _P, _L, _L, _I, _L, _P, _L, _P],
        "attend": [_I, _P, _L, _L, _L, _L, _L, _I, _P, _P, _L, _L, _L, _P, _L, _P, _P, _L, _F, _L, _F, _P, _P],
        "store": [_P, _L, _L, _P, _L, _L, _L, _P, _P, _L, _L, _L, _P, _L],
    },
    sets={"portable": 0, "avx2": 1, "avx512": 2},
    best_first=("avx512", "avx2", "portable"),
    variable="TARSIA_SERVE_KERNEL",
)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_KINDS = {Thin: 0, Neck: 1}
_REFUSED = {-1: "it was called wrongly", -2: "it has not this instruction set", -4: "there is no memory left"}


class Kernel:
    """The library and one of its instruction sets, on ``parallel``'s threads (0: the calling thread alone)."""

    def __init__(self, handle: ctypes.CDLL, name: str, parallel: int) -> None:
        self.name = name
        self._set = INTERFACE.sets[name]
        self._team = Team(parallel)
        self._grouped, self._linear, self._inner, self._attend, self._store = (
            loader.function(INTERFACE, handle, what) for what in ("grouped", "linear", "inner", "attend", "store")
        )

    def grouped(self, x: Tensor, y: Tensor, starts: Tensor, forms: Sequence[Row], entries: Tensor) -> Tensor:
        """As `grouped`, on the processor."""
        kinds = {type(form) for form in forms} - {type(None)}
        if not kinds:
            return y
        if len(kinds) > 1 or (kind := _KINDS.get(kinds.pop())) is None:
            raise TypeError("forms of one kind at a site, Thin or Neck")
        _places(starts, len(forms))
        if len(x) != len(y) or entries.shape != (len(forms), 12) or entries.dtype != torch.int64:
            raise ValueError(f"entries {list(entries.shape)} for {len(forms)} forms, x {len(x)}, y {len(y)} tokens")
        code = self._grouped(
            self._set,
            kind,
            *_line(x),
            *_line(y),
            len(y),
            starts.data_ptr(),
            len(forms),
            entries.data_ptr(),
            self._team(),
        )
        _check(code)
        return y

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W' + b for a line x [tokens, in] and a ``weight`` [out, in] that is read from memory once: for few tokens.

        For processors that only emulate bfloat16, as torch does there slowly. Sums are float32, rounded once.
        """
        if weight.dtype not in _DTYPES or not weight.is_contiguous() or weight.shape[1] != x.shape[1]:
            raise ValueError(f"a weight [out, {x.shape[1]}], not {list(weight.shape)} in {weight.dtype}")
        held = None if bias is None else bias.float().contiguous()
        if held is not None and held.shape != weight.shape[:1]:
            raise ValueError(f"a bias of {len(weight)} numbers, not {list(held.shape)}")
        y = torch.empty(len(x), len(weight), dtype=x.dtype)
        own = len(x), weight.data_ptr(), _DTYPES[weight.dtype], None if held is None else held.data_ptr()
        _check(self._linear(self._set, *_line(x), *_line(y), *own, self._team()))
        return y

    def inner(self, x: Tensor, starts: Tensor, forms: Sequence[Row], entries: Tensor) -> Tensor:
        """As `inner`, on the processor."""
        _places(starts, len(forms))
        x = x.clone(memory_format=torch.contiguous_format)
        rows = starts.data_ptr(), len(forms), entries.data_ptr()
        _check(self._inner(self._set, *_line(x), len(x), *rows))
        return x

    def attend(  # noqa: PLR0913
        self,
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
        """As `attend`, on the processor."""
        blocks, block, kv_heads, dim = keys.shape
        tokens, heads, width = q.shape
        rows = len(before)
        if q.stride(2) != 1:
            q = q.contiguous()
        _places(starts, rows)
        sound = keys.dtype == values.dtype == q.dtype and keys.shape == values.shape and width == dim
        if not (sound and tables.dtype == before.dtype == torch.int32 and len(tables) == rows):
            raise ValueError(f"q {list(q.shape)}, pools {list(keys.shape)} and {list(values.shape)}, tables, before")
        if not (keys.is_contiguous() and values.is_contiguous() and tables.is_contiguous() and before.is_contiguous()):
            raise ValueError("pools, tables and before have to be contiguous")
        out = torch.empty(q.shape, dtype=q.dtype)
        code = self._attend(
            self._set,
            q.data_ptr(),
            tokens,
            q.stride(0),
            q.stride(1),
            heads,
            dim,
            _DTYPES[q.dtype],
            keys.data_ptr(),
            values.data_ptr(),
            blocks,
            block,
            kv_heads,
            tables.data_ptr(),
            tables.shape[1],
            starts.data_ptr(),
            before.data_ptr(),
            rows,
            scale,
            window or 0,
            softcap or 0.0,
            out.data_ptr(),
            self._team(),
        )
        _check(code)
        return out

    def store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """As `store`, on the processor."""
        blocks, block, kv_heads, dim = keys.shape
        if k.stride(2) != 1:
            k = k.contiguous()
        if v.stride(2) != 1:
            v = v.contiguous()
        sound = k.dtype == v.dtype == keys.dtype == values.dtype and k.shape == v.shape == (len(slots), kv_heads, dim)
        if not (sound and slots.dtype == torch.int64 and keys.is_contiguous() and values.is_contiguous()):
            raise ValueError(f"k {list(k.shape)}, v {list(v.shape)} for pools {list(keys.shape)}, {len(slots)} slots")
        code = self._store(
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            v.data_ptr(),
            v.stride(0),
            v.stride(1),
            k.element_size(),
            keys.data_ptr(),
            values.data_ptr(),
            blocks * block,
            kv_heads,
            dim,
            slots.data_ptr(),
            len(slots),
        )
        _check(code)


def _line(x: Tensor) -> tuple[int, int, int, int]:
    """Address, numbers from token to token, width and dtype."""
    if x.dim() != 2 or x.dtype not in _DTYPES or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"a line is [tokens, width] in float32 or bfloat16, not {list(x.shape)} in {x.dtype}")
    width = x.shape[1]
    return x.data_ptr(), x.stride(0) if len(x) > 1 else width, width, _DTYPES[x.dtype]


def _places(starts: Tensor, rows: int) -> None:
    if starts.dtype != torch.int32 or starts.shape != (rows + 1,) or not starts.is_contiguous():
        raise ValueError(f"starts of {rows} rows, not {list(starts.shape)} in {starts.dtype}")


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"the kernel refused: {_REFUSED.get(code, code)}")


def grouped(x: Tensor, y: Tensor, starts: Tensor, forms: Sequence[Row], entries: Tensor) -> Tensor:
    """``y`` [T, out], the base's output for ``x`` [T, in], changed in place by each row's form and returned.

    Row i has the tokens ``starts[i]`` to ``starts[i + 1] - 1`` (int32 [rows + 1]); ``entries`` int64 [rows, 12] says
    the forms again as the kernels read them. x carries a form's ``inner`` already.
    """
    if x.is_cuda and (triton := kernels()) is not None:
        return triton.grouped(x, y, starts, forms, entries)  # type: ignore[no-any-return]
    if not x.is_cuda and (kernel := library()) is not None and x.dtype in _DTYPES:
        return kernel.grouped(x, y, starts, forms, entries)
    return reference.grouped(x, y, starts, forms)


def inner(x: Tensor, starts: Tensor, forms: Sequence[Row], entries: Tensor) -> Tensor:
    """``x`` [T, in] with the tokens of rows whose form has an ``inner`` scaled by it: a copy where any has, else x."""
    if not any(type(form) is Thin and form.inner is not None for form in forms):
        return x
    if x.is_cuda and (triton := kernels()) is not None:
        return triton.inner(x, starts, forms)  # type: ignore[no-any-return]
    if not x.is_cuda and (kernel := library()) is not None and x.dtype in _DTYPES:
        return kernel.inner(x, starts, forms, entries)
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
    if q.is_cuda and (triton := kernels()) is not None:
        return triton.attend(q, keys, values, tables, starts, before, scale, window, softcap)  # type: ignore[no-any-return]
    if not q.is_cuda and (kernel := library()) is not None and q.dtype in _DTYPES:
        return kernel.attend(q, keys, values, tables, starts, before, scale, window, softcap)
    return reference.attend(q, keys, values, tables, starts, before, scale, window, softcap)


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write the line's ``k`` and ``v`` [T, kv heads, dim] to flat ``slots`` int64 [T] of the pools."""
    if not k.is_cuda and (kernel := library()) is not None:
        kernel.store(k, v, keys, values, slots)
    else:
        reference.store(k, v, keys, values, slots)


@cache
def library() -> Kernel | None:
    """The kernel that runs here, or None where the reference does. Raises ConfigError where one is forced in vain."""
    kernel, status = _find(INTERFACE.library.path, os.environ.get(INTERFACE.variable, ""))
    if status.do is not None:
        logging.getLogger(__name__).warning("serving: %s; to do: %s", status.text, status.do)
    return kernel


@cache
def kernels() -> ModuleType | None:
    """Triton's kernels (`serve.gpu`), or None where the reference runs on a GPU; why is in the log."""
    if os.environ.get(INTERFACE.variable, "") == "reference":
        return None
    try:
        from tarsia.serve import gpu
    except ImportError as error:
        logging.getLogger(__name__).warning("serving: on a GPU the slow reference, for there is no Triton (%s)", error)
        return None
    return gpu


def status() -> Status:
    """What runs on the processor and why."""
    return loader.status(INTERFACE)


def _find(path: Path, forced: str) -> tuple[Kernel | None, Status]:
    found, status = loader.find(INTERFACE, path, forced)
    return (None if found is None else Kernel(found.handle, found.name, found.parallel)), status
