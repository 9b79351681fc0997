"""What no training can have left in a folder is refused in words, by every method that it is tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor

from tarsia.adapter import Adapter, Host, put
from tarsia.core.attach import Part, attach, detach, slots
from tarsia.core.errors import AdapterError
from tarsia.core.method import METHODS

SELECT = {"bitfit": "vision", "vpt": "vision", "vpt_deep": "vision"}


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.of(FAMILIES["llava"].build()[0])


def adapter(host: Host, method: str) -> Adapter:
    parts = [Part(method, SELECT.get(method, "language"), METHODS[method].config())]
    attach(host.model, host.sites, parts, name="a")
    try:
        return Adapter.of(host, "a", parts)
    finally:
        detach(host.model, "a")


def refused(host: Host, held: Adapter, path: str, **changes: Any) -> None:
    """``put`` raises, and leaves the model bare."""
    edited = MappingProxyType({**held.patches, path: replace(held.patches[path], **changes)})
    with pytest.raises(AdapterError):
        put(host, replace(held, patches=edited), "b")
    assert not slots(host.model)


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensor: tensor.to(torch.int64),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.sum(),
        lambda tensor: tensor[..., :0],
    ],
    ids=["whole numbers", "complex", "one number", "empty"],
)
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"loftq"}))
def test_tensors_that_no_patch_has(method: str, edit: Callable[[Tensor], Tensor], host: Host) -> None:
    held = adapter(host, method)
    path = next(path for path, patched in held.patches.items() if patched.tensors)
    for name, tensor in held.patches[path].tensors.items():
        refused(host, held, path, tensors=MappingProxyType({**held.patches[path].tensors, name: edit(tensor)}))


@pytest.mark.parametrize(
    "method,edit",
    [
        ("lora", {"dropout": 2.5}),
        ("loraplus", {"dropout": -1}),
        ("dora", {"dropout": 1.0}),
        ("oft", {"block": 0}),
        ("ia3", {"inner": True}),
        ("bitfit", {"added": True}),
        ("vera", {"seed": 1}),
        ("houlsby", {"activation": "sine"}),
    ],
)
def test_constants_that_no_patch_has(method: str, edit: dict[str, Any], host: Host) -> None:
    held = adapter(host, method)
    path, patched = next(iter(held.patches.items()))
    assert patched.constants != patched.constants | edit
    refused(host, held, path, constants=MappingProxyType(patched.constants | edit))
