"""Rows under the methods' own patches: one pass of the compiled kernel is what each patch makes of its row alone."""

from __future__ import annotations

import pytest
import torch
from served_rows import ACTIVATIONS, Drawn, entries
from torch import Tensor
from torch.nn import functional as F

from tarsia.core.patch import Patch
from tarsia.methods.dora import DoRA
from tarsia.methods.houlsby import Bottleneck, Houlsby
from tarsia.methods.ia3 import IA3
from tarsia.methods.lora import LoRA
from tarsia.methods.parallel import Parallel
from tarsia.methods.pfeiffer import Pfeiffer
from tarsia.methods.scaled_parallel import ScaledParallel
from tarsia.quant import loader
from tarsia.serve import kernel
from tarsia.serve.forms import Neck, Thin
from tarsia.serve.reference import Row

WITHIN, OUT, COUNTS = 96, 80, (1, 3, 1, 20, 1, 1)


@pytest.fixture
def own() -> kernel.Kernel:
    found = kernel.library()
    if found is None:
        pytest.skip("no kernel is compiled")
    return found


def near(found: Tensor, exact: Tensor) -> None:
    """Within 1e-5 of the largest number."""
    assert float((found - exact).detach().abs().max()) <= 1e-5 * float(exact.detach().abs().max())


def line(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def test_linear_sites_under_three_methods(own: kernel.Kernel) -> None:
    draw = Drawn(1)
    weight, bias = draw(OUT, WITHIN, by=0.1), draw(OUT)
    patches: list[Patch | None] = [
        LoRA(draw(16, WITHIN), draw(OUT, 16), 0.5),
        LoRA(draw(5, WITHIN), draw(OUT, 5), 2.0),
        DoRA(draw(8, WITHIN), draw(OUT, 8), draw(OUT).abs() + 1, 0.25),
        IA3(draw(OUT), inner=False),
        IA3(draw(WITHIN), inner=True),
        None,
    ]
    forms: list[Row] = []
    with torch.no_grad():
        for patch in patches:
            if isinstance(patch, LoRA):
                forms.append(Thin(patch.A.data, patch.B.data, patch.scale))
            elif isinstance(patch, DoRA):
                gain = patch.gains(weight).contiguous()
                forms.append(Thin(patch.A.data, patch.B.data, patch.scale, gain, bias - gain * bias))
            elif isinstance(patch, IA3):
                given, out = patch.scaling()
                forms.append(Thin(None, None, 1.0, out, None, given))
            else:
                forms.append(None)
        starts, x = line(COUNTS), draw(sum(COUNTS), WITHIN)
        given = kernel.inner(x, starts, forms, entries(forms))
        found = own.grouped(given, F.linear(given, weight, bias), starts, forms, entries(forms))
        for i, patch in enumerate(patches):
            first, last = starts[i : i + 2].tolist()
            folded = (weight, bias) if patch is None else patch.fold(weight, bias)
            near(found[first:last], F.linear(x[first:last], *folded))


def test_stream_sites_under_four_bottlenecks(own: kernel.Kernel) -> None:
    draw, width = Drawn(2), WITHIN
    patches: list[Bottleneck] = []
    for i, kind in enumerate((Houlsby, Pfeiffer, Parallel, ScaledParallel, Houlsby, Parallel)):
        inner = (6, 48, 17, 1, 33, 16)[i]
        held = {"down": draw(inner, width, by=0.1), "up": draw(width, inner)}
        if i != 1:
            held |= {"down_bias": draw(inner), "up_bias": draw(width)}
        if i % 2:
            held |= {"norm": draw(width), "norm_bias": draw(width)}
        activation = ACTIVATIONS[i % 4]
        patches.append(kind(activation, 4.0, held) if kind is ScaledParallel else kind(activation, held))
    forms: list[Row] = []
    for patch in patches:
        of_input, scale = isinstance(patch, Parallel | ScaledParallel), getattr(patch, "scale", 1.0)
        parts = {
            name: getattr(patch, name, None) for name in ("down", "up", "down_bias", "up_bias", "norm", "norm_bias")
        }
        data = {name: None if part is None else part.data for name, part in parts.items()}
        forms.append(Neck(**data, activation=patch.activation, of_input=of_input, scale=scale))
    starts, x, y = line(COUNTS), draw(sum(COUNTS), width), draw(sum(COUNTS), width)
    found = own.grouped(x, y.clone(), starts, forms, entries(forms))
    for i, patch in enumerate(patches):
        first, last = starts[i : i + 2].tolist()
        near(found[first:last], patch.change(x[first:last], y[first:last]))


@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 1, 1), (90, 1, 33, 0, 7, 1), (1, 0, 0, 0, 0, 0)], ids=str)
def test_threads_do_not_show(own: kernel.Kernel, counts: tuple[int, ...]) -> None:
    """Large enough to be spread, and where one row is all there is, to be sliced: the bits of one thread."""
    address, _ = loader.threads(loader.maps())
    if not address:
        pytest.skip("torch has loaded no OpenMP runtime that can be asked")
    handle = loader.load(kernel.INTERFACE, kernel.INTERFACE.library.path)
    assert not isinstance(handle, str)
    alone, many = (kernel.Kernel(handle, own.name, parallel) for parallel in (0, address))
    draw, before = Drawn(3), torch.get_num_threads()
    forms: list[Row] = [Thin(draw(rank, 700), draw(900, rank), 0.5) for rank in (700, 16, 33, 1, 64, 8)]
    starts, x, y = line(counts), draw(sum(counts), 700), draw(sum(counts), 900)
    try:
        torch.set_num_threads(3)
        found = [one.grouped(x, y.clone(), starts, forms, entries(forms)) for one in (alone, many)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found) and not torch.equal(found[0], y)
