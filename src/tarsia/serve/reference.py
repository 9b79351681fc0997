"""What the kernels of serving compute, said in plain torch: obvious, slow, and what they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.methods.houlsby import ACTIVATIONS
from tarsia.serve.forms import Neck, Thin

Row = Thin | Neck | None


def grouped(x: Tensor, y: Tensor, starts: Tensor, forms: Sequence[Row]) -> Tensor:
    """``y`` [T, out], the base's output for ``x`` [T, in], changed in place by each row's form and returned.

    Row i has the tokens ``starts[i]`` to ``starts[i + 1] - 1``. Sums are float32 and rounded once, to y's dtype.
    """
    places = starts.tolist()
    for form, (first, last) in zip(forms, pairwise(places), strict=True):
        if form is not None and last > first:
            own, base = x[first:last].float(), y[first:last].float()
            y[first:last] = _thin(form, own, base) if isinstance(form, Thin) else _neck(form, own, base)
    return y


def _thin(form: Thin, x: Tensor, y: Tensor) -> Tensor:
    if form.down is not None and form.up is not None:
        y = y + form.scale * F.linear(F.linear(x, form.down.float()), form.up.float())
    if form.gain is not None:
        y = form.gain * y
    return y if form.shift is None else y + form.shift


def _neck(form: Neck, x: Tensor, y: Tensor) -> Tensor:
    held = {
        name: None if (tensor := getattr(form, name)) is None else tensor.float()
        for name in ("down", "up", "down_bias", "up_bias", "norm", "norm_bias")
    }
    h = x if form.of_input else y
    if held["norm"] is not None:
        h = F.layer_norm(h, h.shape[-1:], held["norm"], held["norm_bias"])
    down, up = held["down"], held["up"]
    assert down is not None and up is not None
    inner = ACTIVATIONS[form.activation](F.linear(h, down, held["down_bias"]))
    return y + form.scale * F.linear(inner, up, held["up_bias"])


def inner(x: Tensor, starts: Tensor, forms: Sequence[Row]) -> Tensor:
    """``x`` [T, in] with the tokens of rows whose form has an ``inner`` scaled by it: a copy where any has, else x."""
    if not any(isinstance(form, Thin) and form.inner is not None for form in forms):
        return x
    scaled, places = x.clone(), starts.tolist()
    for form, (first, last) in zip(forms, pairwise(places), strict=True):
        if isinstance(form, Thin) and form.inner is not None:
            scaled[first:last] = (form.inner * x[first:last].float()).to(x.dtype)
    return scaled


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write the line's ``k`` and ``v`` [T, kv heads, dim] to flat ``slots`` int64 [T] of the pools."""
    keys.flatten(0, 1)[slots] = k
    values.flatten(0, 1)[slots] = v


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
    """Causal attention of a line's rows, each over its own cached positions: [T, heads, dim].

    ``q`` [T, heads, dim]; pools [blocks, block, kv heads, dim], the line's own keys in them already; ``tables`` int32
    [rows, most]: block i of a row holds its positions i * block and on; ``before`` int32 [rows]: positions that were
    cached before this line's. With a ``window`` n a token sees itself and the n - 1 before it. ``softcap`` c makes a
    score s c tanh(s / c), after the scale. Computed in float32 and rounded once.
    """
    out, places, had = torch.empty_like(q), starts.tolist(), before.tolist()
    block = keys.shape[1]
    for row, (first, last) in enumerate(pairwise(places)):
        if last > first:
            total = had[row] + last - first
            low = 0 if window is None else max(0, had[row] - window + 1) // block  # blocks before it may be gone
            blocks = tables[row, low : -(-total // block)].long()
            k, v = (pool[blocks].flatten(0, 1)[: total - low * block] for pool in (keys, values))
            mask = seen(len(k), low * block, last - first, had[row], window).to(q.device)
            out[first:last] = one(q[first:last], k, v, mask, scale, softcap)
    return out


def seen(positions: int, offset: int, tokens: int, before: int, window: int | None) -> Tensor:
    """Which of the positions from ``offset`` on each of the tokens from ``before`` on sees: [tokens, positions]."""
    places = torch.arange(offset, offset + positions)
    own = torch.arange(before, before + tokens)[:, None]
    return places <= own if window is None else (places <= own) & (places > own - window)


def one(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention of one row's ``q`` [tokens, heads, dim] over its ``k`` and ``v`` [positions, kv heads, dim]."""
    dtype, heads, kv = q.dtype, q.shape[1], k.shape[1]
    q, k, v = (part.float().transpose(0, 1)[None] for part in (q, k, v))
    # what is not seen may never have been written: a NaN of it would come through a product with 0
    v = v.masked_fill(~seen.any(0)[:, None], 0.0)
    if softcap is None:
        found = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=heads != kv)
    else:
        k, v = (part.repeat_interleave(heads // kv, 1) for part in (k, v))
        scores = softcap * torch.tanh(scale * (q @ k.mT) / softcap)
        found = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    return found[0].transpose(0, 1).to(dtype)
