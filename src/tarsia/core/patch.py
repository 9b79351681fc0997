"""The change at one site, and the thing below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.errors import AttachError
from tarsia.core.site import Kind, Site

if TYPE_CHECKING:
    from collections.abc import Callable


class Base(Protocol):
    """What a patch stands on during one call: the frozen module, or another patch over it."""

    def __call__(self, x: Tensor) -> Tensor:
        """What the site gives for ``x`` without this patch."""
        ...

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias without this patch, dequantised and brought from the disk if need be."""
        ...

    def apply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """What the site gives for ``x`` with this weight and bias in place of its own."""
        ...


class Patch(nn.Module):
    """A trained piece for one site.

    ``fold`` is the specification: how the patch changes (W, b). ``forward`` goes through it unless a
    faster one is written, which must agree. Attributes of type float, int or bool named in ``constants``
    are saved beside the tensors and never derived again (an effective scale, for one).
    """

    constants: tuple[str, ...] = ()

    @classmethod
    def create(cls, site: Site, config: Any, base: Base, generator: torch.Generator) -> Self:
        """Make the patch for ``site``; every random number comes from ``generator``."""
        raise NotImplementedError

    @classmethod
    def restore(cls, site: Site, shapes: Mapping[str, tuple[int, ...]], constants: Mapping[str, Any]) -> Self:
        """Make an empty patch that tensors of these shapes can be loaded into."""
        raise NotImplementedError

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that do what base and patch do together, in the base's dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Input of the site to output of the site."""
        return base.apply(*self.fold(*base.dense()), x)


class Batched(Protocol):
    """The optional fast path of a method for a batch whose rows carry different adapters."""

    @staticmethod
    def batched(patches: Sequence[tuple[Patch, Tensor]], x: Tensor, base: Base) -> Tensor:
        """Every patch on its own entries of ``x`` (int64 indices along dim 0), the base once on all."""
        ...


class Ground:
    """The module itself, as the lowest base of one call."""

    __slots__ = ("below", "extra", "keywords", "module", "positional", "site")

    def __init__(
        self,
        module: nn.Module,
        site: Site,
        below: Callable[..., Any],
        extra: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
        positional: bool = True,
    ) -> None:
        self.module, self.site, self.below = module, site, below
        self.extra, self.keywords, self.positional = extra, keywords or {}, positional

    def _call(self, function: Callable[..., Any], x: Any) -> Any:
        return function(*((x, *self.extra) if self.positional else ()), **self.keywords)

    def __call__(self, x: Any) -> Any:
        return self._call(self.below, x)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        bias = None if self.site.bias is None else tensor(self.module, self.site.bias.rpartition(".")[2])
        return tensor(self.module, self.site.weight.rpartition(".")[2]), bias

    def apply(self, weight: Tensor, bias: Tensor | None, x: Any) -> Any:
        if self.site.kind is Kind.WEIGHT:
            return F.linear(x, weight, bias)
        replaced = {self.site.weight.rpartition(".")[2]: weight}
        if self.site.bias is not None and bias is not None:
            replaced[self.site.bias.rpartition(".")[2]] = bias
        with swapped(self.module, replaced):
            # accelerate's hook would put the offloaded tensors back over the ones just set
            offloaded = hasattr(self.module, "_hf_hook")
            return self._call(type(self.module).forward.__get__(self.module) if offloaded else self.below, x)


class Over:
    """A patch over another base, as the base of the next patch."""

    __slots__ = ("base", "patch")

    def __init__(self, patch: Patch, base: Base) -> None:
        self.patch, self.base = patch, base

    def __call__(self, x: Any) -> Any:
        return self.patch(x, self.base)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.patch.fold(*self.base.dense())

    def apply(self, weight: Tensor, bias: Tensor | None, x: Any) -> Any:
        return self.base.apply(weight, bias, x)


def tensor(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter, also where accelerate keeps it elsewhere.

    Raises AttachError where it is not there or is no floating-point tensor.
    """
    value = module._parameters.get(name)
    if value is not None and value.is_meta:
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        value = None if kept is None else kept[name]
    if value is None or not value.is_floating_point():
        raise AttachError(
            f"The base's {name} can not be read as numbers.",
            given="nothing there" if value is None else str(value.dtype),
            allowed="a floating-point parameter, in memory or offloaded by accelerate",
            do="load the base's weights before a patch that needs them is attached",
        )
    return value


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``module`` see these tensors in place of its own parameters."""
    kept = {name: module._parameters[name] for name in tensors}
    try:
        for name, value in tensors.items():
            module._parameters[name] = value  # type: ignore[assignment]
        yield
    finally:
        module._parameters.update(kept)
