"""Cross-entropy through a frozen language head, some rows at a time: no logits of a whole batch exist.

With H [n, d] the hidden states that predict labelled tokens, W [V, d] and b the head's, t the targets:

    Z = H W^T + b        loss_i = log sum_j exp Z_ij - Z_i,t(i)        dH_i = dloss_i (softmax(Z_i) - 1_t(i)) W

As the head is frozen, dH without its factor dloss_i can be made while Z is there, so Z is made once and each
token may still weigh differently. (The idea is CCE's, arXiv:2411.09009, and Liger's, arXiv:2410.10989.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.errors import TrainingError

ROWS: Final = 128
"""Positions that go through the head at once: enough for the product to be fast, and few bytes (24 MiB at V = 49k)."""

_FOLLOWED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""For each head that was seen at work: whether its model does anything to what the head gives."""


class HeadLoss(torch.autograd.Function):
    """``HeadLoss.apply(hidden, weight, bias, targets)``: the loss of each row in nats, float32 [n]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        scratch = torch.empty(min(ROWS, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, min(start + ROWS, len(hidden)))
            logits = scratch[: rows.stop - start]
            if bias is None:
                torch.mm(hidden[rows], weight.t(), out=logits)
            else:
                torch.addmm(bias, hidden[rows], weight.t(), out=logits)
            parts = logits.float()  # the very same memory where it is float32 already
            parts -= parts.amax(1, keepdim=True)
            hit = parts.gather(1, targets[rows, None])
            whole = parts.exp_().sum(1, keepdim=True)
            losses[rows] = (whole.log() - hit)[:, 0]
            if gradient is not None:
                # less the target before anything is rounded: of a token that is known little else is left
                parts.scatter_add_(1, targets[rows, None], -whole)
                # divided after the product, where a row has d entries and not V
                torch.mm(parts.to(hidden.dtype), weight, out=gradient[rows])
                gradient[rows] /= whole
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None]).to(gradient.dtype), None, None, None


def head_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The loss of each row of ``hidden`` [n, d], whose next token is ``targets`` [n]: float32 [n], in nats."""
    losses: Tensor = HeadLoss.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return losses


def plain_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The same by way of all logits at once: what ``head_losses`` is held to."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")


def plain_head(model: nn.Module) -> bool:
    """Whether the model's head is a linear layer that is frozen, and that nobody patches or watches."""
    return _head(model) is not None


def followed(model: nn.Module) -> bool | None:
    """Whether the model changes what its head gives (a soft cap, a scale), and all logits are made. None: unseen."""
    head = _head(model)
    return None if head is None else _FOLLOWED.get(head)


def bare_hidden(
    model: nn.Module, choosing: Callable[[], AbstractContextManager[None]], inputs: Mapping[str, Tensor]
) -> Tensor | None:
    """What would have gone through the head: the model is run with a head that hands on what it is given.

    None where the head is not a plain frozen one, or where the model gives something else than what its head gave.
    That is found out with the first batch, which then counts for nothing: its random numbers are drawn again.
    Raises TrainingError where it is so with a later batch only.
    """
    head = _head(model)
    if head is None or _FOLLOWED.get(head):
        return None
    seen: list[tuple[Tensor, int]] = []

    def hand_on(hidden: Tensor) -> Tensor:
        seen.append((hidden, _version(hidden)))
        return hidden

    before = None if head in _FOLLOWED else _random()
    head.__dict__["forward"] = hand_on
    try:
        with choosing():
            given: Tensor = model(**inputs, use_cache=False).logits
    finally:
        del head.__dict__["forward"]
    same = given is seen[0][0] and _version(given) == seen[0][1]
    if before is None and not same:
        raise TrainingError(
            "The model changes what its head gives, and did not do so at first.",
            given=type(model).__name__,
            do="remove what was added to the model or its head since the first step",
        )
    if before is None:
        return given
    _FOLLOWED[head] = not same
    if same:
        return given
    torch.set_rng_state(before[0])
    if len(before) > 1:
        torch.cuda.set_rng_state_all(before[1:])
    return None


def _head(model: nn.Module) -> nn.Linear | None:
    """The model's head where it is a linear layer that is frozen, in memory, and that nobody patches or watches."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if type(head) is not nn.Linear or "slot" in head._modules or "forward" in head.__dict__ or _watched(head):
        return None
    plain = all(type(p) is nn.Parameter and not p.requires_grad and not p.is_meta for p in head.parameters())
    return head if plain and not torch.is_autocast_enabled(head.weight.device.type) else None


def _watched(module: nn.Module) -> bool:
    # a hook before the forward is called as ever
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; nothing counts that in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _random() -> list[Tensor]:
    """The generators' states: the CPU's, then every GPU's where they are in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
