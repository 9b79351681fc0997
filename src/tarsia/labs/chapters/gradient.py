"""Gradients and rounding: which pass as they are, which vanish, and where a straight-through estimator is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from tarsia.adapter import Host, open_base
from tarsia.core.attach import Part, attach, patches
from tarsia.core.method import find
from tarsia.core.select import select
from tarsia.core.site import Component, Kind, Role, Site
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.labs.speakers import LINEAR
from tarsia.quant import codec
from tarsia.quant.codec import Scheme, decode, encode
from tarsia.quant.levels import levels
from tarsia.quant.tensor import Weight4

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NESTED: Final = Scheme("nf4", nested=True)
PLAIN: Final = Scheme("nf4", nested=False)
WIDTH: Final = 64
STEPS: Final = 1500
RANK: Final = 8
NUDGE: Final = 1e-5
_BATCH: Final = 128
_SHOWN: Final = 10  # steps to a point of a curve

Rows = dict[str, Mapping[str, Cell]]


def _drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_the_input() -> Rows:
    """One layer in float64: autograd through ``codec.linear``, the product with the decoded weight, and differences."""
    generator = _drawn(0)
    weight = torch.randn(96, WIDTH, generator=generator)
    x = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)
    pull = torch.randn(4, 96, generator=generator, dtype=torch.float64)
    held = encode(weight, NESTED)

    def loss(at: Tensor) -> Tensor:
        return (pull * codec.linear(at, held).tanh()).sum()

    asked = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(asked), asked)
    dense = decode(held, torch.float64)
    by_hand = (pull * (1 - (x @ dense.T).tanh() ** 2)) @ dense
    steps = torch.zeros_like(x)
    for i in range(x.numel()):
        aside = torch.zeros(x.numel(), dtype=torch.float64)
        aside[i] = 1e-6
        nudge = aside.view_as(x)
        steps.view(-1)[i] = (loss(x + nudge) - loss(x - nudge)) / 2e-6
    return {
        "input: the product with the decoded weight": {"largest difference": _apart(slope, by_hand)},
        "input: finite differences": {"largest difference": _apart(slope, steps)},
    }


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, over the largest of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


def to_the_pixels() -> tuple[Rows, dict[str, str]]:
    """mini-1 with every linear layer of its language model in 4 bits: the gradient at the picture's pixels."""
    host = open_base("mini-1", dtype="float32", device="cpu")
    at = [host.model.get_submodule(s.path) for s in select(LINEAR, host.sites, frozenset({Kind.WEIGHT}))]
    weights: list[Tensor] = [layer.weight.detach() for layer in at]  # type: ignore[operator]
    exact = _pixel_slope(host)
    for layer, weight in zip(at, weights, strict=True):
        layer.weight = nn.Parameter(Weight4.of(weight, NESTED), requires_grad=False)
    packed = _pixel_slope(host)
    for layer, weight in zip(at, weights, strict=True):
        layer.weight = nn.Parameter(decode(encode(weight, NESTED)), requires_grad=False)
    dense = _pixel_slope(host)
    rows: Rows = {
        "input: mini-1's pixels, 4-bit layers against the same numbers dense": {
            "largest difference": _apart(packed, dense)
        },
        "model: 4 bits against the base itself": {"largest difference": _apart(packed, exact), "layers": len(at)},
    }
    return rows, {"mini-1": host.fingerprint.weights}


def _pixel_slope(host: Host) -> Tensor:
    """Gradient of the loss of one question about a random picture, [1, 3, 64, 64]."""
    model: Any = host.model
    pixels = torch.rand(1, 3, 64, 64, generator=_drawn(1)).mul(2).sub(1).requires_grad_()
    tokens = host.processor.image_seq_length if hasattr(host.processor, "image_seq_length") else 64
    words = torch.randint(300, 900, (1, 24), generator=_drawn(2))
    ids = torch.cat([torch.full((1, tokens), model.config.image_token_id), words], 1)
    labels = torch.cat([torch.full((1, tokens), -100), words], 1)
    (slope,) = torch.autograd.grad(model(input_ids=ids, pixel_values=pixels, labels=labels).loss, pixels)
    return slope


def through_adapters() -> tuple[Rows, list[float]]:
    """LoRA over one frozen 4-bit layer learns a changed weight; its loss by step, over that of saying nothing."""
    generator = _drawn(3)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    change = torch.randn(WIDTH, 4, generator=generator) @ torch.randn(4, WIDTH, generator=generator) / 4
    wanted = weight + change
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    packed = Weight4.of(weight, NESTED)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    stored = {name: t.clone() for name, t in packed.value.tensors.items()}
    model = nn.Sequential(layer)
    site = Site("0", Component.LANGUAGE, Role.Q, 0, Kind.WEIGHT, (WIDTH, WIDTH), "0.weight", None)
    lora = find("lora").configure({"rank": RANK, "alpha": float(RANK)})
    attach(model, [site], [Part("lora", "language", lora)])
    (patch,) = patches(model, "default").values()

    def loss() -> Tensor:
        x = torch.randn(_BATCH, WIDTH, generator=generator)
        value: Tensor = (model(x) - x @ wanted.T).square().mean() / wanted.square().sum(1).mean()
        return value

    with torch.no_grad():
        before = float(loss())
    curve = _thinned(_train(list(patch.parameters()), loss, 3e-2))
    rest = torch.linalg.svdvals((wanted - decode(encode(weight, NESTED))).double())
    best = float(rest[RANK:].square().sum() / wanted.double().square().sum())
    with torch.no_grad():
        answer = model(torch.eye(WIDTH)).T
    reached = float((answer - wanted).square().sum() / wanted.square().sum())
    now = packed.value.tensors
    rows: Rows = {
        "adapter: before the first step": {"loss": before},
        "adapter: after the last": {"loss": reached, "times the best of rank 8": reached / best},
        "adapter: the best of rank 8": {"loss": best},
        "adapter: bytes of the base changed": {"loss": sum(int((stored[n] != now[n]).sum()) for n in stored)},
    }
    return rows, curve


def _train(parameters: list[nn.Parameter], loss: Callable[[], Tensor], lr: float) -> Iterator[float]:
    """Adam with a cosine to zero; every step's loss."""
    optimiser = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        yield float(value.detach())


def _thinned(curve: Iterator[float]) -> list[float]:
    """The means of every ``_SHOWN`` steps."""
    values = list(curve)
    return [sum(values[i : i + _SHOWN]) / _SHOWN for i in range(0, len(values), _SHOWN)]


def vanishing() -> Rows:
    """How many of a weight's numbers can be nudged without any change of what is stored for all of them."""
    weight = torch.randn(16 * codec.BLOCK, generator=_drawn(4))
    rows: Rows = {}
    for name, scheme in (("float32 scales", PLAIN), ("nested scales", NESTED)):
        here = decode(encode(weight, scheme))
        still = 0
        for i in range(len(weight)):
            moved = weight.clone()
            moved[i] += NUDGE * moved[i]
            still += int(torch.equal(decode(encode(moved, scheme)), here))
        rows[f"rounding: {name}"] = {
            "numbers": len(weight),
            "of no effect, %": 100 * still / len(weight),
            "a block's others, %": 100 * (1 - 1 / codec.BLOCK),
        }
    return rows


def true_slope(weight: Tensor) -> Tensor:
    """``weight`` rounded, with the gradient that rounding has where it has one: codes constant, scales the largest."""
    packed = encode(weight.detach(), PLAIN).codes
    codes = torch.cat([packed >> 4, packed & 15], 1).view(-1, codec.BLOCK).long()
    scales = weight.view(-1, codec.BLOCK).abs().amax(1, keepdim=True)
    return (levels("nf4")[codes] * scales).view_as(weight)


def straight_through(weight: Tensor) -> Tensor:
    """``weight`` rounded, with the gradient of not rounding."""
    return weight + (decode(encode(weight.detach(), PLAIN)) - weight.detach())


def _dense(weight: Tensor) -> Tensor:
    return weight


WAYS: Final[Mapping[str, tuple[Callable[[Tensor], Tensor], bool, float]]] = {
    "the gradient of rounding itself": (true_slope, False, 3e-2),
    "straight-through": (straight_through, False, 3e-2),
    "dense, rounded at the end": (_dense, False, 3e-2),
    "straight-through from the dense answer": (straight_through, True, 1e-3),
}
"""How a weight that is rounded is trained: what is multiplied with, whether it starts at the answer, learning rate."""


def rounded_weights(desk: Desk) -> tuple[Rows, dict[str, list[float]]]:
    """A layer whose 4-bit weight itself is trained to give what another layer gives, on correlated inputs."""
    generator = _drawn(5)
    wanted = torch.randn(WIDTH, WIDTH, generator=generator)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q * torch.logspace(0, -1, WIDTH)
    start = torch.randn(WIDTH, WIDTH, generator=generator)
    nothing = float((wanted @ turn).square().sum())

    def apart(weight: Tensor) -> float:
        return float(((weight - wanted) @ turn).square().sum()) / nothing

    rows: Rows = {"train: at the start": {"loss in 4 bits": apart(decode(encode(start, PLAIN)))}}
    series = {}
    for i, (name, (shown, from_answer, lr)) in enumerate(WAYS.items()):
        desk.show(0.5 + 0.12 * i, f"training a 4-bit weight: {name}")
        inputs = _drawn(6)
        latent = nn.Parameter((wanted if from_answer else start).clone())

        def loss(shown: Callable[[Tensor], Tensor] = shown, latent: Tensor = latent) -> Tensor:
            x = torch.randn(_BATCH, WIDTH, generator=inputs) @ turn.T  # noqa: B023 used up before the next
            value: Tensor = (x @ (shown(latent) - wanted).T).square().sum() / (_BATCH * nothing)
            return value

        series[f"train {name}"] = _thinned(_train([latent], loss, lr))
        rows[f"train: {name}"] = {"loss in 4 bits": apart(decode(encode(latent.detach(), PLAIN)))}
    ends = {name: float(rows[f"train: {name}"]["loss in 4 bits"]) for name in WAYS}
    gain = ends["the gradient of rounding itself"] / ends["straight-through"]
    return rows | {"gain: of the estimator": {"times": gain}}, series


def measure(desk: Desk) -> Found:
    """Everything, from the input's gradient to a rounded weight's own."""
    desk.show(0.0, "the gradient at a layer's input")
    rows = to_the_input()
    desk.show(0.1, "the gradient at mini-1's pixels")
    pixels, bases = to_the_pixels()
    desk.show(0.2, "LoRA over a 4-bit layer")
    adapters, curve = through_adapters()
    desk.show(0.4, "nudging a weight's numbers")
    still = vanishing()
    trained, series = rounded_weights(desk)
    return Found(rows | pixels | adapters | still | trained, {"lora": curve, **series}, bases)


def draw(found: Found, figure: Figure) -> None:
    """Loss by step, with A and B trained, and with the rounded weight itself trained."""
    left, right = figure.subplots(1, 2)
    left.plot(range(0, STEPS, _SHOWN), found.series["lora"], color=COLOURS[0], lw=1)
    best = float(found.rows["adapter: the best of rank 8"]["loss"])
    left.axhline(best, color=GREY, ls=":", lw=1)
    left.text(STEPS, best * 0.9, "the best that rank 8 can", ha="right", va="top", fontsize=8)
    left.set_title("A and B over a frozen 4-bit weight: no estimator")
    for (name, _), colour in zip(WAYS.items(), (COLOURS[1], COLOURS[0], GREY, COLOURS[2]), strict=True):
        right.plot(range(0, STEPS, _SHOWN), found.series[f"train {name}"], color=colour, lw=1, label=name)
    right.set_title("the 4-bit weight itself is trained")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, over that of a zero weight")


TEXT: Final = """
It is often said that QLoRA needs a straight-through estimator, because rounding has no gradient. It needs none. What is
rounded is frozen: it is a constant, and a product with a constant has the gradient of any product.

## Through a frozen weight

The gradient that reaches a layer's input, compared with (largest difference over the largest value):

{{ table("input") }}
What is not the same is the model: in 4 bits mini-1 is another function than mini-1, and its slope at the pixels
differs by {{ value("model: 4 bits against the base itself", "largest difference", ".2g") }} of the largest. The
gradient is exact for the model that is trained.

A and B over such a layer learn, by plain autograd, a change of rank 4 and what they can of the rounding error (left).
Loss over that of a zero weight:

{{ table("adapter") }}
## Of a rounded weight

Where the 4-bit weight itself is to be trained, rounding is in the way. Of a weight's numbers, the share that can be
moved by a hundred-thousandth of itself without any change in what is decoded:

{{ table("rounding") }}
So "zero almost everywhere" is true of the codes and not of the scales: the largest number of each block of 64 is its
scale, and has a gradient. Training with this true gradient alone moves the scales and little else. The
straight-through estimator lets gradients pass rounding as if it were not there, and the same layer learns (right).
Loss of the layer in 4 bits, over that of a zero weight, at the end:

{{ table("train") }}
The estimator comes about as far as training the dense weight and rounding it once. Going on with it from the dense
answer finds a better rounding than the nearest, for inputs are correlated here. Each way has one learning rate and one
seed: the factor of the claim is large enough not to depend on them, the last digits are not.
"""

CHAPTER: Final = Chapter(
    name="gradient",
    title="Gradients through 4-bit weights",
    question="Does QLoRA need a straight-through estimator?",
    claim=(
        "The gradient through a frozen 4-bit weight is that of the dense weight (to 1e-12 in float64, 1e-4 at mini-1's "
        "pixels) and trains A and B to within 5 % of the best that their rank allows, without an estimator; where the "
        "4-bit weight itself is trained, over 98 % of its numbers have no gradient, and the estimator lowers the loss "
        "at least 20 times further."
    ),
    bounds=(
        Bound(
            "gradient at the input against the dense product",
            "input: the product with the decoded weight",
            "largest difference",
            high=1e-12,
        ),
        Bound("against finite differences", "input: finite differences", "largest difference", high=1e-6),
        Bound(
            "gradient at mini-1's pixels",
            "input: mini-1's pixels, 4-bit layers against the same numbers dense",
            "largest difference",
            high=1e-4,
        ),
        Bound("loss of A and B over the best", "adapter: after the last", "times the best of rank 8", 0.99, 1.05),
        Bound("bytes of the base changed", "adapter: bytes of the base changed", "loss", 0, 0),
        Bound("numbers without a gradient, %", "rounding: float32 scales", "of no effect, %", 98, 99.9),
        Bound("with the estimator, times lower", "gain: of the estimator", "times", 20),
    ),
    measure=measure,
    draw=draw,
    picture="loss by step: LoRA over a frozen 4-bit weight; a 4-bit weight trained with and without an estimator",
    text=TEXT,
    order=40,
    minutes=0.5,
    size=(11, 3.8),
)  # fmt: skip
