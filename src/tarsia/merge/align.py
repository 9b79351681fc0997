"""A common frame for low-rank deltas: KnOTS (arXiv:2410.19735) and Core Space (arXiv:2509.17786).

tau_i = left P_i right for all i, with parts P_i [p, q] to merge and orthonormal left [out, p] or right [q, in]. Both
frames lose nothing (up to rounding in float64), since every tau_i lies in them. They follow from the tau_i alone: each
is split as U sqrt(S) sqrt(S) V^T first, so it does not matter how an adapter spells its factors, nor the order of
adapters, but for signs of directions, which everything that is merged in a frame takes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tarsia.merge.delta import Delta

NOTHING = 1e-10
"""Singular values below this share of the largest are rounding: float64's is 2e-16 of a number."""


@dataclass(frozen=True, eq=False)
class Frame:
    """``parts`` [n, p, q]: delta i is ``left`` [out, p] @ parts[i] @ ``right`` [q, in], a side None the identity."""

    left: Tensor | None
    right: Tensor | None
    parts: Tensor

    def back(self, merged: Tensor) -> Delta:
        """The delta of a merged part [p, q], factored where the frame is thin."""
        if self.left is None and self.right is None:
            return Delta(whole=merged)
        if self.left is None:
            return Delta(up=merged, down=self.right)
        if self.right is None:
            return Delta(up=self.left, down=merged)
        if merged.shape[0] <= merged.shape[1]:
            return Delta(up=self.left, down=merged @ self.right)
        return Delta(up=self.left @ merged, down=self.right)


def svd(matrix: Tensor, size: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], S [k], V^T [k, n] of a matrix in float64, without singular values that are rounding.

    They are that beside ``size``, what the matrix is a sum of; None: beside the largest.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = int((values > NOTHING * (values[:1] if size is None else size)).sum())
    return left[:, :count], values[:count], right[:count]


def split(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k] and V^T [k, in] of a delta's weight; of a factored one from its factors alone."""
    if delta.up is None or delta.down is None:
        return svd(delta.weight())
    left, small = torch.linalg.qr(delta.up)
    right, other = torch.linalg.qr(delta.down.T)
    inner, values, outer = svd(small @ other.T)
    return left @ inner, values, outer @ right.T


def whole(deltas: Sequence[Delta], dtype: torch.dtype = torch.float64) -> Frame:
    """No frame: the deltas as they are, [n, out, in]. A delta that leaves the weight is zero."""
    shape = next(
        delta.weight().shape if not delta.factored else (_rows(delta), _columns(delta))
        for delta in deltas
        if not delta.still
    )
    parts = [torch.zeros(shape, dtype=dtype) if delta.still else delta.weight(dtype) for delta in deltas]
    return Frame(None, None, torch.stack(parts))


def core(deltas: Sequence[Delta]) -> Frame:
    """Core Space: orthonormal bases of all ups and of all downs, and R x R cores between them (2509.17786).

    The bases are the left and the right singular vectors of the stacked halves U sqrt(S) and sqrt(S) V^T.
    """
    splits = [None if delta.still else split(delta) for delta in deltas]
    held = [parts for parts in splits if parts is not None]
    left = svd(torch.cat([u * s.sqrt() for u, s, _ in held], 1))[0]
    right = svd(torch.cat([s.sqrt()[:, None] * v for _, s, v in held]))[2]
    empty = torch.zeros(left.shape[1], right.shape[0], dtype=torch.float64)
    parts = [empty if p is None else (left.T @ p[0]) @ (p[1][:, None] * (p[2] @ right.T)) for p in splits]
    return Frame(left, right, torch.stack(parts))


def outputs(deltas: Sequence[Delta]) -> Frame:
    """An orthonormal basis of all outputs alone: parts [p, in]. Factored deltas stay so, and inputs are the layer's."""
    frame = core(deltas)
    assert frame.right is not None
    return Frame(frame.left, None, frame.parts @ frame.right)


def knots(deltas: Sequence[Delta]) -> Frame:
    """KnOTS: one SVD of [tau_1 ... tau_n] = U S [V_1 ... V_n]; the parts are S V_i [p, in] (2410.19735).

    The SVD is made of the cores, which are R x R: no matrix of the size of a weight is there. A plain sum of the parts
    is the plain sum of the deltas, so this is for ways that look at single numbers.
    """
    frame = core(deltas)
    assert frame.left is not None and frame.right is not None
    inner = svd(torch.cat(list(frame.parts), 1))[0]
    return Frame(frame.left @ inner, None, (inner.T @ frame.parts) @ frame.right)


def _rows(delta: Delta) -> int:
    assert delta.up is not None
    return delta.up.shape[0]


def _columns(delta: Delta) -> int:
    assert delta.down is not None
    return delta.down.shape[1]


ALIGN: dict[str, Callable[[Sequence[Delta]], Frame]] = {"knots": knots, "core": core}
"""Every frame by name; ``none`` is none of them."""
