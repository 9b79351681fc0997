"""Another adapter's numbers in the place of those that are attached: the least that loading one can cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from tarsia.adapter.host import Host
from tarsia.adapter.value import Adapter, Patched, belongs
from tarsia.core.attach import patches, slots
from tarsia.core.errors import AdapterError, AttachError
from tarsia.core.method import METHODS
from tarsia.core.patch import Patch


@torch.no_grad()
def swap(host: Host, adapter: Adapter, name: str, *, allow: Collection[str] = ()) -> None:
    """Give the attached adapter ``name`` the numbers of ``adapter``, which is of the same make: no module changes.

    The tensors are copied into those that are there, so whatever holds on to them sees the new ones; whether it acts
    stays as it is. Raises AttachError where there is no adapter ``name`` or patches are merged, BaseMismatch as ``put``
    does, and AdapterError where sites, methods, constants, shapes or dtypes are others; then no number is changed.
    """
    belongs(host, adapter, allow)
    if any(slot.kept is not None for slot in slots(host.model)):
        raise AttachError("What is merged into the weights in memory would stay there.", do="unmerge first")
    held = {site.path: patch for site, patch in patches(host.model, name).items()}
    if held.keys() != adapter.patches.keys():
        odd = sorted(held.keys() ^ adapter.patches.keys())
        raise _other(name, f"{len(odd)} sites are patched by one of the two alone", odd[0])
    targets = [_fits(name, path, patch, adapter.patches[path]) for path, patch in held.items()]
    for tensors, patched in zip(targets, (adapter.patches[path] for path in held), strict=True):
        for key, tensor in tensors.items():
            tensor.copy_(patched.tensors[key])


def _fits(name: str, path: str, patch: Patch, patched: Patched) -> Mapping[str, torch.Tensor]:
    """The patch's own tensors. Raises AdapterError where the value's are not of their make."""
    if METHODS[patched.method].patch is not type(patch):
        raise _other(name, f"{path} has a {type(patch).__name__}", patched.method)
    constants = {key: getattr(patch, key) for key in patch.constants}
    if constants != dict(patched.constants):
        raise _other(name, f"{path} has {_listed(constants)}", _listed(patched.constants))
    own = patch.state_dict()
    mine = {key: f"{tensor.dtype} {tuple(tensor.shape)}" for key, tensor in own.items()}
    theirs = {key: f"{tensor.dtype} {tuple(tensor.shape)}" for key, tensor in patched.tensors.items()}
    if mine != theirs:
        raise _other(name, f"{path} has {_listed(mine)}", _listed(theirs))
    return own


def _other(name: str, has: str, given: str) -> AdapterError:
    return AdapterError(
        f"The adapter is not of the make of {name!r}, which is attached: {has}.",
        given=given,
        do="put it in under another name, and activate that",
    )


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "nothing"
