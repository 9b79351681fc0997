"""Frozen pieces of a model, computed in fewer passes over memory while it is trained, and less of them kept.

Autograd keeps what each elementary operation read: five tensors for one frozen norm. But what a norm gives, or
the product inside a gated MLP, follows from other tensors that are kept anyway. So these are one operation each with
a derivative of its own, and what they give is made a second time where the backward pass asks for it.

Which classes are meant is a table. Each entry is first tried beside the model's own code, output and gradient, on
random numbers: where they differ, or the tensors are not float32, the model's own code runs, and ``Lean`` says so.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.errors import TrainingError
from tarsia.core.linear import Remade

CLOSE: Final = 1e-5


class Norm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension (arXiv:1910.07467, eq. 4), w frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = (length.square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return scaled(x, weight, inverse), inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dx = grads[0] * weight
        along = torch.linalg.vecdot(dx, x).unsqueeze(-1) * inverse.pow(3) / x.shape[-1]
        return dx.mul_(inverse).addcmul_(x, along, value=-1), None, None


def scaled(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """What a norm gives, from its input and the inverse of its length."""
    return (x * inverse).mul_(weight)


class Gate(torch.autograd.Function):
    """y = act(g) u for a gated MLP (arXiv:2002.05202, section 2)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Act) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return gated(gate, up, act)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        du = ctx.act.forward(gate).mul_(grads[0])
        return ctx.act.backward(grads[0] * up, gate), du, None


@dataclass(frozen=True, slots=True)
class Act:
    """An activation and its derivative: ``backward(dy, x)`` may write into dy."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def gated(gate: Tensor, up: Tensor, act: Act) -> Tensor:
    """The product inside a gated MLP."""
    return act.forward(gate).mul_(up)


_aten = torch.ops.aten
SILU: Final = Act(F.silu, lambda dy, x: _aten.silu_backward.grad_input(dy, x, grad_input=dy))
GELU_TANH: Final = Act(
    lambda x: F.gelu(x, approximate="tanh"),
    lambda dy, x: _aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=dy),
)
ACTIVATIONS: Final[Mapping[str, Act]] = {"SiLUActivation": SILU, "SiLU": SILU, "GELUTanh": GELU_TANH}
"""Activations of gated MLPs, by the name of their class."""


class Rotate(torch.autograd.Function):
    """y = x cos + (-x2, x1) sin, with x1 and x2 the halves of x [..., width] (arXiv:2104.09864, eq. 34)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dy, half = grads[0], grads[0].shape[-1] // 2
        dx = dy * cos
        dx[..., :half].addcmul_(dy[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1)
        return dx, None, None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A frozen norm whose output can be made again from its input."""
    y, inverse = Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    y.remade = Remade(scaled, (x.detach(), weight, inverse), y._version)
    return y  # type: ignore[no-any-return]


def gate(given: Tensor, up: Tensor, act: Act) -> Tensor:
    """The product inside a gated MLP, which can be made again from its factors."""
    y = Gate.apply(given, up, act)  # type: ignore[no-untyped-call]
    y.remade = Remade(lambda a, b: gated(a, b, act), (given.detach(), up.detach()), y._version)
    return y  # type: ignore[no-any-return]


# What a class of Transformers' that ends so computes: the attribute that holds eps, and what is added to its weight.
NORMS: Final[Mapping[str, tuple[str, float]]] = {
    "GemmaRMSNorm": ("eps", 1.0),
    "Gemma2RMSNorm": ("eps", 1.0),
    "Gemma3RMSNorm": ("eps", 1.0),
    "Gemma3nRMSNorm": ("eps", 0.0),
    "RMSNorm": ("variance_epsilon", 0.0),
}
MLPS: Final = ("gate_proj", "up_proj", "down_proj", "act_fn")
ROTARY: Final = "apply_rotary_pos_emb"


def _norm_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The lean forward of a frozen norm, where the module is one that is known."""
    known = next((entry for end, entry in NORMS.items() if type(module).__name__.endswith(end)), None)
    weight = module._parameters.get("weight")
    if known is None or weight is None or not hasattr(module, known[0]):
        return None
    own, eps, shift = module.forward, float(getattr(module, known[0])), known[1]

    def forward(hidden_states: Tensor) -> Tensor:
        held: Any = module.weight
        plain = hidden_states.dtype == held.dtype == torch.float32 and not held.requires_grad
        if not plain or not hidden_states.requires_grad:
            return own(hidden_states)  # type: ignore[no-any-return]
        return norm(hidden_states, held + shift if shift else held, eps)

    return forward


def _mlp_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The lean forward of a gated MLP: its linear layers are called as ever, patches and all."""
    if not type(module).__name__.endswith("MLP") or set(MLPS) - set(dict(module.named_children())):
        return None
    held: Any = module
    act = ACTIVATIONS.get(type(held.act_fn).__name__)
    if act is None:
        return None

    def forward(x: Tensor) -> Tensor:
        given, up = held.gate_proj(x), held.up_proj(x)
        both = given.requires_grad and up.requires_grad and given.dtype == up.dtype == torch.float32
        both = both and not _seen(held.act_fn)
        return held.down_proj(gate(given, up, act) if both else held.act_fn(given) * up)  # type: ignore[no-any-return]

    return forward


def _seen(module: nn.Module) -> bool:
    """Whether somebody would notice that a module is not called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _rotary_of(own: Callable[..., Any]) -> Callable[..., Any]:
    """A lean rotation of queries and keys beside the family's ``own``."""

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **keywords: Any) -> Any:
        wide = q.shape[-1] == cos.shape[-1] == k.shape[-1]
        learns = (q.requires_grad or k.requires_grad) and not cos.requires_grad
        if args or keywords or not wide or not learns or {t.dtype for t in (q, k, cos, sin)} != {torch.float32}:
            return own(q, k, cos, sin, *args, **keywords)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turn: Callable[..., Tensor] = Rotate.apply
        return turn(q, cos, sin), turn(k, cos, sin)

    return rotary


@dataclass(frozen=True, slots=True)
class Lean:
    """What is computed in the lean way: how many modules of each class; and what differed, and so is left as it is."""

    taken: Mapping[str, int]
    refused: tuple[str, ...]


@contextmanager
def lean(model: nn.Module) -> Iterator[Lean]:
    """Let the frozen norms, gated MLPs and rotations of ``model`` be computed in the lean way inside.

    A module whose forward is not its class's own, or whose own tensors are trained or patched, is left alone.
    Rotations belong to a file of Transformers: other models of the family see them too while it lasts.
    Raises TrainingError at the end where something else has since been put over a module's forward.
    """
    taken: Counter[str] = Counter()
    refused: set[str] = set()
    undo: list[Callable[[], str | None]] = []
    files: dict[str, ModuleType] = {}
    try:
        for module in model.modules():
            if type(module).__module__ in sys.modules:
                files[type(module).__module__] = sys.modules[type(module).__module__]
            name = type(module).__name__
            if "forward" in module.__dict__ or "slot" in module._modules or name in refused:
                continue
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                continue
            if any(p.is_meta or p.dtype != torch.float32 for p in module.parameters()):
                continue
            forward = _norm_of(module) or _mlp_of(module)
            if forward is None:
                continue
            # each one: two layers of a class may differ by a number that only its own code reads
            if not agree(module, module.forward, forward):
                refused.add(name)
                continue
            module.__dict__["forward"] = forward
            undo.append(partial(_take_out, module, forward))
            taken[name] += 1
        for file in files.values():
            if ROTARY not in file.__dict__ or not file.__name__.startswith("transformers."):
                continue
            if not _turn(file):
                refused.add(f"{file.__name__}.{ROTARY}")
                continue
            undo.append(partial(_turn_back, file))
            taken[ROTARY] += 1
        yield Lean(dict(taken), tuple(sorted(refused)))
    finally:
        wrapped = [over for back in undo if (over := back())]
        if wrapped:
            raise TrainingError(
                "Something else wraps modules that were computed in one pass now.",
                given=", ".join(sorted(set(wrapped))),
                do="take out what was put in while the run lasted, before it ends",
            )


def _take_out(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> str | None:
    """Give a module its own forward back; its class's name where something stands over ours, which still works."""
    if module.__dict__.get("forward") is not forward:
        return type(module).__name__
    del module.__dict__["forward"]
    return None


_TURNED: Final[dict[ModuleType, tuple[Callable[..., Any], int]]] = {}
"""Files whose rotation is a lean one now: their own, and how many runs count on it."""


def _turn(file: ModuleType) -> bool:
    """Put the lean rotation into a file, where it gives the same. It stays for as long as any run counts on it."""
    own, users = _TURNED.get(file, (file.__dict__[ROTARY], 0))
    rotary = _rotary_of(own)
    if not users and not rotations_agree(own, rotary):
        return False
    if not users:
        file.__dict__[ROTARY] = rotary
    _TURNED[file] = (own, users + 1)
    return True


def _turn_back(file: ModuleType) -> None:
    own, users = _TURNED.pop(file)
    if users > 1:
        _TURNED[file] = (own, users - 1)
    else:
        file.__dict__[ROTARY] = own


def agree(module: nn.Module, own: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> bool:
    """Whether two forwards of a module give the same for random numbers, and the same gradient."""
    width = next(p.shape[-1] for p in module.parameters())
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, width, generator=generator).to(device)
    weigh = torch.randn(1, 5, width, generator=generator).to(device)
    found = []
    for forward in (own, other):
        # both draw the same random numbers (a patch inside may have dropout), and the run's own stay as they are
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            leaf = x.clone().requires_grad_()
            y = forward(leaf)
            found.append((y.detach(), *torch.autograd.grad((y * weigh).sum(), leaf)))
    return all(_close(a, b) for a, b in zip(*found, strict=True))


def rotations_agree(own: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions turn random queries and keys alike, and their gradients too."""
    generator = torch.Generator().manual_seed(0)
    q, k, weigh = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 4))
    cos, sin = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    found = []
    for rotate in (own, other):
        with torch.enable_grad():
            leaf = q.clone().requires_grad_()
            try:
                turned, key = rotate(leaf, k, cos, sin)
            except (TypeError, ValueError):  # another signature under the same name
                return False
            found.append((turned.detach(), key, *torch.autograd.grad((turned * weigh).sum(), leaf)))
    return all(_close(a, b) for a, b in zip(*found, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= CLOSE * max(1.0, float(a.abs().max())))
