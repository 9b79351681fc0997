"""Which base: digests of everything that an adapter's meaning depends on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests of a base model, each independent of sharding and of the dtype that it is loaded in."""

    weights: str
    architecture: str
    quantisation: str
    processor: str
    template: str

    def check(self, other: Fingerprint, *, allow: Collection[str] = ()) -> None:
        """Raise BaseMismatch, naming the parts, where ``other`` is another base.

        ``allow`` may name "processor" and "template": a difference there is then accepted.
        """
        raise NotImplementedError
