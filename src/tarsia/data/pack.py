"""Rows laid end to end, so that a batch of uneven rows holds answers instead of padding.

A packed batch has the rows of a padded one in fewer *lines*, none longer than the longest row, so that
attention costs no more than before. Each row keeps its own positions, which begin anew, and that is how
Transformers (``masking_utils.find_packed_sequence_indices``) knows where a row ends: attention stays inside of
it. It looks only where there is no attention mask, so a packed batch has none, and the padding at a line's end
is a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tarsia.data.encode import IGNORED, Batch

ALONG_IDS: Final = ("token_type_ids", "mm_token_type_ids")
"""Inputs beside the ids that have one entry a token; all others hold pictures, in the order of the rows."""
PADDING: Final = -1
"""The owner of a position that no row has."""


def next_fit(lengths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Rows by line, in their order: one that does not fit into the last line begins another.

    No line is longer than the longest row. In order, for pictures follow one another as their rows do.
    """
    lines: list[list[int]] = []
    space = 0
    for row, length in enumerate(lengths):
        if length > space:
            lines.append([])
            space = max(lengths)
        lines[-1].append(row)
        space -= length
    return tuple(tuple(line) for line in lines)


def pack(batch: Batch, positions: Tensor) -> Batch:
    """The rows of ``batch`` in fewer lines.

    ``positions``, int64 [rows, length] or [axes, rows, length], are what the model counts in the padded batch;
    the first axis counts tokens. A row's first token is predicted by nothing, as it is unpacked.
    """
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    lengths: list[int] = mask.sum(1).tolist()
    lines = next_fit(lengths)
    places = [(line, row) for line, held in enumerate(lines) for row in held]
    # where each real token of the padded batch, row by row, comes to lie
    at_line = torch.tensor([line for line, row in places for _ in range(lengths[row])])
    starts = [sum(lengths[r] for r in held[:i]) for held in lines for i in range(len(held))]
    at = torch.cat([start + torch.arange(lengths[row]) for start, (_, row) in zip(starts, places, strict=True)])
    shape = (len(lines), max(sum(lengths[row] for row in held) for held in lines))

    def laid(value: Tensor, fill: Tensor | int) -> Tensor:
        line = torch.empty(shape, dtype=value.dtype, device=value.device)
        line[:] = fill
        line[at_line.to(value.device), at.to(value.device)] = value[mask.to(value.device)]
        return line

    rows = torch.arange(len(lengths))[:, None].expand(mask.shape)
    owners = laid(rows, PADDING)
    labels = laid(batch.labels.masked_fill(mask.to(batch.labels.device).cumsum(1) <= 1, IGNORED), IGNORED)
    inputs = {key: value for key, value in batch.inputs.items() if key not in ("attention_mask", *ALONG_IDS)}
    inputs["input_ids"] = laid(ids, _padding_id(batch))
    inputs |= {key: laid(batch.inputs[key], 0) for key in ALONG_IDS if key in batch.inputs}
    after = _from_zero(owners).to(positions.device)
    inputs["position_ids"] = (
        laid(positions, after) if positions.ndim == 2 else torch.stack([laid(axis, after) for axis in positions])
    )
    return Batch(inputs, labels, batch.n_pictures, batch.sources, batch.rows, owners)


def _padding_id(batch: Batch) -> int:
    """The id that pads this batch; any other that is no picture's does as well, for nothing reads it."""
    padded = batch.inputs["input_ids"][~batch.inputs["attention_mask"].bool()]
    return int(padded[0]) if len(padded) else 0


def _from_zero(owners: Tensor) -> Tensor:
    """Positions of the padding of each line: 0, 1, ... from where it begins."""
    padding = owners == PADDING
    return (padding.cumsum(1) - 1).clamp(min=0)
