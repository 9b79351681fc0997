"""What an adapter adds to its base's weights, as a value.

A fold is each method's specification, so the delta of any patch that folds is what the fold makes of (W, b) less
(W, b). Where a patch adds the same to any weight (``core.patch.Additive``) nothing of the base is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tarsia.adapter.fingerprint import NONE, Fingerprint
from tarsia.adapter.host import Host, Outline
from tarsia.adapter.origin import Origins
from tarsia.adapter.value import Adapter, Patched, restored
from tarsia.core.errors import AttachError, MergeError
from tarsia.core.method import find
from tarsia.core.packed import Packed
from tarsia.core.patch import Patch, dense
from tarsia.core.site import Site
from tarsia.merge.belonging import hold
from tarsia.merge.inputs import Seen, Watched

Read = Callable[[str], tuple[Tensor, Tensor | None]]
"""The base's own weight and bias at a site, by its path."""


@dataclass(frozen=True, eq=False)
class Delta:
    """The change of one site's weight and bias, in float64.

    ``up`` [out, rank] and ``down`` [rank, in], whose product is the change (every scale is inside); or ``whole`` of
    the weight's shape; or neither, where the weight stays. ``bias`` of the bias's shape, None where it stays.
    ``inputs`` gives what the site is given when the adapter runs over its probe, [n, in] in float32 (see ``Seen``);
    None where nobody can tell. It is asked only by ways that look at it.
    """

    up: Tensor | None = None
    down: Tensor | None = None
    whole: Tensor | None = None
    bias: Tensor | None = None
    inputs: Seen | None = None

    @property
    def factored(self) -> bool:
        """Whether the weight's change is a product of two thin matrices."""
        return self.up is not None

    @property
    def still(self) -> bool:
        """Whether the weight stays as it is."""
        return self.up is None and self.whole is None

    @property
    def rank(self) -> int | None:
        """Width of the factors; None where there are none."""
        return None if self.up is None else self.up.shape[1]

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The weight's change [out, in] as one tensor. Raises MergeError where it stays."""
        if self.up is not None and self.down is not None:
            return self.up.to(dtype) @ self.down.to(dtype)
        if self.whole is None:
            raise MergeError("This changes no weight.", given="a bias alone" if self.bias is not None else "nothing")
        return self.whole.to(dtype)

    def scaled(self, factor: float) -> Delta:
        """``factor`` times the change."""
        up, whole, bias = (None if t is None else factor * t for t in (self.up, self.whole, self.bias))
        return Delta(up, self.down, whole, bias, self.inputs)

    @cached_property
    def norm(self) -> float:
        """Frobenius norm of the weight's change, without making it where it is factored."""
        if self.up is not None and self.down is not None:
            squared = ((self.up.T @ self.up) * (self.down @ self.down.T)).sum().clamp_min(0)
            return float(squared.sqrt())
        return 0.0 if self.whole is None else float(self.whole.norm())

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the tensors: what is drawn for this delta follows from it, whoever else is merged."""
        total = hashlib.sha256()
        for name in ("up", "down", "whole", "bias"):
            value: Tensor | None = getattr(self, name)
            if value is not None:
                total.update(f"{name}{tuple(value.shape)}".encode())
                total.update(value.contiguous().numpy().tobytes())
        return total.digest()


@dataclass(frozen=True, eq=False)
class Grounds:
    """The sites of a base, and its weights where they must be read: ``Grounds.of(host)``, ``Grounds.of(outline)``."""

    base: Host | Outline
    sites: Mapping[str, Site]
    read: Read

    @classmethod
    def of(cls, base: Host | Outline, wanted: Fingerprint | None = None) -> Grounds:
        """Of an open base its tensors (dequantised where packed), of an outline its files', one at a time.

        Of an outline the files are held to the fingerprint ``wanted`` (None: unknown). Raises BaseMismatch.
        """
        sites = {site.path: site for site in base.sites}
        if isinstance(base, Host):
            modules = base.model
            return cls(base, sites, lambda path: _held(modules.get_submodule(sites[path].module), sites[path]))
        if wanted is not None:
            hold(base, wanted)
        return cls(base, sites, _Files(base, sites, wanted))

    def site(self, path: str) -> Site:
        """Raises MergeError where the base has none of this path."""
        if path not in self.sites:
            raise MergeError(
                "The base has no such place for a patch.", given=path, do="open the base that the adapter belongs to"
            )
        return self.sites[path]

    def packed(self, site: Site) -> bool:
        """Whether the site's weight is in 4 bits here."""
        if not site.weight:
            return False
        value = self.base.model.get_submodule(site.module)._parameters.get(site.key)
        return isinstance(value, Packed)


def _held(module: torch.nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    weight, bias = dense(module, site)
    return weight.detach().cpu(), None if bias is None else bias.detach().cpu()


class _Files:
    """Reads a site's tensors from the base's files."""

    def __init__(self, outline: Outline, sites: Mapping[str, Site], wanted: Fingerprint | None) -> None:
        self.outline, self.sites, self.wanted = outline, sites, wanted
        self.origins = Origins(outline.path, outline.model, outline.sites)

    def __call__(self, path: str) -> tuple[Tensor, Tensor | None]:
        if self.wanted is not None and self.wanted.quantisation != NONE:
            raise MergeError(
                "What these adapters change can not be told from the files of a base that was quantised for them.",
                given=self.wanted.quantisation[:80],
                do="give the base opened as it was for training (open_base(..., four_bits=...))",
            )
        site = self.sites[path]
        weight = self.origins(site)
        place = None if site.bias is None else self.origins.places.get(site.bias)
        if tuple(weight.shape) != site.shape or (site.bias is not None and place is None):
            raise AttachError(
                f"{path} is kept in another form by the base's files.",
                given=f"{tuple(weight.shape)} in {self.outline.path}",
                allowed=site.shape,
                do="give the base itself, opened, in place of its outline",
            )
        return weight, None if place is None else place.read()


def patch_of(patched: Patched, grounds: Grounds, path: str) -> Patch:
    """The patch itself, in float64 and evaluation mode. Raises AdapterError where it does not fit the site."""
    return restored(grounds.base, grounds.site(path), patched).double().eval()


def delta_of(patched: Patched, grounds: Grounds, path: str) -> Delta:
    """What one patch adds. Raises MergeError, naming site and method, where that is no change of (W, b)."""
    if not find(patched.method).folds:
        raise MergeError(
            f"{patched.method} at {path} is no change of a weight, so it has no part in this arithmetic.",
            given=patched.method,
            allowed="methods that fold",
            do="merge by a plain sum (--method task_arithmetic), which joins bottlenecks exactly, or leave it out",
        )
    patch = patch_of(patched, grounds, path)
    with torch.no_grad():
        additive: Any = patch if hasattr(patch, "delta") else None
        if additive is not None:
            up, down, bias = (None if t is None else t.detach().double() for t in additive.delta())
            return Delta(up=up, down=down, bias=bias)
        weight, bias = (None if t is None else t.double() for t in grounds.read(path))
        assert weight is not None
        after, moved = patch.fold(weight, bias)
        shift = None if moved is None or bias is None else (moved - bias).detach()
        change = (after - weight).detach()
    return Delta(
        whole=change if bool(change.any()) else None, bias=None if shift is None or not bool(shift.any()) else shift
    )


def deltas(adapter: Adapter, base: Host | Outline | Grounds) -> dict[str, Delta]:
    """What the adapter adds to its base, by site path, in the base's order of sites.

    Weights are read only for methods whose change depends on them (dora, oft, ia3, full). Over a host that is open,
    each delta can tell its ``inputs``; the adapter's probe runs when the first is asked.
    Raises MergeError for a patch that is no change of (W, b), and for a site that the base does not have.
    """
    grounds = base if isinstance(base, Grounds) else Grounds.of(base, adapter.fingerprint)
    order = {path: i for i, path in enumerate(grounds.sites)}
    paths = sorted(adapter.patches, key=lambda path: order.get(path, len(order)))
    watched = Watched(adapter, grounds.base) if isinstance(grounds.base, Host) else None
    return {
        path: replace(
            delta_of(adapter.patches[path], grounds, path), inputs=None if watched is None else Seen(watched, path)
        )
        for path in paths
    }
