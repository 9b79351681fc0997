"""The low-rank operation against plain autograd: outputs, gradients, what is kept, and where it must not be used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from tarsia.core.linear import LowRank, Remade
from tarsia.core.patch import Ground, Over
from tarsia.core.site import Component, Kind, Role, Site
from tarsia.methods.lora import LoRA

SITE = Site("0", Component.LANGUAGE, Role.Q, 0, Kind.WEIGHT, (7, 5), "0.weight", "0.bias")


def plain(x, weight, bias, a, b, scale):
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def tensors(lead, into, out, rank, bias, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, a, b = (
        torch.randn(s, generator=g).to(dtype) for s in ((*lead, into), (out, into), (rank, into), (out, rank))
    )
    c = torch.randn(out, generator=g).to(dtype) if bias else None
    return [x.requires_grad_(), w, c, a.requires_grad_(), b.requires_grad_(), 0.7]


@settings(max_examples=30, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    into=st.integers(1, 9),
    out=st.integers(1, 9),
    rank=st.integers(1, 4),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_outputs_and_gradients_are_those_of_plain_autograd(lead, into, out, rank, bias, dtype):
    x, w, c, a, b, s = tensors(lead, into, out, rank, bias, dtype)
    a, b = (t.detach().float().requires_grad_() for t in (a, b))  # patches are float32 masters
    found = []
    for function in (LowRank.apply, plain):
        y = function(x, w, c, a, b, s)
        assert y.dtype == dtype
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, a, b))))
    room = 1e-5 if dtype == torch.float32 else 2**-4
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= room * (1 + theirs.abs().max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_derivatives_of_first_and_second_order(lead, bias):
    values = tensors(lead, 4, 5, 2, bias)
    assert gradcheck(LowRank.apply, values)
    assert gradgradcheck(LowRank.apply, values)


def test_only_what_is_asked_for_is_computed():
    x, w, c, a, b, s = tensors((3,), 4, 5, 2, True)
    LowRank.apply(x.detach(), w, c, a, b, s).sum().backward()
    assert x.grad is None and a.grad is not None and b.grad is not None
    LowRank.apply(x, w, c, a.detach(), b.detach(), s).sum().backward()
    assert torch.allclose(x.grad, (w + s * b @ a).detach().sum(0).expand_as(x))


def kept(function):
    """Bytes of distinct storages that the call keeps."""
    found = {}
    with saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        function()
    return sum(t.untyped_storage().nbytes() for t in found.values())


def test_nothing_but_the_input_and_the_factors_is_kept():
    x, w, c, a, b, s = tensors((64,), 32, 48, 2, False, torch.float32)
    frozen, size = w.nbytes + a.nbytes + b.nbytes, x.nbytes
    assert kept(lambda: LowRank.apply(x, w, c, a, b, s)) == frozen + size
    assert kept(lambda: [LowRank.apply(x, w, c, a, b, s) for _ in range(3)]) == frozen + size
    assert kept(lambda: plain(x, w, c, a, b, s)) > frozen + size  # x A^T, and the update before its scale


def test_what_can_be_made_again_is_not_kept_and_made_once():
    source, w, c, a, b, s = tensors((64,), 32, 48, 2, False, torch.float32)
    calls = []

    def double(t):
        calls.append(1)
        return 2 * t

    def run(remade):
        x = source.detach() * 2
        if remade:
            x.remade = Remade(double, (source.detach(),), x._version)
        y = sum(LowRank.apply(x.requires_grad_(), w, c, a, b, s) for _ in range(3))
        return torch.autograd.grad(y.square().sum(), (a, b))

    wanted = run(False)
    assert not calls
    for given_, want in zip(run(True), wanted, strict=True):
        assert torch.equal(given_, want)
    assert len(calls) == 1


def test_a_source_that_has_changed_since_is_refused():
    source, w, c, a, b, s = tensors((3,), 4, 5, 2, False)
    source = source.detach()
    x = source * 2
    x.remade = Remade(lambda t: 2 * t, (source,), x._version)
    y = LowRank.apply(x, w, c, a, b, s)
    source.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_input_that_was_written_to_since_is_kept_as_it_is():
    source, w, c, a, b, s = tensors((3,), 4, 5, 2, False)
    found = []
    for function in (LowRank.apply, plain):
        x = source.detach() * 2
        x.remade = Remade(lambda t: 2 * t, (source.detach(),), x._version)
        x.mul_(3)
        found.append(torch.autograd.grad(function(x, w, c, a, b, s).square().sum(), (a, b)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs)


def test_a_second_derivative_through_what_is_made_again_is_refused():
    source, w, c, a, b, s = tensors((3,), 4, 5, 2, False)
    x = source * 2
    x.remade = Remade(lambda t: 2 * t, (source.detach(),), x._version)
    y = LowRank.apply(x, w, c, a, b, s)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.square().sum(), b, create_graph=True)


def ground(module, *args):
    return Ground(module, SITE, module.forward, args)


def test_where_the_operation_may_stand_in_for_a_base():
    x = torch.randn(3, 5)
    frozen = nn.Linear(5, 7).requires_grad_(False)
    assert ground(frozen).linear(x) == (frozen.weight, frozen.bias)
    assert ground(frozen).linear(x.double()) is None
    assert ground(nn.Linear(5, 7)).linear(x) is None, "it is trained"
    assert ground(nn.Linear(5, 7, device="meta").requires_grad_(False)).linear(x) is None, "not here"
    assert ground(type("Other", (nn.Linear,), {})(5, 7).requires_grad_(False)).linear(x) is None, "a subclass"
    patch = LoRA(torch.randn(2, 5), torch.randn(7, 2), 1.0)
    assert Over(patch, ground(frozen)).linear(x) is None, "another patch"
    with torch.autocast("cpu", torch.bfloat16):
        assert ground(frozen).linear(x) is None
    coded = nn.Linear(5, 7).requires_grad_(False)
    coded.weight = nn.Parameter(coded.weight.data.as_subclass(type("Coded", (torch.Tensor,), {})), False)
    assert ground(coded).linear(x) is None, "a weight that may compute something of its own"
    wrapped = nn.Linear(5, 7).requires_grad_(False)
    inner = wrapped.forward
    wrapped.forward = lambda x: 2 * inner(x)
    assert ground(wrapped).linear(x) is None, "something chained its forward"


@pytest.mark.parametrize("training", [False, True])
def test_dropout_takes_the_plain_path_in_training(training, monkeypatch):
    seen = []
    monkeypatch.setattr(LoRA, "update", lambda self, x: seen.append(1) or torch.zeros(3, 7))
    patch = LoRA(torch.randn(2, 5), torch.randn(7, 2), 1.0, dropout=0.5).train(training)
    x = torch.randn(3, 5)
    patch(x, ground(nn.Linear(5, 7).requires_grad_(False), x))
    assert bool(seen) is training
