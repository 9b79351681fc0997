"""Rows of several adapters on one line: each is itself alone, and alone it is the adapter put into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from families import FAMILIES
from served_adapters import OPTIONS, adapter, bare, logits, workshop
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tarsia.adapter import Adapter
from tarsia.adapter.value import put
from tarsia.core import lead
from tarsia.core.attach import detach, slots
from tarsia.core.site import Component, Kind
from tarsia.serve.mixed import Board
from tarsia.serve.page import Page, page

SIX = ("llava", "qwen2_vl", "qwen3_vl", "gemma3", "idefics3", "internvl")
TOWERS_IN_ONE = ("qwen2_vl", "qwen3_vl")


def made(family: str) -> dict[str, Adapter]:
    return {m: a for m in OPTIONS if (a := value(family, m)) is not None}


@cache
def value(family: str, method: str) -> Adapter | None:
    if method.startswith("vpt") and family in TOWERS_IN_ONE:
        return None  # these towers have all pictures in one sequence
    return adapter(workshop(family), method)


@pytest.mark.parametrize("family", SIX)
@pytest.mark.parametrize("method", OPTIONS)
def test_alone_it_is_the_adapter_put_in(family: str, method: str) -> None:
    host, held = bare(family), value(family, method)
    if held is None:
        return
    inputs = FAMILIES[family].batch((1, 1))
    base, wanted = logits(host, inputs), plain(family, held, inputs)
    board = Board(host)
    try:
        served = page(board, "it", held, b"1")
        with board.alone(served):
            found = logits(host, inputs)
        with board.alone(None):
            assert torch.equal(logits(host, inputs), base)
    finally:
        board.remove()
    assert (wanted - base).abs().max() > 0.1
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert torch.equal(logits(host, inputs), base) and not slots(host.model)


def plain(family: str, held: Adapter | None, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model says with the adapter in it and nothing else."""
    host = bare(family)
    if held is None:
        return logits(host, inputs)
    put(host, held, "real")
    try:
        return logits(host, inputs)
    finally:
        detach(host.model, "real")


class Rows:
    """The decoder of a family over a line, each row attending to itself and to what stands before it."""

    now: Rows

    def __init__(self, family: str, pages: Sequence[Page | None], counts: Sequence[int]) -> None:
        self.host, self.pages, self.counts = bare(family), pages, counts
        self.site = next(site for site in self.host.sites if site.kind is Kind.SEQUENCE)

    def logits(self, board: Board, ids: Tensor) -> Tensor:
        """[tokens, vocabulary] of the line ``ids`` [tokens]."""
        model: Any = self.host.model
        decoder = model.get_decoder()
        positions = [
            torch.arange(count) + self.site.first + (0 if page is None else lead.length(page.lead))
            for page, count in zip(self.pages, self.counts, strict=True)
        ]
        place = torch.cat(positions)
        if self.host.anatomy.name.startswith("qwen"):
            place = place.expand(3, -1)[:, None]
        else:
            place = place[None]
        Rows.now, before = self, decoder.config._attn_implementation
        decoder.config._attn_implementation = "rows_of_a_test"
        try:
            with board.lying(self.pages, self.counts), torch.no_grad():
                embeds = model.get_input_embeddings()(ids[None])
                hidden = decoder(inputs_embeds=embeds, position_ids=place, use_cache=False).last_hidden_state
                said = model.lm_head(hidden)[0]
        finally:
            decoder.config._attn_implementation = before
        cap = getattr(decoder.config, "final_logit_softcapping", None)
        return said if cap is None else torch.tanh(said / cap) * cap

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        ends, outs = [0, *accumulate(self.counts)], []
        at = self.site.layers.index(module.layer_idx)
        for page, (first, last) in zip(self.pages, pairwise(ends), strict=True):
            own = slice(first, last)
            keys, values = k[:, :, own], v[:, :, own]
            if page is not None and page.lead:
                keys, values = (torch.cat([a, b], 2) for a, b in zip(page.lead[at], (keys, values), strict=True))
            groups = q.shape[1] // k.shape[1]
            ahead = keys.shape[2] - (last - first)
            there, here = torch.arange(keys.shape[2]), torch.arange(last - first)[:, None] + ahead
            mask = (there <= here) & (there > here - (window or 1 << 20))
            keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
            outs.append(F.scaled_dot_product_attention(q[:, :, own], keys, values, attn_mask=mask, scale=scale))
        return torch.cat(outs, 2).transpose(1, 2)


def attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **further: Any
) -> tuple[Tensor, None]:
    return Rows.now.attend(module, q, k, v, scaling, further.get("sliding_window")), None


AttentionInterface.register("rows_of_a_test", attend)
AttentionMaskInterface.register("rows_of_a_test", lambda *args, **keywords: None)


@cache
def everything(family: str) -> tuple[Board, dict[str, Page]]:
    """A board with a page of every method, that stays."""
    host = bare(family)
    values = made(family)
    board = Board(host)
    pages = {}
    for method, held in values.items():
        pages[method] = page(board, method, held, method.encode())
    return board, pages


def ids_of(counts: Sequence[int], seed: int) -> Tensor:
    return torch.randint(8, 90, (sum(counts),), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", SIX)
def test_every_row_of_a_line_is_itself_alone(family: str) -> None:
    held = made(family)
    names = [None, *held, "lora", None, "full", "prompt"]
    counts = [1 + (3 * i) % 7 for i in range(len(names))]
    ids = ids_of(counts, 0)
    wanted = [
        plain(family, None if name is None else held[name], {"input_ids": row[None]} | types(family, row))[0]
        for name, row in zip(names, ids.split(counts), strict=True)
    ]
    bases = [plain(family, None, {"input_ids": row[None]} | types(family, row))[0] for row in ids.split(counts)]
    board, pages = everything(family)
    try:
        rows = [None if name is None else pages[name] for name in names]
        found = Rows(family, rows, counts).logits(board, ids).split(counts)
    finally:
        board.remove()
        everything.cache_clear()
    reads = {site.path for site in bare(family).sites if site.component is Component.LANGUAGE}
    for name, one, alone, base in zip(names, found, wanted, bases, strict=True):
        assert (one - alone).abs().max() < 1e-5 * alone.abs().max(), name
        touches = name is not None and any(path in reads for path in held[name].patches)
        assert ((alone - base).abs().max() > 0.1) == touches, name


def types(family: str, row: Tensor) -> dict[str, Tensor]:
    named = FAMILIES[family].types
    return {} if named is None else {named: torch.zeros_like(row)[None]}
