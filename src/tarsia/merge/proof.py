"""The folded model beside the live adapter on its base: what both say to the same rows, with pictures.

The two are never in memory together: what the live one says is written down, and then held beside what the files say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from tarsia.core.errors import MergeError
from tarsia.core.packed import Packed
from tarsia.merge.remains import Remains

FLOOR: Final[Mapping[str, float]] = {"float32": 1e-5, "bfloat16": 2e-2}
"""The largest difference of a logit, as a share of the largest, that is allowed in any case, by precision."""
NOISES: Final = 4.0
"""As many times the difference that random noise of the size of the rounding makes is allowed: more is no rounding."""
EFFECT: Final = 2.0
"""An adapter must move the logits, in the mean, by so many times what its fold differs by."""
_KEPT: Final = 1 << 26
"""Logits that are written down, at most; of more positions an even part is compared."""

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Heard:
    """What the live adapter said to one batch: ``logits`` [positions, vocabulary] at the chosen ``positions``."""

    inputs: Inputs
    positions: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Apart:
    """How far two models' logits are from each other: the ``largest`` difference and the root of the ``mean`` square.

    ``same`` of ``positions`` have the same likeliest token.
    """

    largest: float
    mean: float
    same: int
    positions: int


@dataclass(frozen=True, slots=True)
class Proof:
    """The folded model held to the live adapter. Differences are of logits; ``peak`` is the largest logit.

    ``moved`` is how far the adapter leaves its base, ``noise`` what random noise of the rounding's own size (see
    ``Remains.off``) in the folded weights does, ``allowed`` the bound: FLOOR of the peak, and NOISES times that noise.
    Those that end in ``_mean`` are roots of mean squares, the others the largest. ``agreement`` is the share of
    positions with the same likeliest token.
    """

    rows: int
    positions: int
    pictures: bool
    precision: str
    peak: float
    moved: float
    moved_mean: float
    noise: float
    noise_mean: float
    allowed: float
    allowed_mean: float
    difference: float
    difference_mean: float
    agreement: float

    @property
    def values(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"relative": self.difference / self.peak if self.peak else 0.0}


def said(model: nn.Module, inputs: Inputs, positions: Tensor) -> Tensor:
    """The model's logits at positions of the flattened batch, [positions, vocabulary] in float32.

    Raises MergeError where one is no number.
    """
    own = next(p for p in model.parameters() if p.is_floating_point())
    given = {
        key: value.to(own.device, own.dtype if value.is_floating_point() else None) for key, value in inputs.items()
    }
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(**given, use_cache=False).logits.flatten(0, 1)[positions].float().cpu()
    finally:
        model.train(was)
    if not bool(logits.isfinite().all()):
        raise MergeError(
            "The outputs are not all numbers, so nothing can be held to them.",
            do="fold into float32 files, or train again from an earlier checkpoint",
        )
    return logits


def chosen(inputs: Inputs, vocabulary: int, batches: int) -> Tensor:
    """Positions of the flattened batch that are compared: all that the mask counts, or an even part of them."""
    mask = inputs.get("attention_mask")
    counted = (torch.ones(inputs["input_ids"].shape) if mask is None else mask).flatten().nonzero().flatten()
    most = max(1, _KEPT // max(1, vocabulary) // max(1, batches))
    if len(counted) <= most:
        return counted
    return counted[torch.linspace(0, len(counted) - 1, most).round().long()]


def pictures(batches: Sequence[Inputs]) -> bool:
    """Whether some row has a picture."""
    return any(key.startswith("pixel_values") and value.numel() for inputs in batches for key, value in inputs.items())


def hear(model: nn.Module, batches: Sequence[Inputs], vocabulary: int) -> tuple[Heard, ...]:
    """What ``model`` says to each batch."""
    found = []
    for inputs in batches:
        positions = chosen(inputs, vocabulary, len(batches))
        found.append(Heard(inputs, positions, said(model, inputs, positions)))
    return tuple(found)


def apart(model: nn.Module, heard: Sequence[Heard]) -> Apart:
    """How far ``model`` is from what was heard."""
    far, squares, count, same, positions = 0.0, 0.0, 0, 0, 0
    for one in heard:
        logits = said(model, one.inputs, one.positions)
        if logits.shape != one.logits.shape:
            raise MergeError(
                "The folded model has another vocabulary.", given=logits.shape[-1], allowed=one.logits.shape[-1]
            )
        same += int((logits.argmax(-1) == one.logits.argmax(-1)).sum())
        off = logits.sub_(one.logits)
        far = max(far, float(off.abs().max()))
        squares += float(off.square().sum(dtype=torch.float64))
        count, positions = count + off.numel(), positions + len(off)
    return Apart(far, (squares / count) ** 0.5 if count else 0.0, same, positions)


def proved(
    model: nn.Module, heard: Sequence[Heard], moved: Apart, remains: Mapping[str, Remains], precision: str
) -> Proof:
    """Hold the folded ``model`` to what the live one said. ``model`` is spoilt: its weights are moved at random.

    Raises MergeError where logits differ by more than rounding explains, the largest or in the mean, and where the
    adapter hardly moves its base by more than what rounding does: nothing would be proved.
    """
    peak = max(float(one.logits.abs().max()) for one in heard)
    found = apart(model, heard)
    noise = _noise(model, heard, remains)
    batches = [one.inputs for one in heard]
    proof = Proof(
        rows=sum(len(inputs["input_ids"]) for inputs in batches),
        positions=found.positions,
        pictures=pictures(batches),
        precision=precision,
        peak=peak,
        moved=moved.largest,
        moved_mean=moved.mean,
        noise=noise.largest,
        noise_mean=noise.mean,
        allowed=FLOOR[precision] * peak + NOISES * noise.largest,
        allowed_mean=FLOOR[precision] * peak + NOISES * noise.mean,
        difference=found.largest,
        difference_mean=found.mean,
        agreement=found.same / found.positions if found.positions else 0.0,
    )
    _judge(proof)
    return proof


def _judge(proof: Proof) -> None:
    """Raise MergeError where a proof fails, or is none."""
    if not (proof.difference <= proof.allowed and proof.difference_mean <= proof.allowed_mean):
        raise MergeError(
            "The folded model does not say what the adapter says on its base.",
            given=f"a logit differs by {proof.difference:.4g} of {proof.peak:.4g}, in the mean by "
            f"{proof.difference_mean:.4g}; {proof.agreement:.1%} have the same likeliest token",
            allowed=f"{proof.allowed:.4g}, in the mean {proof.allowed_mean:.4g}: {NOISES:g} times what random noise of "
            f"the rounding's size does",
            do="report this, with the versions of torch and transformers; nothing was left behind",
        )
    if (
        not EFFECT * proof.difference_mean <= proof.moved_mean
        or proof.moved_mean <= FLOOR[proof.precision] * proof.peak
    ):
        raise MergeError(
            "The rows prove nothing: what rounding does to them is no less than what the adapter does.",
            given=f"the adapter moves logits by {proof.moved_mean:.4g} in the mean, the fold by "
            f"{proof.difference_mean:.4g}",
            allowed=f"a fold that differs by no more than 1/{EFFECT:g} of what the adapter does",
            do="give rows that the adapter was trained for (--rows FILE), or keep it as an adapter: it is too small to "
            "be folded into this form",
        )


def _noise(model: nn.Module, heard: Sequence[Heard], remains: Mapping[str, Remains]) -> Apart:
    """What random noise of the size of the rounding, in every weight that was rounded, does to the logits."""
    off = {name: one.off for name, one in remains.items() if one.off}
    quiet = [Heard(one.inputs, one.positions, said(model, one.inputs, one.positions)) for one in heard]
    with shaken(model, off):
        return apart(model, quiet)


@contextmanager
def shaken(model: nn.Module, off: Mapping[str, float]) -> Iterator[None]:
    """Inside, each weight named has normal noise of this size. Afterwards packed ones are as they were, others not.

    A packed weight can not be written to: what its noise would add to the layer's output is added there.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    with ExitStack() as stack:
        for number, (name, size) in enumerate(sorted(off.items())):
            parameter = named[name]
            if isinstance(parameter, Packed):
                layer = model.get_submodule(name.rpartition(".")[0])
                stack.callback(layer.register_forward_hook(_added(number, size, parameter)).remove)
                continue
            with torch.no_grad():
                parameter.add_(_drawn(number, parameter.shape).to(parameter), alpha=size)
        yield


def _added(number: int, size: float, weight: Tensor) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        noise = _drawn(number, weight.shape).to(out)
        return out + size * torch.nn.functional.linear(given[0].to(out.dtype), noise)

    return hook


def _drawn(number: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number))
