"""What training produces: an immutable value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from tarsia.adapter.fingerprint import Fingerprint
from tarsia.adapter.host import Host
from tarsia.core.attach import Part

if TYPE_CHECKING:
    from tarsia.adapter.proof import Probe


@dataclass(frozen=True)
class Patched:
    """One site's patch: the method, its constants (an effective scale, for one) and its tensors, on the CPU."""

    method: str
    constants: Mapping[str, float | int | bool]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """Trained patches by site path, how they were made, the base they belong to, and their card.

    ``card`` is JSON: recipe hash, data digests, measured results. ``probe`` is what its outputs were.
    """

    parts: tuple[Part, ...]
    patches: Mapping[str, Patched]
    fingerprint: Fingerprint | None
    card: Mapping[str, Any]
    probe: Probe | None = None

    @classmethod
    def of(
        cls, host: Host, name: str, parts: Sequence[Part], card: Mapping[str, Any] | None = None, probe: Probe | None = None
    ) -> Self:
        """Copy the adapter ``name`` out of the host's model; training on does not change the value."""
        raise NotImplementedError


def put(host: Host, adapter: Adapter, name: str, *, allow: Collection[str] = ()) -> None:
    """Install the adapter into the host's model under ``name``, active.

    Raises AdapterError where a site is not there or not of the right shape, or a tensor is left over or
    missing, and BaseMismatch where the fingerprint differs (``allow``: see Fingerprint.check).
    """
    raise NotImplementedError
