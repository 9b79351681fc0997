"""The divergence from the base is the one that torch computes, of the tokens that it says, whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from evaluate import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tarsia.adapter import Host
from tarsia.core.attach import Part, activate, attach, detach, patches
from tarsia.core.errors import DataError
from tarsia.evaluate import Chat, active, score
from tarsia.evaluate.chat import examined
from tarsia.evaluate.divergence import OWN, REFERENCES, Apart, apart, compared
from tarsia.evaluate.divergence import divergence as diverged
from tarsia.evaluate.generate import say
from tarsia.methods.lora import LoRAConfig


def adapt(host: Host, size: float, name: str = "new") -> None:
    """Attach a LoRA that moves every logit by about ``size``."""
    attach(host.model, host.sites, [Part("lora", "language.*.{q,v}", LoRAConfig(rank=2, alpha=4))], name=name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for patch in patches(host.model, name).values():
            for parameter in patch.parameters():
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def host() -> Host:
    return tiny.host()


@pytest.fixture
def adapted(host: Host) -> Iterator[Host]:
    adapt(host, 2.0)
    yield host
    detach(host.model, "new")


def references(host: Host, rows: tuple) -> list[tuple[int, ...]]:
    chat = Chat(host)
    return [chat.answer(row, row.messages[-1].text) for row in rows]


def by_torch(host: Host, sample: object, ids: tuple[int, ...]) -> Apart:
    """One row by itself, all of its logits, torch's own divergence."""
    chat, names = Chat(host), active(host)
    inputs = chat.inputs([sample], [chat.prompt(sample)])
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = []
    with examined(host.model):
        for acting in ((), names):
            activate(host.model, *acting)
            logits.append(host.model(**inputs).logits[0, length - 1 : -1].double())
    base, new = (found.log_softmax(-1) for found in logits)
    agreed = int((base.argmax(-1) == new.argmax(-1)).sum())
    return Apart(float(F.kl_div(new, base, reduction="sum", log_target=True)), agreed, len(ids))


def same(found: Apart, wanted: Apart) -> bool:
    return found.kl == pytest.approx(wanted.kl, rel=1e-3, abs=1e-5) and (found.agreed, found.tokens) == (
        wanted.agreed,
        wanted.tokens,
    )


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_it_is_torchs_own_row_by_row(adapted: Host, batch: int) -> None:
    rows = tiny.rows(7)
    ids = references(adapted, rows)
    found = apart(adapted, rows, ids, batch)
    wanted = [by_torch(adapted, row, own) for row, own in zip(rows, ids, strict=True)]
    assert sum(row.kl for row in wanted) > 0.1 and len({row.tokens for row in wanted}) > 2
    assert all(map(same, found, wanted))


def test_it_has_a_direction(adapted: Host) -> None:
    """KL(base || adapted) is not KL(adapted || base): the oracle tells them apart."""
    rows = tiny.rows(3)
    chat = Chat(adapted)
    inputs = chat.inputs(rows[:1], [chat.prompt(rows[0])])
    with examined(adapted.model):
        new, real, _ = score.forced(chat.model, inputs, [(5, 6)])
        activate(adapted.model)
        base, _, _ = score.forced(chat.model, inputs, [(5, 6)])
        activate(adapted.model, "new")
    (forth,), (back,) = compared(base, new, real), compared(new, base, real)
    assert abs(forth.kl - back.kl) > 1e-3


def test_what_changes_nothing_diverges_by_nothing(host: Host) -> None:
    rows = tiny.rows(5)
    attach(host.model, host.sites, [Part("lora", "language.*.q", LoRAConfig(rank=2, alpha=4))], name="idle")
    try:
        found = apart(host, rows, references(host, rows))
    finally:
        detach(host.model, "idle")
    assert all(row.kl == 0 and row.agreed == row.tokens for row in found)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(0, 10_000))
def test_against_the_definition(rows: int, tokens: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, new = (4 * torch.randn(rows, tokens, vocabulary, generator=generator) for _ in range(2))
    real = torch.arange(tokens)[None] < torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    for i, found in enumerate(compared(base, new, real)):
        p, q = (logits[i].double().softmax(-1) for logits in (base, new))
        kept = [t for t in range(tokens) if real[i, t]]
        wanted = sum(float(p[t, v]) * math.log(float(p[t, v] / q[t, v])) for t in kept for v in range(vocabulary))
        assert found.kl == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert found.agreed == sum(int(p[t].argmax()) == int(q[t].argmax()) for t in kept)
        assert found.tokens == len(kept)


def test_a_token_that_the_base_rules_out_adds_nothing() -> None:
    base = torch.tensor([[[0.0, 0.0, -math.inf]]])
    new = torch.tensor([[[0.0, 0.0, 1.0]]])
    (found,) = compared(base, new, torch.ones(1, 1, dtype=torch.bool))
    assert found.kl == pytest.approx(math.log((2 + math.e) / 2), rel=1e-5)


def test_what_is_no_number_is_refused(adapted: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny.rows(3)
    ids = references(adapted, rows)
    monkeypatch.setattr(divergence_module(), "compared", lambda base, new, real: [Apart(math.nan, 0, 1)] * len(base))
    with pytest.raises(DataError, match="is no number"):
        apart(adapted, rows, ids)
    assert active(adapted) == ("new",)


def divergence_module() -> object:
    import sys

    return sys.modules["tarsia.evaluate.divergence"]


def test_a_divergence_below_zero_is_an_error_of_ours() -> None:
    """Rounding is forgiven, no more: probabilities that do not sum to one are found."""
    base = torch.zeros(1, 1, 4)
    original = torch.Tensor.log_softmax
    try:
        torch.Tensor.log_softmax = lambda self, dim: original(self, dim) + (0.01 if self is not base else 0.0)
        (found,) = compared(base, base.clone(), torch.ones(1, 1, dtype=torch.bool))
    finally:
        torch.Tensor.log_softmax = original
    assert math.isnan(found.kl)


def test_the_logits_of_a_batch_are_bounded(adapted: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny.rows(6, pictures=(0,))
    ids = references(adapted, rows)
    wanted = apart(adapted, rows, ids)
    vocabulary = adapted.model.config.get_text_config().vocab_size
    monkeypatch.setattr(score, "_LOGITS", 4 * (1 + max(map(len, ids))) * vocabulary * 2)
    shapes = []
    original = score.forced
    monkeypatch.setattr(score, "forced", lambda *a: shapes.append(len(a[2])) or original(*a))
    assert all(map(same, apart(adapted, rows, ids), wanted))
    assert shapes == [2, 2] * 3


def test_of_sources(adapted: Host) -> None:
    """The mean over tokens, not over rows; rows that say what the references say are taken over."""
    rows = {"belt": tiny.rows(5, source="belt")}
    ids = references(adapted, rows["belt"])
    activate(adapted.model)
    own = [said.ids for said in say(adapted, rows["belt"], 6)]
    activate(adapted.model, "new")
    own[0], own[1] = ids[0], (own[1][0], adapted.processor.image_token_id, 5)
    own[2] = (adapted.processor.image_token_id,)
    given_refs, given_own = diverged(adapted, rows, {"belt": own})
    assert (given_refs.forced, given_own.forced) == (REFERENCES, OWN)
    by_hand = [by_torch(adapted, row, i) for row, i in zip(rows["belt"], ids, strict=True)]
    assert given_refs.kl.mean == pytest.approx(sum(r.kl for r in by_hand) / sum(r.tokens for r in by_hand), rel=1e-3)
    assert given_refs.agreement.mean == pytest.approx(sum(r.agreed for r in by_hand) / sum(r.tokens for r in by_hand))
    assert given_refs.kl.low <= given_refs.kl.mean <= given_refs.kl.high
    assert given_own.each[0] == given_refs.each[0]
    assert given_own.each[2] is None
    assert given_own.tokens == len(ids[0]) + 1 + len(own[3]) + len(own[4])
    cut = by_torch(adapted, rows["belt"][1], own[1][:1])
    assert given_own.each[1] == pytest.approx(cut.kl, rel=1e-3, abs=1e-5)
