"""What a patch of one adapter comes to at one site: made once, when the adapter is loaded."""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from tarsia.adapter import Adapter, Host
from tarsia.adapter.value import Patched, restored
from tarsia.core.attach import second
from tarsia.core.errors import AdapterError, ServeError
from tarsia.core.lead import Lead
from tarsia.core.patch import Necked, Outside, Patch, Scaling, dense
from tarsia.core.site import Component, Kind, Role, Site

COLUMNS: Final = 12
"""Numbers of one entry."""
DTYPES: Final = (torch.float32, torch.bfloat16)
"""Of factors, as the kernels number them."""
_ACTIVATIONS: Final = ("relu", "gelu", "silu", "tanh")


@dataclass(frozen=True, eq=False)
class Thin:
    """A linear site: y' = gain * (y + scale * up (down (inner * x))) + shift, y = base(inner * x). Parts may be absent.

    ``down`` [rank, in] and ``up`` [out, rank] are float32 or bfloat16 and contiguous; ``gain`` and ``shift`` [out] and
    ``inner`` [in] are float32.
    """

    down: Tensor | None
    up: Tensor | None
    scale: float
    gain: Tensor | None = None
    shift: Tensor | None = None
    inner: Tensor | None = None

    def entry(self) -> tuple[int, ...]:
        """down, up, rank, scale, gain, shift, inner, dtype and zeros: pointers, counts and the bits of a float32."""
        rank = 0 if self.down is None else self.down.shape[0]
        dtype = 0 if self.down is None else DTYPES.index(self.down.dtype)
        places = map(_place, (self.gain, self.shift, self.inner))
        return (_place(self.down), _place(self.up), rank, _bits(self.scale), *places, dtype, 0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class Neck:
    """A stream site: y' = y + scale * (up f(down h + down_bias) + up_bias), h the module's input x or its output y.

    h is layer-normed (epsilon 1e-5) first where there is a ``norm``. All tensors are of one dtype, float32 or bfloat16,
    and contiguous: ``down`` [rank, width], ``up`` [width, rank].
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    norm: Tensor | None
    norm_bias: Tensor | None
    activation: str
    of_input: bool
    scale: float

    def entry(self) -> tuple[int, ...]:
        """down, up, rank, scale, down_bias, up_bias, norm, norm_bias, dtype, activation, of_input and a zero."""
        places = map(_place, (self.down_bias, self.up_bias, self.norm, self.norm_bias))
        first = (_place(self.down), _place(self.up), self.down.shape[0], _bits(self.scale))
        how = (DTYPES.index(self.down.dtype), _ACTIVATIONS.index(self.activation), int(self.of_input), 0)
        return (*first, *places, *how)


@dataclass(frozen=True, eq=False)
class Whole:
    """A linear site whose weight [out, in] and bias [out] are others."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Odd:
    """Everything else: the patch itself, over its own rows. Of ``SEQUENCE`` sites it makes the page's lead."""

    patch: Patch


Form = Thin | Neck | Whole | Odd


def forms(host: Host, adapter: Adapter, fitting: set[Hashable] | None = None) -> dict[str, Form]:
    """Every patch of the adapter as a form, by the path of its site, or of a second place of the site's tensor.

    Nothing is copied that can act as it lies in the file. ``fitting`` remembers what was found to have the shape of the
    base, from one adapter to the next. Raises AdapterError where a patch does not fit the base or a
    tensor would not act, and ServeError (refused) for what can not act in a line of several adapters' rows.
    """
    sites = {site.path: site for site in host.sites}
    absent = [path for path in adapter.patches if path not in sites]
    if absent or not adapter.patches:
        raise AdapterError(
            f"The base has no place for {len(absent)} of the adapter's {len(adapter.patches)} patches.",
            given=", ".join(absent[:3]) or "no patch",
            do="open the base that the adapter was trained on",
        )
    fitting = set() if fitting is None else fitting
    made: dict[str, Form] = {}
    device = host.model.get_input_embeddings().weight.device  # type: ignore[operator]
    with torch.no_grad():
        for path, patched in adapter.patches.items():
            site = sites[path]
            patch = restored(host, site, patched, fitting, copy=False).requires_grad_(False).eval()
            patch = patch.to(device)  # what it makes of a seed, too
            if any(value.is_meta for value in patch.state_dict().values()):
                raise AdapterError(f"The patch at {path} is not in memory.", do="load it before it is served")
            made[path] = form = _form(host, site, patched, patch)
            _check_whole(path, patched, form)
            for tied in site.tied:
                place = second(site, tied)
                made[place.path] = _folded(host, place, patch)
    return made


def tensors(form: Form) -> Iterator[Tensor]:
    """All tensors that a form acts with."""
    if isinstance(form, Odd):
        yield from form.patch.state_dict().values()
        return
    for one in fields(form):
        value = getattr(form, one.name)
        if isinstance(value, Tensor):
            yield value


def _form(host: Host, site: Site, patched: Patched, patch: Patch) -> Form:
    """The simplest form that does what the patch does."""
    kind: Any = type(patch)
    if site.kind is Kind.WEIGHT:
        if hasattr(kind, "to_lora"):
            return _thin(kind.to_lora(patched.tensors), patched)
        if hasattr(kind, "to_dora"):
            return _measured(host, site, patched, patch)
        if hasattr(kind, "delta"):
            up, down, added = kind.delta(patch)
            if up is None or down is None:
                return Thin(None, None, 1.0, shift=_float(added))
            thin_down, thin_up = _alike(down, up)
            return Thin(thin_down, thin_up, 1.0, shift=_float(added))
        if isinstance(patch, Scaling):
            given, out = patch.scaling()
            return Thin(None, None, 1.0, gain=_float(out), inner=_float(given))
        if kind.fold is not Patch.fold:
            return _folded(host, site, patch)
    if isinstance(patch, Necked) and site.kind is Kind.STREAM:
        return _neck(patch)
    if site.component is Component.LANGUAGE and not _by_rows(site, patch):
        raise ServeError(
            "refused",
            f"{patched.method} at {site.path} can not act where rows of several adapters are read together.",
            given=f"{site.kind}, {site.role}",
            allowed="linear layers, norms, embeddings, what modules hand on, prompts and prefixes",
            do="merge this adapter into a base of its own (tarsia export), and serve that",
        )
    return Odd(patch)


def _by_rows(site: Site, patch: Patch) -> bool:
    """Whether the patch makes of some tokens of a line what it makes of them alone."""
    if site.kind is Kind.TENSOR:
        return site.role is Role.NORM
    return (
        site.kind is Kind.EMBEDDING
        or (site.kind is Kind.STREAM and isinstance(patch, Outside))
        or (site.kind is Kind.SEQUENCE and isinstance(patch, Lead))
    )


def _thin(factors: Mapping[str, Tensor], patched: Patched) -> Thin:
    if factors.keys() != {"A", "B"}:
        raise AdapterError("These are no two factors.", given=", ".join(factors), allowed="A, B")
    down, up = _alike(factors["A"], factors["B"])
    return Thin(down, up, float(patched.constants.get("scale", 1.0)))


def _measured(host: Host, site: Site, patched: Patched, patch: Any) -> Thin:
    parts = type(patch).to_dora(patched.tensors)
    plain = _thin({key: value for key, value in parts.items() if key != "magnitude"}, patched)
    weight, bias = dense(host.model.get_submodule(site.module), site)
    gain = patch.to(weight.device).gains(weight).float().contiguous()
    shift = None if bias is None else bias.float() * (1 - gain)
    return replace(plain, gain=gain, shift=shift)


def _neck(patch: Any) -> Neck:
    held: dict[str, Tensor] = dict(patch.state_dict())
    of_input, scale = patch.neck()
    names = [one.name for one in fields(Neck) if one.name not in ("activation", "of_input", "scale")]
    odd = sorted(held.keys() - set(names))
    if odd:
        raise AdapterError("A bottleneck has no such tensor.", given=", ".join(odd), allowed=", ".join(names))
    held = dict(zip(held, _alike(*held.values()), strict=True))
    return Neck(
        down=held["down"],
        up=held["up"],
        down_bias=held.get("down_bias"),
        up_bias=held.get("up_bias"),
        norm=held.get("norm"),
        norm_bias=held.get("norm_bias"),
        activation=patch.activation,
        of_input=of_input,
        scale=scale,
    )


def _folded(host: Host, site: Site, patch: Patch) -> Form:
    """The weight that base and patch have together; where the module is no linear layer, the patch as it is."""
    module = host.model.get_submodule(site.module)
    if not isinstance(module, nn.Linear):
        return Odd(patch)
    weight, bias = dense(module, site)
    folded, moved = patch.to(weight.device).fold(weight, bias)
    return Whole(folded.detach(), None if moved is None else moved.detach())


def _check_whole(path: str, patched: Patched, form: Form) -> None:
    """Raise AdapterError where a tensor of the file can not be in what acts: fewer numbers than it has."""
    held = {t.data_ptr() for t in tensors(form)}
    lost = [name for name, t in patched.tensors.items() if t.numel() and t.data_ptr() not in held]
    if lost and isinstance(form, Neck) and all(t.dtype in DTYPES for t in patched.tensors.values()):
        raise AdapterError(f"Tensors of the patch at {path} would not act.", given=", ".join(lost))


def _alike(*values: Tensor) -> tuple[Tensor, ...]:
    """These in one dtype that the kernels read, themselves where they have it."""
    known = {value.dtype for value in values}
    dtype = known.pop() if len(known) == 1 else torch.float32
    dtype = dtype if dtype in DTYPES else torch.float32
    return tuple(value.detach().to(dtype).contiguous() for value in values)


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().float().contiguous()


def _place(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
