"""A base model with everything that is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import nn

from tarsia.adapter.fingerprint import Fingerprint
from tarsia.core.site import Site

if TYPE_CHECKING:
    from tarsia.anatomy import Anatomy


@dataclass(frozen=True)
class Host:
    """A base model, in eval mode, with its processor, anatomy, sites and fingerprint.

    ``name`` is as the user wrote it, ``path`` the folder that it was read from (None for a model that was
    built in memory).
    """

    name: str
    path: Path | None
    model: nn.Module
    processor: Any
    anatomy: Anatomy
    sites: tuple[Site, ...]
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: nn.Module, *, name: str = "(in memory)", processor: Any = None) -> Self:
        """A host of a model that is in memory already; its fingerprint is taken from there."""
        raise NotImplementedError


def native_bf16() -> bool:
    """Whether this machine computes bfloat16 itself and does not emulate it."""
    raise NotImplementedError


def open_base(
    name: str, *, dtype: Literal["float32", "bfloat16", "auto"] = "float32", device: str = "cpu", processor: bool = True
) -> Host:
    """Load a base from a folder, a hub id or an embedded name such as "mini-1"."""
    raise NotImplementedError
