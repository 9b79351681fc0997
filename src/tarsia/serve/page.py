"""An adapter as it is served: its forms, what the kernels read of them, and what stands before its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarsia.adapter import Adapter, Host
from tarsia.core.lead import Pairs
from tarsia.core.sequence import Decoder
from tarsia.core.site import Component, Kind
from tarsia.core.slot import Slot
from tarsia.serve.forms import Form, Odd, forms, tensors
from tarsia.serve.mixed import Board


@dataclass(eq=False)
class Page:
    """One version of an adapter, in memory.

    ``digest`` is of its content. ``entries`` int64 [sites, 12] is what the kernels read of its forms. ``lead`` are the
    keys and values before each of its rows, () where there are none. ``front`` is a digest of what of it pictures pass
    before they come to the decoder, b"" where they pass nothing. ``bytes`` is what it takes while it is here.
    """

    name: str
    digest: bytes
    forms: Mapping[str, Form]
    entries: Tensor
    front: bytes
    card: Mapping[str, Any]
    bytes: int
    lead: Pairs = ()
    device: torch.device = torch.device("cpu")


def page(board: Board, name: str, adapter: Adapter, digest: bytes) -> Page:
    """The page of an adapter, on the thread that runs the model: a prompt is read by the decoder here.

    Raises AdapterError and ServeError as `forms` does.
    """
    made = forms(board.host, adapter)
    found = Page(name, digest, made, torch.empty(0), front(board.host, adapter), adapter.card, 0)
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


@torch.no_grad()
def lead(board: Board, page: Page) -> Pairs:
    """What the page's prompt or prefix comes to, [1, heads, length, width of a head] of each layer that attends.

    A prompt is read by the decoder under everything else of the same adapter.
    """
    model = board.host.model
    for site in board.host.sites:
        form = page.forms.get(site.path)
        if site.kind is not Kind.SEQUENCE or not isinstance(form, Odd):
            continue
        module = model.get_submodule(site.module)
        slot = module._modules["slot"]
        assert isinstance(slot, Slot)
        decoder = Decoder(module, site, slot.below, lambda name: None, lambda parts: nullcontext())
        with board.alone(page):
            pairs = form.patch(lambda x, before: decoder.read((), x, before), ())
        like = next(p for p in model.parameters() if p.is_floating_point())
        return tuple((keys.to(like), values.to(like)) for keys, values in pairs)
    return ()


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
