"""Rows of several adapters on one line: each is itself alone, and alone it is the adapter put into the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from served_adapters import OPTIONS, adapter, bare, logits, workshop
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tarsia.adapter import Adapter, Host
from tarsia.adapter.value import put
from tarsia.core import lead
from tarsia.core.attach import detach, slots
from tarsia.core.errors import AttachError, RouteError, ServeError
from tarsia.core.site import Component, Kind
from tarsia.quant.codec import Scheme
from tarsia.quant.tensor import Weight4
from tarsia.serve import kernel
from tarsia.serve import page as page_module
from tarsia.serve.mixed import Board, Line, Table
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
        for whose, (first, last) in zip(self.pages, pairwise(ends), strict=True):
            own = slice(first, last)
            keys, values = k[:, :, own], v[:, :, own]
            if whose is not None and whose.lead:
                keys, values = (torch.cat([a, b], 2) for a, b in zip(whose.lead[at], (keys, values), strict=True))
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


@contextmanager
def served(family: str, values: Mapping[str, Adapter]) -> Iterator[tuple[Board, dict[str, Page]]]:
    """A board of the family's model with a page of each of these."""
    board = Board(bare(family))
    try:
        yield board, {name: page(board, name, value, name.encode()) for name, value in values.items()}
    finally:
        board.remove()


def ids_of(counts: Sequence[int], seed: int) -> Tensor:
    return torch.randint(8, 90, (sum(counts),), generator=torch.Generator().manual_seed(seed))


def types(family: str, row: Tensor) -> dict[str, Tensor]:
    named = FAMILIES[family].types
    return {} if named is None else {named: torch.zeros_like(row)[None]}


def by_itself(family: str, held: Adapter | None, row: Tensor) -> Tensor:
    return plain(family, held, {"input_ids": row[None]} | types(family, row))[0]


def worst(
    family: str, values: Mapping[str, Adapter], names: Sequence[str | None], counts: Sequence[int], seed: int = 0
) -> float:
    """How far a row of the line is from the row alone at most, as a share of its largest logit."""
    ids = ids_of(counts, seed)
    wanted = [
        by_itself(family, None if name is None else values[name], row)
        for name, row in zip(names, ids.split(list(counts)), strict=True)
    ]
    with served(family, values) as (board, pages):
        rows = [None if name is None else pages[name] for name in names]
        found = Rows(family, rows, counts).logits(board, ids).split(list(counts))
    pairs = zip(found, wanted, strict=True)
    return max(float((one - alone).abs().max() / alone.abs().max()) for one, alone in pairs if len(one))


@pytest.mark.parametrize("family", SIX)
def test_every_row_of_a_line_is_itself_alone(family: str) -> None:
    held = made(family)
    names = [None, *held, "lora", None, "full", "prompt"]
    counts = [1 + (3 * i) % 7 for i in range(len(names))]
    assert worst(family, held, names, counts) < 1e-5
    reads = {site.path for site in bare(family).sites if site.component is Component.LANGUAGE}
    row = ids_of([5], 1)
    base = by_itself(family, None, row)
    for name, value in held.items():
        touches = any(path in reads for path in value.patches)
        assert ((by_itself(family, value, row) - base).abs().max() > 0.1) == touches, name


ROWS = st.lists(st.tuples(st.sampled_from([None, *OPTIONS]), st.integers(1, 5)), min_size=1, max_size=7)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, *OPTIONS]), st.integers(1, 5)), min_size=1, max_size=7), st.integers(0, 9)
)
def test_any_rows_in_any_order(rows: list[tuple[str | None, int]], seed: int) -> None:
    held = made("llava")
    wanted = {name: held[name] for name, _ in rows if name is not None}
    assert worst("llava", wanted, [name for name, _ in rows], [count for _, count in rows], seed) < 1e-5


FEW = ("lora", "houlsby", "ia3", "dora", "full", "bitfit")
COUNTS = (2, 3, 1, 4, 2, 3)


def few() -> dict[str, Adapter]:
    return {name: made("llava")[name] for name in FEW}


def test_rows_that_are_swapped_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Table.__init__

    def swapped(self: Table, pages: Sequence[Page | None], sites: int) -> None:
        real(self, [pages[1], pages[0], *pages[2:]] if len(pages) > 1 else pages, sites)

    monkeypatch.setattr(Table, "__init__", swapped)
    assert worst("llava", few(), FEW, COUNTS) > 1e-2


def test_entries_of_another_row_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel.library() is None:
        pytest.skip("plain torch does not read the entries")
    real = Table.entries.func  # type: ignore[attr-defined]
    monkeypatch.setattr(Table, "entries", property(lambda self: real(self).roll(1, 1)))
    assert worst("llava", {"lora": few()["lora"]}, ["lora", None], [2, 3]) > 1e-2


def test_a_token_that_is_given_to_the_row_before_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Line.__init__

    def shifted(self: Line, table: Table, counts: Sequence[int]) -> None:
        real(self, table, counts)
        self.starts[1:-1] += 1

    monkeypatch.setattr(Line, "__init__", shifted)
    assert worst("llava", few(), FEW, COUNTS) > 1e-2


@pytest.mark.parametrize("method", ["full", "houlsby"])
def test_what_runs_apart_over_anothers_tokens_is_seen(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Line, "spans", lambda self, rows: [(self.ends[0], self.ends[1])])
    apart = method != "houlsby"  # which the kernels do
    assert (worst("llava", {method: few()[method]}, [None, method], [3, 3]) > 1e-2) == apart


@pytest.mark.parametrize("method, tensor", [("houlsby", "up_bias"), ("pfeiffer", "down_bias"), ("dora", "gain")])
def test_a_tensor_that_is_dropped_is_seen(method: str, tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = page_module.forms

    def dropping(*args: Any) -> dict[str, Any]:
        return {p: replace(f, **{tensor: None}) if hasattr(f, tensor) else f for p, f in real(*args).items()}

    monkeypatch.setattr(page_module, "forms", dropping)
    assert worst("llava", {method: made("llava")[method]}, [method, None], [4, 2]) > 1e-4


def test_a_line_of_another_length_raises() -> None:
    with served("llava", {"lora": few()["lora"]}) as (board, pages):
        rows = Rows("llava", [pages["lora"], None], [3, 2])
        rows.counts = [3, 3]
        with pytest.raises(RouteError, match="does not see the line"):
            rows.logits(board, ids_of([3, 2], 0))
        with pytest.raises(RouteError, match="other rows than adapters"), board.lying([None], [1, 2]):
            pass


def test_nobody_has_said_whose_tokens_they_are() -> None:
    with served("llava", {"lora": few()["lora"]}), pytest.raises(RouteError, match="Nobody has said"):
        logits(bare("llava"), FAMILIES["llava"].batch((1,)))


def test_a_base_with_adapters_of_its_own_is_not_served() -> None:
    host = bare("llava")
    put(host, few()["lora"], "mine")
    try:
        with pytest.raises(AttachError, match="adapters of its own"):
            Board(host)
    finally:
        detach(host.model, "mine")


def test_contexts_lie_within_one_another() -> None:
    with served("llava", few()) as (board, pages), board.alone(pages["lora"]):
        outer = board.here
        with board.lying([pages["dora"]], [2]):
            assert board.here is not outer
        assert board.here is outer


@pytest.mark.parametrize("family, select", [("qwen3_vl_moe", "language.1..1"), ("mllama", "language.1..1")])
def test_what_can_not_act_by_rows_is_refused_by_name(family: str, select: str) -> None:
    value = adapter(workshop(family), "full", select=select)
    with pytest.raises(ServeError, match="full at model") as caught, served(family, {"full": value}):
        pass
    assert caught.value.kind == "refused"
    assert not slots(bare(family).model)


def test_an_embedding_that_is_the_head_too_acts_in_both() -> None:
    value = adapter(workshop("gemma3"), "full", select="@model.language_model.embed_tokens")
    assert any(site.tied for site in bare("gemma3").sites if site.path in value.patches)
    assert worst("gemma3", {"full": value}, ["full", None, "full"], [3, 4, 2]) < 1e-5
    row = ids_of([5], 1)
    assert (by_itself("gemma3", value, row) - by_itself("gemma3", None, row)).abs().max() > 0.1


def test_heads_and_tokens_of_one_number_are_told_apart() -> None:
    value = made("gemma3")["full"]  # with norms within attention, which has four heads
    assert worst("gemma3", {"full": value}, ["full", None], [2, 2]) < 1e-5
    with served("gemma3", {"full": value}) as (board, pages):
        norm = next(m for m in board._places.values() if m.site.path.endswith("q_norm"))
        assert norm.along == 2
        norm.along = None
        with pytest.raises(RouteError):
            Rows("gemma3", [pages["full"], None], [2, 2]).logits(board, ids_of([4], 0))


def packed() -> Host:
    """The tiny LLaVA with its decoder's linear layers in 4 bits."""
    host = Host.of(FAMILIES["llava"].build()[0])
    for site in host.sites:
        if site.kind is Kind.WEIGHT and site.component is Component.LANGUAGE and site.layer is not None:
            module = host.model.get_submodule(site.module)
            module.weight = nn.Parameter(Weight4.of(module.weight, Scheme()), requires_grad=False)
    return host


@pytest.mark.parametrize("method", ["lora", "loftq", "dora", "oft", "ia3"])
def test_a_base_in_four_bits(method: str) -> None:
    host, own = packed(), packed()
    origin = bare("llava").model.get_parameter
    value = adapter(own, method, select="language.*.{q,v,down}", origin=lambda site: origin(site.weight).detach())
    inputs = FAMILIES["llava"].batch((1, 1))
    base = logits(host, inputs)
    put(host, value, "real")
    wanted = logits(host, inputs)
    detach(host.model, "real")
    board = Board(host)
    with board.alone(page(board, "it", value, b"1")):
        found = logits(host, inputs)
    board.remove()
    assert (wanted - base).abs().max() > 0.1
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby", "full", "prompt"])
def test_a_base_in_half_precision(method: str) -> None:
    """In bfloat16 it is no farther from float32 than the patches' own forward is."""
    value = replace(made("llava")[method], fingerprint=None)
    inputs = FAMILIES["llava"].batch((1, 1))
    half = {name: held.bfloat16() if held.is_floating_point() else held for name, held in inputs.items()}
    host, exact = (Host.of(FAMILIES["llava"].build()[0].bfloat16().to(d)) for d in (torch.bfloat16, torch.float32))
    for one in (host, exact):
        put(one, value, "real")
    wanted, truth = logits(host, half).float(), logits(exact, {**inputs, "pixel_values": half["pixel_values"].float()})
    detach(host.model, "real")
    board = Board(host)
    with board.alone(page(board, "it", value, b"1")):
        found = logits(host, half).float()
    board.remove()
    assert (wanted - truth).abs().max() < 0.1 * truth.abs().max()
    assert (found - truth).abs().max() < 1.5 * (wanted - truth).abs().max()
    assert (found - truth).square().mean() < 1.2 * (wanted - truth).square().mean()
