"""A weight that is kept in another form than its numbers."""

from __future__ import annotations

import torch
from torch import Tensor


class Packed(Tensor):
    """A frozen weight with the shape and the dtype of the numbers that it stands for, and other bytes.

    ``F.linear(x, w)`` and ``y @ w`` work on it, whatever dtype x and y have; so do moving and copying. Anything else
    asks for ``dense``, and what does not is refused: the numbers are never made unasked.
    """

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers, in ``dtype`` (None: its own)."""
        raise NotImplementedError
