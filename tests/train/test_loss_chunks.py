"""The loss by chunks is cross-entropy over all logits: values, gradients, and where it is not used."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VARIANTS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from train.test_step import labelled

from tarsia.core.errors import TrainingError
from tarsia.train import loss as loss_module
from tarsia.train.loss import followed, head_losses, plain_head, plain_losses
from tarsia.train.step import IGNORED, token_losses


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2 * loss_module.ROWS + 3),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_values_and_gradients_are_those_of_all_logits(n, width, vocabulary, bias, scale, dtype):
    assume(dtype != torch.bfloat16 or scale == 1)  # a logit of 800 has steps of 4
    g = torch.Generator().manual_seed(n)
    hidden = (scale * torch.randn(n, width, generator=g)).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g).to(dtype)
    shift = torch.randn(vocabulary, generator=g).to(dtype) if bias else None
    targets = torch.randint(vocabulary, (n,), generator=g)
    weigh = torch.rand(n, generator=g)
    found = []
    for function in (head_losses, plain_losses):
        losses = function(hidden, weight, shift, targets)
        assert losses.dtype == torch.float32 and losses.shape == (n,)
        (gradient,) = torch.autograd.grad((losses * weigh).sum(), hidden)
        assert gradient.dtype == dtype
        found.append((losses.detach(), gradient))
    room = 2**-5 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= room * (1 + theirs.abs().max())


@pytest.mark.parametrize("known", [0.1, 0.2, 0.3])
def test_tokens_that_are_known_are_rounded_no_worse_than_by_all_logits(known):
    """In half precision, where a probability near 1 has few bits, and so has a factor such as 1/3."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 64, generator=g).bfloat16()
    targets = torch.randint(500, (40,), generator=g)
    hidden = (weight[targets] * known + 0.1 * torch.randn(40, 64, generator=g)).bfloat16()
    weigh = 1 + torch.rand(40, generator=g)
    away = []
    half = torch.bfloat16
    for function, dtype in ((plain_losses, torch.float64), (head_losses, half), (plain_losses, half)):
        leaf = hidden.to(dtype).requires_grad_()
        losses = function(leaf, weight.to(dtype), None, targets)
        away.append(torch.autograd.grad((losses * weigh).sum(), leaf)[0].double())
    exact, ours, theirs = away
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_a_hopeless_token_has_a_finite_loss():
    hidden = torch.tensor([[300.0]])
    losses = head_losses(hidden, torch.tensor([[1.0], [-1.0]]), None, torch.tensor([1]))
    assert losses.item() == pytest.approx(600.0)


FOLLOWED = {"paligemma2"}  # a soft cap; a LLaVA around the same decoders has none


def frozen(name):
    family = (FAMILIES | VARIANTS)[name]
    model, config = family.build()
    model.requires_grad_(False)
    next(
        p for n, p in model.named_parameters() if "down_proj" in n or ("fc2" in n and "vision" not in n)
    ).requires_grad_()
    inputs = family.batch((1, 1), config=config)
    return model, inputs, labelled(inputs["input_ids"])


@pytest.mark.parametrize("name", [*FAMILIES, "paligemma2", "llava-gemma2", "llava-granite", "llava-phi3"])
def test_every_family_loses_what_transformers_says(name):
    """By chunks, or with all logits where the family changes what its head gives: told, never guessed."""
    model, inputs, labels = frozen(name)
    wanted = model(**inputs, labels=labels).loss
    assert plain_head(model) and followed(model) is None
    state = torch.get_rng_state()
    given_ = token_losses(model, inputs, labels)
    again = token_losses(model, inputs, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert followed(model) is (name in FOLLOWED)
    assert torch.equal(given_, again)
    assert given_.mean().item() == pytest.approx(wanted.item(), abs=1e-5)


def test_no_logits_are_made(monkeypatch):
    model, inputs, labels = frozen("llava")
    head = model.get_output_embeddings()
    count = int((labels[:, 1:] != IGNORED).sum())
    seen = []
    own = loss_module.HeadLoss.apply
    monkeypatch.setattr(loss_module.HeadLoss, "apply", lambda *args: seen.append(args[0].shape) or own(*args))
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", None)  # would fail where it is called
    token_losses(model, inputs, labels)
    assert seen == [(count, 32)]
    assert "forward" not in head.__dict__


def test_heads_that_are_trained_or_watched_are_left_alone():
    model, _, _ = frozen("llava")
    head = model.get_output_embeddings()
    head.requires_grad_(True)
    assert not plain_head(model)
    head.requires_grad_(False)
    handle = head.register_forward_hook(lambda *args: None)
    assert not plain_head(model)
    handle.remove()
    handle = head.register_full_backward_hook(lambda *args: None)
    assert not plain_head(model)
    handle.remove()
    assert plain_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not plain_head(model)
    head.weight = torch.nn.Parameter(head.weight.data.as_subclass(type("Coded", (torch.Tensor,), {})), False)
    assert not plain_head(model), "a weight that may compute something of its own"


def changing(model, monkeypatch, change):
    own = type(model).forward

    def forward(self, *args, **keywords):
        out = own(self, *args, **keywords)
        out.logits = change(out.logits)
        return out

    monkeypatch.setattr(type(model), "forward", forward)


def test_logits_that_are_changed_in_place_are_seen(monkeypatch):
    model, inputs, labels = frozen("llava")
    wanted = token_losses(model, inputs, labels)
    other, _, _ = frozen("llava")
    changing(other, monkeypatch, lambda logits: logits.mul_(3.0))
    found = token_losses(other, inputs, labels)
    assert followed(other) is True
    assert not torch.allclose(found, wanted, rtol=0.01)
    assert torch.equal(token_losses(other, inputs, labels), found)


def test_logits_that_are_changed_only_later_stop_the_run(monkeypatch):
    model, inputs, labels = frozen("llava")
    token_losses(model, inputs, labels)
    changing(model, monkeypatch, lambda logits: 3 * logits)
    with pytest.raises(TrainingError, match="did not do so at first"):
        token_losses(model, inputs, labels)
