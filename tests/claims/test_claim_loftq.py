"""What the paper of LoftQ (arXiv:2310.08659) says of it, in the form that leaves the base's bytes alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tarsia.methods  # noqa: F401 (registers every method)
from tarsia.core.attach import Part, attach, patches
from tarsia.core.errors import AttachError
from tarsia.core.site import Component, Kind, Role, Site
from tarsia.methods.lora import LoRA, LoRAConfig
from tarsia.quant.codec import Scheme
from tarsia.quant.tensor import Weight4

Origin = Callable[[Site], Tensor]


def attached(
    w: Tensor, config: LoRAConfig, kind: str = "nf4", origin: Origin | None = None, packed: bool = True
) -> tuple[nn.Sequential, LoRA, Tensor]:
    """A model of one layer, its patch, and the numbers that the layer's bits stand for."""
    out, into = w.shape
    model = nn.Sequential(nn.Linear(into, out, bias=False))
    held = Weight4.of(w, Scheme(kind)) if packed else w
    model[0].weight = nn.Parameter(held, requires_grad=False)
    site = Site("0", Component.LANGUAGE, Role.Q, 0, Kind.WEIGHT, (out, into), "0.weight")
    attach(model, [site], [Part("loftq", "language", config)], origin=origin)
    (patch,) = patches(model, "default").values()
    return model, patch, model[0].weight.dense()


@pytest.mark.parametrize("kind", ["nf4", "int4"])
@pytest.mark.parametrize("rank, alpha", [(1, 1.0), (8, 16.0), (16, -4.0), (48, 48.0)])
def test_what_is_left_of_the_error_is_the_tail_of_its_singular_values(kind: str, rank: int, alpha: float) -> None:
    """Eq. 6 for a fixed Q: no other update of this rank leaves less (Eckart-Young)."""
    torch.manual_seed(0)
    w = torch.randn(96, 64)
    _, patch, q = attached(w, LoRAConfig(rank, alpha), kind, lambda site: w)
    error = w.double() - q.double()
    left = (error - patch.scale * (patch.B.double() @ patch.A.double())).norm()
    tail = torch.linalg.svdvals(error)[rank:].norm()
    assert left < error.norm()
    assert left.item() == pytest.approx(tail.item(), rel=1e-6)


def test_at_full_rank_nothing_is_left() -> None:
    w = torch.randn(32, 48)
    model, _, q = attached(w, LoRAConfig(32, 32.0), origin=lambda site: w)
    x = torch.randn(9, 48)
    assert (w - q).norm() > 0.05 * w.norm()
    with torch.no_grad():
        assert torch.allclose(model(x), x @ w.t(), atol=1e-4)


def test_outputs_are_nearer_to_those_of_the_16_bit_weight() -> None:
    torch.manual_seed(3)
    w = torch.randn(128, 96).bfloat16()
    model, _, q = attached(w.float(), LoRAConfig(16), origin=lambda site: w)
    x = torch.randn(200, 96)
    wanted = x @ w.float().t()
    with torch.no_grad():
        before, after = (x @ q.t() - wanted).norm(), (model(x) - wanted).norm()
    assert after < 0.85 * before


def test_every_tensor_learns_from_the_first_step() -> None:
    w = torch.randn(64, 64)
    model, patch, _ = attached(w, LoRAConfig(8), origin=lambda site: w)
    model(torch.randn(5, 64)).square().sum().backward()
    assert patch.A.grad.abs().min() > 0
    assert patch.B.grad.abs().min() > 0


def test_where_quantising_loses_nothing_it_starts_as_lora() -> None:
    w = torch.tensor([1.0, -1.0, 0.0, 1.0]).repeat(16, 16)
    _, patch, q = attached(w, LoRAConfig(4), "int4", lambda site: w)
    assert (w - q).abs().max() < 0.01
    exact = torch.zeros(64, 64)
    _, patch, _ = attached(exact, LoRAConfig(4), "nf4", lambda site: exact)
    assert not patch.B.any()
    assert patch.A.abs().min() > 0


def test_a_weight_that_is_not_quantised_is_refused() -> None:
    with pytest.raises(AttachError, match="no error to correct"):
        attached(torch.randn(8, 8), LoRAConfig(2), origin=lambda site: torch.randn(8, 8), packed=False)


def test_without_the_16_bit_weight_it_is_refused() -> None:
    with pytest.raises(AttachError, match="not at hand"):
        attached(torch.randn(64, 64), LoRAConfig(2))


@pytest.mark.parametrize("other", [torch.randn(64, 32), torch.ones(64, 64, dtype=torch.uint8)])
def test_another_tensor_than_the_origin_is_refused(other: Tensor) -> None:
    with pytest.raises(AttachError, match="not the weight of 0"):
        attached(torch.randn(64, 64), LoRAConfig(2), origin=lambda site: other)


def test_a_weight_of_no_numbers_is_refused() -> None:
    w = torch.randn(64, 64)
    with pytest.raises(AttachError, match="not finite"):
        attached(w, LoRAConfig(2), origin=lambda site: w.clone().index_fill_(0, torch.tensor([3]), float("nan")))
