"""What of a matrix a product of two thin ones can hold: its largest singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from tarsia.core.errors import AttachError

NOTHING = 1e-6
"""Singular values below this share of the largest are rounding: float32's of a weight is 6e-8 of a number."""


def principal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k] and V^T [k, in] of the ``rank`` largest singular values of ``weight`` [out, in], in float64.

    U diag(S) V^T is the nearest matrix of that rank (Eckart-Young, 1936). Exact, from the eigenvectors of the smaller
    of W W^T and W^T W in float64, which squares the condition: values are right to about 1e-8 of the largest. Those
    that are nothing but rounding are left out, so k may be less than ``rank``.

    Costs about 10 n^3 operations for n the smaller side, whatever the rank.
    Raises AttachError for numbers that are not finite.
    """
    wide = weight.detach().double()
    if not bool(wide.isfinite().all()):
        raise AttachError("The weight holds numbers that are not finite.", do="fetch the base again")
    tall = wide.shape[0] > wide.shape[1]
    wide = wide.t() if tall else wide
    vectors = torch.linalg.eigh(wide @ wide.t()).eigenvectors.flip(1)[:, :rank]
    other = vectors.t() @ wide
    values = other.norm(dim=1)
    kept = int((values > NOTHING * values[0]).sum())
    left, values, right = vectors[:, :kept], values[:kept], other[:kept] / values[:kept, None]
    return (right.t(), values, left.t()) if tall else (left, values, right)
