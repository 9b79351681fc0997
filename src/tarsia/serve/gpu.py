"""The kernels of serving on a GPU, in Triton: adapters found by the pointers of their entries, attention over blocks.

One program has one token, so a token's bits depend on its row alone. With TRITON_INTERPRET=1 from before Triton is
imported all of it runs on the processor, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tarsia.quant.gpu import tile
from tarsia.quant.gpu.lang import jit, kernel, tl
from tarsia.serve.forms import Neck, Thin
from tarsia.serve.reference import Row

COLUMNS, OUTPUTS, RANKS, POSITIONS = 256, 128, 16, 32


@jit
def _numbers(address: tl.tensor, half: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Numbers ``at`` places behind an address, bfloat16 where ``half`` is 1, as float32; 0 where there is no mask."""
    if half == 1:
        found = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=mask, other=0.0).to(tl.float32)
    else:
        found = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    return found


@jit
def _activated(x: tl.tensor, activation: tl.tensor) -> tl.tensor:
    if activation == 0:
        y = tl.maximum(x, 0.0)
    elif activation == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == 2:
        y = x / (1.0 + tl.exp(-x))
    else:
        y = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return y


@kernel()
def _down(  # noqa: PLR0913  kernels take tensors one by one
    x: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    entries: tl.tensor,
    hidden: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    x_width: tl.tensor,
    y_width: tl.tensor,
    most: tl.tensor,
    NECK: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """hidden [tokens, most]: program (t, i) has RANKS ranks of token t."""
    t = tl.program_id(0)
    entry = entries + 12 * tl.load(rows + t).to(tl.int64)
    address, rank = tl.load(entry), tl.load(entry + 2).to(tl.int32)
    r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS < rank:
        half = tl.load(entry + (8 if NECK else 7)).to(tl.int32)
        normed = tl.zeros((), tl.int64)
        own = x + t.to(tl.int64) * x_stride
        width = x_width
        if NECK:
            normed = tl.load(entry + 6)
            if tl.load(entry + 10) == 0:
                own = y + t.to(tl.int64) * y_stride
                width = y_width
        mean, by = 0.0, 1.0
        if normed != 0:
            total = tl.zeros((COLUMNS,), tl.float32)
            for first in range(0, width, COLUMNS):
                c = first + tl.arange(0, COLUMNS)
                total += tl.load(own + c, mask=c < width, other=0.0).to(tl.float32)
            mean = tl.sum(total, 0) / width
            total = tl.zeros((COLUMNS,), tl.float32)
            for first in range(0, width, COLUMNS):
                c = first + tl.arange(0, COLUMNS)
                off = tl.where(c < width, tl.load(own + c, mask=c < width, other=0.0).to(tl.float32) - mean, 0.0)
                total += off * off
            by = 1.0 / tl.sqrt(tl.sum(total, 0) / width + 1e-5)
        sums = tl.zeros((RANKS, COLUMNS), tl.float32)
        for first in range(0, width, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            h = tl.load(own + c, mask=c < width, other=0.0).to(tl.float32)
            if normed != 0:
                h = (h - mean) * by * _numbers(normed, half, c, c < width)
                h += _numbers(tl.load(entry + 7), half, c, c < width)
            there = (r < rank)[:, None] & (c < width)[None, :]
            place = r.to(tl.int64)[:, None] * width + c[None, :]
            sums += _numbers(address, half, place, there) * h[None, :]
        found = tl.sum(sums, 1)
        if NECK:
            bias = tl.load(entry + 4)
            if bias != 0:
                found += _numbers(bias, half, r, r < rank)
            found = _activated(found, tl.load(entry + 9).to(tl.int32))
        tl.store(hidden + t.to(tl.int64) * most + r, found, mask=r < rank)


@kernel()
def _up(  # noqa: PLR0913  kernels take tensors one by one
    y: tl.tensor,
    rows: tl.tensor,
    entries: tl.tensor,
    hidden: tl.tensor,
    y_stride: tl.tensor,
    y_width: tl.tensor,
    most: tl.tensor,
    NECK: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    """y [tokens, out] changed in place: program (t, i) has OUTPUTS outputs of token t."""
    t = tl.program_id(0)
    entry = entries + 12 * tl.load(rows + t).to(tl.int64)
    rank = tl.load(entry + 2).to(tl.int32)
    gain, shift = tl.load(entry + 4), tl.load(entry + 5)
    if (rank > 0) | ((gain | shift) != 0):
        o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        within = o < y_width
        half = tl.load(entry + (8 if NECK else 7)).to(tl.int32)
        scale = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
        sums = tl.zeros((OUTPUTS,), tl.float32)
        for first in range(0, rank, RANKS):
            r = first + tl.arange(0, RANKS)
            h = tl.load(hidden + t.to(tl.int64) * most + r, mask=r < rank, other=0.0)
            place = o.to(tl.int64)[:, None] * rank + r[None, :]
            there = within[:, None] & (r < rank)[None, :]
            sums += tl.sum(_numbers(tl.load(entry + 1), half, place, there) * h[None, :], 1)
        at = y + t.to(tl.int64) * y_stride + o
        if NECK:
            if shift != 0:
                sums += _numbers(shift, half, o, within)
            found = tl.load(at, mask=within, other=0.0).to(tl.float32) + scale * sums
        else:
            found = tl.load(at, mask=within, other=0.0).to(tl.float32)
            if rank > 0:
                found += scale * sums
            if gain != 0:
                found *= _numbers(gain, 0, o, within)
            if shift != 0:
                found += _numbers(shift, 0, o, within)
        tl.store(at, found.to(y.dtype.element_ty), mask=within)


@kernel("most")
def _attend(  # noqa: PLR0913  kernels take tensors one by one
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    before: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    most: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    kv_heads: tl.tensor,
    group: tl.tensor,
    dim: tl.tensor,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    POSITIONS: tl.constexpr,
) -> None:
    """out [tokens, heads, dim]: program (t, k) has the heads of token t that share head k of the cache."""
    t, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + t)
    own = tl.load(before + row) + t - tl.load(starts + row)
    g, d = tl.arange(0, GROUP), tl.arange(0, DIM)
    live = (g < group)[:, None] & (d < dim)[None, :]
    heads = (head * group + g).to(tl.int64)
    query = tl.load(q + t.to(tl.int64) * q_token + heads[:, None] * q_head + d[None, :], mask=live, other=0.0)
    query = query.to(tl.float32) * scale
    highest, total = tl.full((GROUP,), float("-inf"), tl.float32), tl.zeros((GROUP,), tl.float32)
    found = tl.zeros((GROUP, DIM), tl.float32)
    low = tl.where(window > 0, tl.maximum(own - window + 1, 0), 0)
    for first in range(low // POSITIONS * POSITIONS, own + 1, POSITIONS):
        p = first + tl.arange(0, POSITIONS)
        seen = (p >= low) & (p <= own)
        block = tl.load(tables + row.to(tl.int64) * most + p // BLOCK, mask=seen, other=0).to(tl.int64)
        place = ((block * BLOCK + p % BLOCK) * kv_heads + head) * dim
        there = seen[:, None] & (d < dim)[None, :]
        k = tl.load(keys + place[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
        v = tl.load(values + place[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
        scores = tl.sum(query[:, None, :] * k[None, :, :], 2)
        if softcap > 0:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top = tl.maximum(highest, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - top[:, None]), tl.exp(highest - top)
        total = total * shrink + tl.sum(weights, 1)
        found = found * shrink[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], 1)
        highest = top
    found = found / total[:, None]
    at = out + (t.to(tl.int64) * kv_heads * group + heads[:, None]) * dim + d[None, :]
    tl.store(at, found.to(out.dtype.element_ty), mask=live)


def rows_of(starts: Tensor, tokens: int) -> Tensor:
    """The row of each token, int32 [tokens], without asking the GPU for anything."""
    return torch.searchsorted(
        starts[1:], torch.arange(tokens, device=starts.device, dtype=torch.int32), right=True
    ).int()


def grouped(x: Tensor, y: Tensor, starts: Tensor, forms: Sequence[Row], entries: Tensor) -> Tensor:
    """As `kernel.grouped`; ``starts`` and ``entries`` are on the GPU and the rows cover all tokens."""
    held = [form for form in forms if form is not None]
    if not held or not len(y):
        return y
    ranks = [len(form.down) for form in held if form.down is not None]
    tokens, most, neck = len(y), max(ranks, default=0), isinstance(held[0], Neck)
    hidden = torch.empty((tokens, max(most, 1)), dtype=torch.float32, device=y.device)
    rows = rows_of(starts, tokens)
    if most:
        tile.start(
            _down,
            (tokens, -(-most // RANKS)),
            y.device,
            *(x, y, rows, entries, hidden, x.stride(0), y.stride(0), x.shape[1], y.shape[1], hidden.shape[1]),
            NECK=neck,
            RANKS=RANKS,
            COLUMNS=COLUMNS,
        )
    tile.start(
        _up,
        (tokens, -(-y.shape[1] // OUTPUTS)),
        y.device,
        *(y, rows, entries, hidden, y.stride(0), y.shape[1], hidden.shape[1]),
        NECK=neck,
        RANKS=RANKS,
        OUTPUTS=OUTPUTS,
    )
    return y


def inner(x: Tensor, starts: Tensor, forms: Sequence[Row]) -> Tensor:
    """As `kernel.inner`: each row's vector, ones where it has none, times its tokens."""
    ones = torch.ones(x.shape[1], device=x.device)
    by = [ones if not isinstance(form, Thin) or form.inner is None else form.inner for form in forms]
    return (x.float() * torch.stack(by).index_select(0, rows_of(starts, len(x)).long())).to(x.dtype)


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
    """As `kernel.attend`; everything is on the GPU and the rows cover all tokens."""
    tokens, heads, dim = q.shape
    _, block, kv_heads, _ = keys.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    group = heads // kv_heads
    tile.start(
        _attend,
        (tokens, kv_heads),
        q.device,
        *(q, keys, values, tables, rows_of(starts, tokens), starts, before, out),
        *(float(scale), float(softcap or 0.0), window or 0, tables.shape[1], q.stride(0), q.stride(1)),
        *(kv_heads, group, dim),
        BLOCK=block,
        GROUP=_power(group),
        DIM=_power(dim),
        POSITIONS=POSITIONS,
    )
    return out


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
