"""An adapter as it is served: its forms, what the kernels read of them, and what stands before its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tarsia.adapter import Adapter, Host
from tarsia.adapter.value import Patched, restored
from tarsia.core.lead import Pairs
from tarsia.core.method import find
from tarsia.core.patch import Scaling
from tarsia.core.sequence import Decoder
from tarsia.core.site import Component, Kind, Site
from tarsia.core.slot import Slot
from tarsia.serve.forms import COLUMNS, DTYPES, Form, Odd, forms, tensors
from tarsia.serve.mixed import Board

_HEADER = 1 << 20  # bytes of a file beside its tensors


@dataclass(eq=False)
class Page:
    """One version of an adapter, in memory.

    ``version`` is its number in the library, ``source`` what the library calls it where ``name`` is an alias.
    ``digest`` is of its content. ``entries`` int64 [sites, 12] is what the kernels read of its forms. ``lead`` are the
    keys and values before each of its rows, () where there are none. ``front`` is a digest of what of it pictures pass
    before they come to the decoder, b"" where they pass nothing. ``bytes`` is what it takes while it is here.
    ``unproved`` says why its outputs were not held to those of the day it was saved, "" where they were.
    """

    name: str
    digest: bytes
    forms: Mapping[str, Form]
    entries: Tensor
    front: bytes
    card: Mapping[str, Any]
    bytes: int
    lead: Pairs = ()
    version: int | None = None
    source: str | None = None
    unproved: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def page(board: Board, name: str, adapter: Adapter, digest: bytes, passed: bytes | None = None) -> Page:
    """The page of an adapter, on the thread that runs the model: a prompt is read by the decoder here.

    ``passed`` is its `front`, where the caller knows it.

    Raises AdapterError and ServeError as `forms` does.
    """
    made = forms(board.host, adapter, board.fitting)
    passed = front(board.host, adapter) if passed is None else passed
    device = board.host.model.get_input_embeddings().weight.device  # type: ignore[operator]
    found = Page(name, digest, made, torch.empty(0), passed, adapter.card, 0, device=device)
    complete(board, found)
    return found


def complete(board: Board, page: Page) -> None:
    """Have patches where the page's forms act, and compute what depends on them."""
    board.install(list(page.forms))
    page.entries = board.entries(page.forms)
    show(board, page)
    page.lead = lead(board, page)
    page.bytes = size(page)


@torch.no_grad()
def show(board: Board, page: Page) -> None:
    """Let norms within attention see a line of another length than there are heads, so that they know its dimension."""
    model: Any = board.host.model
    found = next((site for site in board.host.sites if site.kind is Kind.SEQUENCE), None)
    within = [s for s in board.host.sites if s.kind is Kind.TENSOR and s.path in page.forms]
    if found is None or all(s.component is not Component.LANGUAGE or s.shape[0] == found.shape[0] for s in within):
        return
    module: Any = model.get_submodule(found.module)
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else module
    heads = {decoder.config.num_attention_heads, found.shape[1]}
    count = next(length for length in (2, 3, 5) if length not in heads)
    like = model.get_input_embeddings().weight
    with board.lying([page], [count]):
        decoder(inputs_embeds=torch.zeros(1, count, found.shape[0]).to(like), use_cache=False)


def size(page: Page) -> int:
    """Bytes of all tensors of a page, each once."""
    held = [t for form in page.forms.values() for t in tensors(form)] + [page.entries]
    held += [t for pair in page.lead for t in pair]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in held}.values())


def foreseen(board: Board, adapter: Adapter, *, carried: bool = False) -> int:
    """At most how many bytes the adapter's page takes, before any of it is made. Raises AdapterError as `forms` does.

    ``carried``: its whole file is, and not only the tensors.
    """
    sites = {site.path: site for site in board.host.sites}
    count = _HEADER if carried else 0
    for path, patched in adapter.patches.items():
        own = sum(tensor.nbytes for tensor in patched.tensors.values())
        count += own + (_beside(board.host, sites[path], patched, own) if path in sites else 0)
    return count + 8 * COLUMNS * board.with_these(adapter.patches)


def _beside(host: Host, site: Site, patched: Patched, own: int) -> int:
    """Bytes of what is made of a patch's tensors, beside these."""
    kind: Any = find(patched.method).patch
    if site.kind is Kind.SEQUENCE:
        return _lead_bytes(host, site, patched)
    if site.kind is Kind.STREAM:
        return 2 * own
    whole: int = sum(host.model.get_parameter(name).numel() for name in site.tensors) * _width(host)
    if site.kind is not Kind.WEIGHT:
        return whole if site.tied else 0
    if hasattr(kind, "to_lora"):
        return 0 if patched.tensors.keys() == {"A", "B"} and not _other(patched) else 4 * own
    if hasattr(kind, "to_dora"):
        return 8 * site.shape[0] + (0 if not _other(patched) else 2 * own)
    if hasattr(kind, "delta"):
        up, down, added = restored(host, site, patched, copy=False).to("meta").delta()  # type: ignore[operator]
        return 4 * int(sum(t.numel() for t in (up, down, added) if t is not None))
    if issubclass(kind, Scaling):
        return 2 * own
    return whole


def _other(patched: Patched) -> bool:
    """Whether the tensors are of dtypes that no kernel reads as they are, so that copies are made."""
    dtypes = {tensor.dtype for tensor in patched.tensors.values()}
    return len(dtypes) > 1 or not dtypes <= {*DTYPES}


def _lead_bytes(host: Host, site: Site, patched: Patched) -> int:
    _, heads, head = site.shape

    def counted(embeddings: Tensor, before: Pairs) -> Pairs:
        shape = (1, heads, embeddings.shape[1], head)
        return tuple((torch.empty(shape, device="meta"), torch.empty(shape, device="meta")) for _ in site.layers)

    pairs = restored(host, site, patched, copy=False)(counted, ())
    count: int = sum(t.numel() for pair in pairs for t in pair)
    return count * _width(host)


def _width(host: Host) -> int:
    weight: Tensor = host.model.get_input_embeddings().weight  # type: ignore[operator]
    return int(weight.dtype.itemsize)


@torch.no_grad()
def lead(board: Board, page: Page) -> Pairs:
    """What the page's prompt or prefix comes to, [1, heads, length, width of a head] of each layer that attends.

    A prompt is read by the decoder under everything else of the same adapter.
    """
    led = [site for site in board.host.sites if site.kind is Kind.SEQUENCE and site.path in page.forms]
    if not led:
        return ()
    model: Any = board.host.model
    (site,), form = led, page.forms[led[0].path]
    module = model.get_submodule(site.module)
    slot = module._modules["slot"]
    assert isinstance(form, Odd) and isinstance(slot, Slot)
    decoder = Decoder(module, site, slot.below, lambda name: None, lambda parts: nullcontext())
    with board.alone(page):
        pairs = form.patch(lambda x, before: decoder.read((), x, before), ())
    like = model.get_input_embeddings().weight
    return tuple((keys.to(like), values.to(like)) for keys, values in pairs)


def front(host: Host, adapter: Adapter) -> bytes:
    """SHA-256 of the patches that pictures pass before they come to the decoder; b"" for none."""
    components = {site.path: site.component for site in host.sites}
    touched = sorted(path for path in adapter.patches if components.get(path) is not Component.LANGUAGE)
    if not touched:
        return b""
    total = hashlib.sha256()
    for path in touched:
        patched = adapter.patches[path]
        total.update(repr((path, patched.method, sorted(patched.constants.items()))).encode())
        for name, value in sorted(patched.tensors.items()):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.contiguous().view(torch.uint8).numpy().data if value.numel() else b"")
    return total.digest()
