"""How a base comes into memory: weight by weight, as Transformers reads them and Tarsia's quantiser rounds them.

A weight that is computed with in the dtype and under the name that its file holds it by stays in the file: it is a view
of mapped pages, outside the allocator. Any other is a copy: in another dtype, or put together from several tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import torch
from torch import nn

from tarsia.adapter.fingerprint import shards
from tarsia.adapter.reading import header, read_json
from tarsia.adapter.spelling import Speller
from tarsia.adapter.tensors import DTYPES
from tarsia.core.site import Site
from tarsia.plan.ledger import Block, Category, Ledger
from tarsia.quant.rounding import PIECE
from tarsia.quant.tensor import Weight4

READ: Final = 16 * PIECE
"""Numbers of a weight whose pages of a file are held while it is rounded (``tarsia.quant.rounding``)."""


COMPUTED: Final = (torch.float32, torch.float16, torch.bfloat16)


def told(folder: Path) -> torch.dtype:
    """What the files in ``folder`` hold weights in, as its configuration says; float32 where it does not."""
    values = read_json(folder / "config.json")
    name = values.get("dtype") or values.get("torch_dtype")
    return next((dtype for dtype in COMPUTED if str(dtype) == f"torch.{name}"), torch.float32)


@dataclass(frozen=True, slots=True)
class Files:
    """What a base's files hold: the dtype of most weights, and, where the files are here, that of each by its name."""

    dtype: torch.dtype
    weights: Mapping[str, torch.dtype] | None
    quantised: bool
    """Whether the weights that are in 4 bits are so in the files."""

    @classmethod
    def of(cls, folder: Path, model: nn.Module, sites: tuple[Site, ...], quantised: bool) -> Self:
        """Read the headers of the files in ``folder``; without files the configuration says what they hold."""
        said = told(folder)
        if not any(folder.glob("*.safetensors")):
            return cls(said, None, quantised)
        own = Speller.of(model, sites).own
        found: dict[str, torch.dtype] = {}
        for path in shards(folder):
            for key, entry in header(path)[0].items():
                module, _, leaf = key.rpartition(".")
                place = own(module) if module else ""
                if place is not None and DTYPES.get(entry["dtype"]) in COMPUTED:
                    found[f"{place}.{leaf}" if place else leaf] = DTYPES[entry["dtype"]]
        dtypes = list(found.values()) or [said]
        return cls(max(set(dtypes), key=dtypes.count), found, quantised)

    def mapped(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the parameter ``name`` lies in a file as it is computed with."""
        return (self.dtype if self.weights is None else self.weights.get(name)) is dtype

    def whole(self, name: str) -> bool:
        """Whether a file holds it under one name."""
        return self.weights is None or name in self.weights


def arrive(model: nn.Module, files: Files, ledger: Ledger) -> None:
    """Note ``model``, which was built without its weights, as if it were read now: what came before is forgotten."""
    ledger.restart()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, Weight4):
            _rounded(name, tensor, files, ledger)
            continue
        block = ledger.arrive(tensor, Category.WEIGHTS)
        if block is not None:
            block.outside = files.mapped(name, tensor.dtype)
    ledger.rest()


def _rounded(name: str, weight: Weight4, files: Files, ledger: Ledger) -> None:
    """A weight's codes and constants, and what rounding it takes."""
    blocks = [ledger.arrive(part, Category.QUANTISED) for part in (*weight.value.tensors.values(), weight.levels)]
    if files.quantised:
        for block in blocks[:-1]:
            _lies_in_a_file(block)
        return
    held = weight.numel() if not files.whole(name) else min(weight.numel(), READ)
    ledger.scratch(held * files.dtype.itemsize + rounding(weight), "rounding")


def _lies_in_a_file(block: Block | None) -> None:
    if block is not None:
        block.outside = True


def rounding(weight: Weight4) -> int:
    """Bytes that rounding takes at once: pieces in float32, and, for the constants, as many again as there are."""
    constants = 4 * -(-weight.numel() // weight.value.scheme.block)
    piece = 4 * min(PIECE, weight.numel())
    # measured: rounded() takes 7 times the constants where it nests them, lost() three pieces and the constants
    return max(7 * constants + piece // 4 if weight.value.scheme.nested else 0, 13 * piece // 4 + constants)
