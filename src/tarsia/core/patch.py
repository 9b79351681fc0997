"""The change at one site, and the thing below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.along import along, longer
from tarsia.core.errors import AttachError
from tarsia.core.packed import Packed
from tarsia.core.site import Kind, Site

Forward = Callable[..., Any]
Origin = Callable[[Site], Tensor]
"""The weight of a site as it was before it was packed, [out, in], in any dtype and on any device."""
Tokenize = Callable[[str], Sequence[int]]
"""The ids of a text, without what a tokenizer would put around it."""
Keywords = Mapping[str, Any]
_NONE: Keywords = MappingProxyType({})


class Base(Protocol):
    """What a patch stands on during one call: the frozen module, or another patch over it."""

    def __call__(self, x: Tensor) -> Tensor:
        """What the site gives for ``x`` without this patch."""
        ...

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias without this patch, dequantised and brought from the disk if need be."""
        ...

    def origin(self) -> Tensor:
        """The weight as it was before it was packed. Raises AttachError where nobody has it."""
        ...

    def apply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """What the site gives for ``x`` with this weight and bias in place of its own."""
        ...

    def linear(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, where calling this is ``F.linear(x, weight, bias)`` with both frozen and nothing else."""
        ...


class Patch(nn.Module):
    """A trained piece for one site.

    ``fold`` is the specification: how the patch changes (W, b). ``forward`` goes through it unless a
    faster one is written, which must agree. Attributes of type float, int or bool named in ``constants``
    are saved beside the tensors and never derived again (an effective scale, for one); those in ``words`` too are str.

    A patch that ``replaces`` trains numbers in the base's place: it has no place at a weight that is packed. One that
    ``corrects`` starts from what packing took away: it goes over a packed weight alone, whose origin can be had.
    """

    constants: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    adapter: str = ""
    """The name under which it was put into a model."""
    replaces: bool = False
    corrects: bool = False

    @classmethod
    def create(cls, site: Site, config: Any, base: Ground, generator: torch.Generator) -> Self:
        """Make the patch for ``site`` of the bare module ``base``; every random number comes from ``generator``."""
        raise NotImplementedError

    @classmethod
    def restore(cls, site: Site, shapes: Mapping[str, tuple[int, ...]], constants: Mapping[str, Any]) -> Self:
        """Make an empty patch that tensors of these shapes can be loaded into."""
        raise NotImplementedError

    @classmethod
    def misfit(cls, site: Site) -> str | None:
        """Why such a patch has no place at ``site``, though its kind is right; None where it has one."""
        return None

    @classmethod
    def lacks(cls, site: Site) -> str | None:
        """What such a patch trains and ``site`` has not: it is left out of a selection. None: it has all."""
        return None

    def again(self, place: Site) -> Patch:
        """What acts at ``place``, where the base uses the patched tensor a second time."""
        return Tied(self)

    def kept(self) -> Patch:
        """What is left of the patch when its training is over: itself, or another that computes the same of less."""
        return self

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that do what base and patch do together, in the base's dtype."""
        raise NotImplementedError

    def forward(self, x: Any, base: Any) -> Any:
        """Input of the site to output of the site, given the ``Base`` below."""
        return base.apply(*self.fold(*base.dense()), x)


class Outside(Patch):
    """A patch of what a module hands on (``Kind.STREAM``): hidden states [..., width], first in a tuple or alone.

    ``change`` is its specification. The base is asked once, for x itself, so rows of many adapters share one pass of
    it; a patch that has the module run over something else than x is no such patch, and has a forward of its own.
    """

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """Hidden states to hand on, [..., width], for the module's input x and what it gives for it, y."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Any:
        out: Any = base(x)
        if isinstance(out, tuple):
            return (self.change(x, out[0]), *out[1:])
        return self.change(x, out)


class Batched(Protocol):
    """The optional fast path of a method for a batch whose rows carry different adapters."""

    @staticmethod
    def batched(patches: Sequence[tuple[Patch, Tensor]], x: Tensor, base: Base) -> Tensor:
        """Every patch on its own entries of ``x`` (int64 indices along dim 0), the base once on all."""
        ...


class Thin(Protocol):
    """A patch that is LoRA's product of two thin factors, or can be written as one; found by presence too."""

    @staticmethod
    def to_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A [r, in] and B [out, r] with the whole change scale * B A, from which every tensor comes back."""
        ...

    @staticmethod
    def from_lora(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The patch's tensors again, to the bit."""
        ...


class Additive(Protocol):
    """A patch that adds the same to whatever weight and bias it is put on; found by presence too."""

    def delta(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """up [out, rank] and down [rank, in] with W' = W + up down, both or none; and d with b' = b + d, or None."""
        ...


class Joinable(Protocol):
    """A patch of which several, weighted, at one site are exactly one of the kind; found by presence too."""

    @staticmethod
    def joined(
        patches: Sequence[tuple[Mapping[str, Any], Mapping[str, Tensor]]], weights: Sequence[float]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Constants and tensors of the patch whose change is the weighted sum of theirs.

        Raises MergeError where these are not alike enough to be one.
        """
        ...


class Measured(Protocol):
    """A patch that is DoRA's: two thin factors and the length of each row; found by presence too."""

    @staticmethod
    def to_dora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A [r, in], B [out, r] and magnitude [out], from which every tensor comes back."""
        ...

    @staticmethod
    def from_dora(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The patch's tensors again, to the bit."""
        ...

    def gains(self, weight: Tensor) -> Tensor:
        """What each output [out] of W + scale * B A is multiplied by, bias apart: its length over that of its row."""
        ...


@runtime_checkable
class Scaling(Protocol):
    """A patch that scales what a linear layer is given, or what it gives; found by presence too."""

    def scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """What each input [in] is multiplied by, and each output [out] with its bias; None: by nothing."""
        ...


@runtime_checkable
class Necked(Protocol):
    """A patch that adds a bottleneck U f(D h + d) + u to what a module hands on; found by presence too.

    Its parameters are ``down``, ``up`` and, where it has them, ``down_bias``, ``up_bias``, ``norm`` and ``norm_bias``
    (a LayerNorm of h, with torch's epsilon); ``activation`` is the name of f.
    """

    activation: str

    def neck(self) -> tuple[bool, float]:
        """Whether h is what the module is given (else what it gives), and what the bottleneck's is multiplied by."""
        ...


@runtime_checkable
class Paced(Protocol):
    """A patch whose tensors learn at rates of their own, as multiples of its part's; found by presence too."""

    def pace(self, name: str) -> float:
        """How many times the part's learning rate the tensor ``name`` learns at, above 0."""
        ...


class Tied(Patch):
    """A patch's second place, where the base uses the same tensor again: there it acts through its fold."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        # a list hides the patch from nn.Module: its tensors are saved, and counted, where it is at home
        self.home = [patch]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with loaded(self.home[0]):
            return self.home[0].fold(weight, bias)


class Ground:
    """The module itself, as the lowest base of one call with these arguments; ``x`` takes the first's place."""

    __slots__ = ("args", "below", "keywords", "module", "sent", "site", "source", "tokenize")

    def __init__(
        self,
        module: nn.Module,
        site: Site,
        below: Forward,
        args: tuple[Any, ...] = (),
        keywords: Keywords = _NONE,
        source: Origin | None = None,
        tokenize: Tokenize | None = None,
    ) -> None:
        self.module, self.site, self.below, self.args, self.keywords = module, site, below, args, keywords
        self.source, self.tokenize = source, tokenize
        self.sent: dict[str, Tensor] = {}

    def __call__(self, x: Any) -> Any:
        if not self.args:
            return self.below(**self.keywords)
        length = self.args[0].shape[1] if self.site.kind is Kind.STREAM and self.args[0].ndim > 2 else 0
        if not length or x.shape[1] == length:
            return self.below(x, *self.args[1:], **self.keywords)
        rest = [longer(value, length, x.shape[1] - length) for value in self.args[1:]]
        return self.below(x, *rest, **{k: longer(v, length, x.shape[1] - length) for k, v in self.keywords.items()})

    @property
    def came(self) -> Mapping[str, Tensor]:
        """The states of adapters that came with the call's hidden states; ``sent`` are those to send on."""
        return along(self.args[0])

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return dense(self.module, self.site)

    def origin(self) -> Tensor:
        if self.source is None:
            raise AttachError(
                f"The weight of {self.site.path} before it was quantised is not at hand.",
                do="attach(..., origin=host.origin), where the host was opened from 16-bit files",
            )
        weight = self.source(self.site)
        if tuple(weight.shape) != self.site.shape or not weight.is_floating_point():
            raise AttachError(
                f"That is not the weight of {self.site.path} before it was quantised.",
                given=f"{weight.dtype} {tuple(weight.shape)}",
                allowed=f"floating-point numbers {self.site.shape}",
                do="read it from the files that the base was quantised from",
            )
        return weight

    @property
    def vocabulary(self) -> int:
        """How many ids the module above this site looks up."""
        return int(self._lookup().num_embeddings)

    def embedded(self, ids: Sequence[int]) -> Tensor:
        """What the bare base makes of ids where they enter its decoder: [len(ids), width] in float32."""
        lookup = self._lookup()
        slot: Any = lookup._modules.get("slot")
        device = getattr(getattr(lookup, "_hf_hook", None), "execution_device", lookup.weight.device)
        with loaded(lookup), torch.no_grad():
            found: Tensor = (slot.below if slot is not None else lookup)(torch.tensor(ids, device=device))
        return found.detach().float().cpu()

    def _lookup(self) -> Any:
        return self.module.get_input_embeddings()  # type: ignore[operator]

    def ids(self, text: str) -> list[int]:
        """The ids of a text. Raises AttachError where nobody can tell, or there are none."""
        if self.tokenize is None:
            raise AttachError(
                "No tokenizer is at hand to start from a text.",
                given=repr(text),
                do="attach(..., tokenize=host.tokenize), where the host has a processor",
            )
        found = list(self.tokenize(text))
        if not found:
            raise AttachError("The text to start from has no tokens.", given=repr(text), do="give another text")
        return found

    def apply(self, weight: Tensor, bias: Tensor | None, x: Any) -> Any:
        if self.site.kind is Kind.WEIGHT:
            return F.linear(x, weight, bias)
        with swapped(self.module, named(self.module, self.site, weight, bias)):
            return self(x)

    def linear(self, x: Any) -> tuple[Tensor, Tensor | None] | None:
        # a subclass, a wrapped forward or a half-loaded weight: all of these compute something else
        if type(self.module) is not nn.Linear or getattr(self.below, "__func__", None) is not nn.Linear.forward:
            return None
        weight, bias = self.module.weight, self.module.bias
        own = (weight,) if bias is None else (weight, bias)
        plain = all(
            (type(t) in (Tensor, nn.Parameter) or isinstance(t, Packed))
            and not (t.is_meta or t.requires_grad)
            and t.dtype == x.dtype
            for t in own
        )
        return (weight, bias) if plain and not torch.is_autocast_enabled(x.device.type) else None


class Upon:
    """What stands on another base, and leaves to it whatever is none of its own."""

    __slots__ = ("base",)

    def __init__(self, base: Base) -> None:
        self.base = base

    def __call__(self, x: Any) -> Any:
        return self.base(x)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.base.dense()

    def origin(self) -> Tensor:
        return self.base.origin()

    def apply(self, weight: Tensor, bias: Tensor | None, x: Any) -> Any:
        return self.base.apply(weight, bias, x)

    def linear(self, x: Any) -> tuple[Tensor, Tensor | None] | None:
        """None: calling this is more than one multiplication, or is what saves it."""
        return None


class Over(Upon):
    """A patch over another base, as the base of the next patch."""

    __slots__ = ("patch",)

    def __init__(self, patch: Patch, base: Base) -> None:
        super().__init__(base)
        self.patch = patch

    def __call__(self, x: Any) -> Any:
        return self.patch(x, self.base)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        with loaded(self.patch):
            return self.patch.fold(*self.base.dense())


def dense(module: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """The site's own weight and bias, also where accelerate keeps them elsewhere.

    Raises AttachError where they are not there or are no floating-point tensors.
    """
    found = []
    with loaded(module):
        for name in (full.rpartition(".")[2] for full in site.tensors):
            value = module._parameters.get(name)
            if value is None or value.is_meta or not value.is_floating_point():
                raise AttachError(
                    f"The numbers of {site.path} can not be read.",
                    given=f"{name}: {'nothing' if value is None else value.device if value.is_meta else value.dtype}",
                    allowed="a floating-point parameter, in memory or offloaded by accelerate",
                    do="load the base's weights before a patch that needs them is attached",
                )
            found.append(value.dense() if isinstance(value, Packed) else value)
    return found[0], found[1] if len(found) > 1 else None


def named(module: nn.Module, site: Site, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
    """A folded weight and bias under the names that ``module`` gives them.

    Raises AttachError for a bias where the module has no place for one.
    """
    if bias is None and site.bias is None:
        return {site.key: weight}
    name = (site.bias or "bias").rpartition(".")[2]
    if name not in module._parameters:
        raise AttachError(f"{site.path} has no place for a bias.", given=type(module).__name__)
    return {site.key: weight, name: bias}


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Bring in the module's own tensors where accelerate has offloaded them, for the calls inside."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(p is not None and p.is_meta for p in module._parameters.values()):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Let ``module`` see these tensors in place of its own parameters.

    Others see them too while it lasts: call one model from one thread at a time.
    """
    kept = {name: module._parameters[name] for name in tensors}
    try:
        module._parameters.update(tensors)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(kept)
