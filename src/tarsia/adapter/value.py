"""What training produces: an immutable value."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

import tarsia.methods  # noqa: F401 (fills the registry that adapters are made from)
from tarsia.adapter.fingerprint import Fingerprint, form_in_words
from tarsia.adapter.four_bits import FourBits
from tarsia.adapter.host import Host, Outline
from tarsia.adapter.layout import Layout, layout
from tarsia.adapter.proof import Probe
from tarsia.core.attach import Part, install, patches
from tarsia.core.errors import AdapterError, AttachError
from tarsia.core.method import METHODS, find
from tarsia.core.patch import Patch
from tarsia.core.select import select
from tarsia.core.site import Site
from tarsia.quant.levels import KINDS


@dataclass(frozen=True, eq=False)
class Patched:
    """One site's patch: the method, its constants (an effective scale, for one) and its tensors, on the CPU."""

    method: str
    constants: Mapping[str, float | int | bool | str]
    tensors: Mapping[str, Tensor]

    @property
    def factors(self) -> Mapping[str, Tensor]:
        """A [r, in] and B [out, r] of the LoRA that computes the same; with DoRA's magnitude where it is one."""
        patch: Any = find(self.method).patch
        made: Mapping[str, Tensor] = (patch.to_lora if find(self.method).thin else patch.to_dora)(self.tensors)
        return made


@dataclass(frozen=True, eq=False)
class Adapter:
    """Trained patches by site path, how they were made, the base they belong to, and their card.

    ``card`` is JSON: recipe hash, data digests, measured results. ``base`` is what its user called the base (None
    for a model that was built in memory). ``layout`` says how PEFT would hold it.
    ``probe`` is what its outputs were. Without a fingerprint (files that PEFT made) the base is known only by
    names and shapes, and the card says so.
    """

    parts: tuple[Part, ...]
    patches: Mapping[str, Patched]
    layout: Layout
    base: str | None
    fingerprint: Fingerprint | None
    card: Mapping[str, Any]
    probe: Probe | None = None

    @classmethod
    def of(
        cls,
        host: Host,
        name: str,
        parts: Sequence[Part],
        card: Mapping[str, Any] | None = None,
        *,
        probe: Probe | None = None,
    ) -> Self:
        """Copy the adapter ``name`` out of the host's model; training on does not change the value.

        Of a patch that has something simpler to leave behind (``Patch.kept``), that is copied.
        Raises AdapterError where ``parts`` do not describe what is attached.
        """
        named = {method.patch: method.name for method in METHODS.values()}
        found = {site: (named[type(patch)], patch) for site, patch in patches(host.model, name).items()}
        asked = {
            site.path: part.method
            for part in parts
            for way in [find(part.method)]
            for site in select(part.select, host.sites, way.kinds, way.roles, way.patch.lacks)
        }
        held = {site.path: method for site, (method, _) in found.items()}
        if asked != held:
            differing = sorted(path for path in asked.keys() | held.keys() if asked.get(path) != held.get(path))
            raise AdapterError(
                f"The parts do not describe the adapter {name!r} that is attached.",
                given=f"{len(differing)} sites differ, {differing[0]} for one",
                do="pass the parts that it was attached with",
            )
        kept = {site: patch.kept() for site, (_, patch) in found.items()}
        found = {site: (named[type(patch)], patch) for site, patch in kept.items()}
        return cls(
            parts=tuple(parts),
            patches=MappingProxyType({site.path: _copied(site, m, patch) for site, (m, patch) in found.items()}),
            layout=layout(host.model, [(site, method) for site, (method, _) in found.items()]),
            base=None if host.path is None else host.name,
            fingerprint=host.fingerprint,
            card=MappingProxyType(dict(card or {})),
            probe=probe,
        )


def _copied(site: Site, method: str, patch: Patch) -> Patched:
    tensors = {}
    for key, value in patch.state_dict().items():
        if value.is_meta:
            raise AdapterError(
                f"The patch at {site.path} is not in memory.", given=key, do="load it before it is saved"
            )
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
    constants = {key: getattr(patch, key) for key in patch.constants}
    return Patched(method, MappingProxyType(constants), MappingProxyType(tensors))


def put(host: Host, adapter: Adapter, name: str, *, allow: Collection[str] = ()) -> None:
    """Install the adapter into the host's model under ``name``, active; its tensors keep their dtype.

    Raises AdapterError where a site is not there or not of the right shape, or a tensor is left over or
    missing, and BaseMismatch where the fingerprint differs (``allow``: see Fingerprint.check). The model is
    changed only where all is well.
    """
    belongs(host, adapter, allow)
    if not adapter.patches:
        raise AdapterError("The adapter has no patch.", do="train it first")
    sites = {site.path: site for site in host.sites}
    absent = [path for path in adapter.patches if path not in sites]
    if absent:
        raise AdapterError(
            f"The base has no place for {len(absent)} of the adapter's {len(adapter.patches)} patches.",
            given=", ".join(absent[:3]),
            do="open the base that the adapter was trained on",
        )
    fitting: set[Hashable] = set()
    made = {path: restored(host, sites[path], patched, fitting) for path, patched in adapter.patches.items()}
    order = [site for site in host.sites if site.path in made]
    install(host.model, [(site, made[site.path]) for site in order], name=name)


def belongs(host: Host, adapter: Adapter, allow: Collection[str] = ()) -> None:
    """Raise BaseMismatch where the adapter says that its base is another (``allow``: see Fingerprint.check)."""
    if adapter.fingerprint is not None:
        mine, theirs = _trained_over(adapter, adapter.fingerprint), f"{host.name}, {host.form}"
        adapter.fingerprint.check(host.fingerprint, allow=allow, mine=mine, theirs=theirs)


def _trained_over(adapter: Adapter, base: Fingerprint) -> str:
    """The base that an adapter belongs to and its form, in words."""
    said: Any = adapter.card.get("four_bits")
    known = isinstance(said, Mapping) and said.get("kind") in KINDS
    held = FourBits(said["kind"], bool(said.get("nested"))) if known else None
    return f"{adapter.base or 'a base in memory'}, {form_in_words(base.quantisation, held)}"


def restored(
    host: Host | Outline, site: Site, patched: Patched, fitting: set[Hashable] | None = None, *, copy: bool = True
) -> Patch:
    """The patch at ``site`` of this base. Raises AdapterError where it does not fit there.

    ``fitting`` remembers, from one site to the next like it, what was found to have the shape of the base. Without
    ``copy`` its parameters are the tensors of ``patched`` themselves, for one that nobody will train.
    """
    kind = find(patched.method).patch
    if site.kind not in find(patched.method).kinds:
        raise AdapterError(f"{patched.method} does not go to {site.path}.", given=f"a site of kind {site.kind}")
    why = kind.misfit(site)
    if why is not None:
        raise AdapterError(f"{patched.method} has no place at {site.path}: {why}.")
    if set(patched.constants) != set(kind.constants):
        raise AdapterError(
            f"The patch at {site.path} has other constants than {patched.method}.",
            given=", ".join(patched.constants) or "(none)",
            allowed=", ".join(kind.constants) or "(none)",
        )
    shapes = {key: tuple(value.shape) for key, value in patched.tensors.items()}
    broken = next((key for key, value in patched.tensors.items() if not value.is_floating_point()), None)
    if broken is not None:
        raise AdapterError(
            f"The tensor {broken} of the patch at {site.path} can not be one that was trained.",
            given=str(patched.tensors[broken].dtype),
            allowed="real floating-point numbers",
            do="the files are broken or foreign: fetch them again",
        )
    try:
        patch = kind.restore(site, shapes, patched.constants)
    except (AttachError, KeyError, IndexError, ValueError) as error:  # the latter of tensors of another rank
        raise AdapterError(f"The patch at {site.path} does not fit.", given=f"{shapes}: {error}") from None
    own = {key: tuple(value.shape) for key, value in patch.state_dict().items()}
    if own != shapes:
        raise AdapterError(
            f"The tensors of the patch at {site.path} are not those of {patched.method}.",
            given=", ".join(f"{k} {v}" for k, v in shapes.items()),
            allowed=", ".join(f"{k} {v}" for k, v in own.items()),
            do="the files are broken or foreign: fetch them again",
        )
    # one of its own, which loses what numbers it has
    _check_shape(host, site, kind.restore(site, shapes, patched.constants), set() if fitting is None else fitting)
    own_tensors = {key: value.clone() if copy else value for key, value in patched.tensors.items()}
    patch.load_state_dict(own_tensors, strict=True, assign=True)
    return patch


def _check_shape(host: Host | Outline, site: Site, patch: Patch, fitting: set[Hashable]) -> None:
    """Fold the still empty patch, without numbers, into tensors of the base's shapes: once for each kind of place."""
    if type(patch).fold is Patch.fold:
        return
    whole = host.model.get_parameter(site.weight)
    weight = torch.empty(whole.shape if whole.is_floating_point() else site.shape, device="meta")
    bias = None if site.bias is None else torch.empty(host.model.get_parameter(site.bias).shape, device="meta")
    own = tuple((key, value.shape) for key, value in patch.state_dict().items())
    constants = tuple((key, getattr(patch, key)) for key in patch.constants)
    key = (type(patch), site.kind, site.role, weight.shape, None if bias is None else bias.shape, own, constants)
    if key in fitting:
        return
    try:
        folded = patch.to("meta").fold(weight, bias)
    except RuntimeError as error:
        raise _misfit(site, patch, str(error).splitlines()[0]) from None
    for before, after in zip((weight, bias), folded, strict=True):
        if (None if before is None else before.shape) != (None if after is None else after.shape):
            given = "no tensor" if after is None else str(tuple(after.shape))
            raise _misfit(site, patch, f"{given} in place of {before if before is None else tuple(before.shape)}")
    fitting.add(key)


def _misfit(site: Site, patch: Patch, why: str) -> AdapterError:
    return AdapterError(
        f"The patch at {site.path} has not the shape of the base.",
        given=f"{', '.join(f'{k} {tuple(v.shape)}' for k, v in patch.state_dict().items())}: {why}",
        allowed=f"a site of {site.shape}",
        do="open the base that the adapter was trained on",
    )
