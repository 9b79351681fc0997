"""What the paper of PiSSA (arXiv:2404.02948) says of it."""

from __future__ import annotations

import torch
from torch import nn

import tarsia.methods  # noqa: F401 (registers every method)
from tarsia.core.attach import Part, attach, patches
from tarsia.core.site import Component, Kind, Role, Site
from tarsia.methods.lora import LoRAConfig
from tarsia.methods.pissa import PiSSA
from tarsia.quant.codec import Scheme
from tarsia.quant.tensor import Weight4


def weight(out: int, into: int, fall: float = 0.8) -> torch.Tensor:
    """A matrix whose singular values fall, as those of trained layers do."""
    torch.manual_seed(out)
    wide = torch.linalg.svd(torch.randn(out, into, dtype=torch.float64), full_matrices=False)
    values = fall ** torch.arange(len(wide.S), dtype=torch.float64)
    return ((wide.U * values) @ wide.Vh).float()


def attached(w: torch.Tensor, method: str, config: LoRAConfig, packed: bool = False) -> tuple[nn.Sequential, PiSSA]:
    out, into = w.shape
    model = nn.Sequential(nn.Linear(into, out, bias=False))
    model[0].weight = nn.Parameter(Weight4.of(w, Scheme()) if packed else w.clone(), requires_grad=False)
    site = Site("0", Component.LANGUAGE, Role.Q, 0, Kind.WEIGHT, (out, into), "0.weight")
    attach(model, [site], [Part(method, "language", config)])
    (patch,) = patches(model, "default").values()
    return model, patch


def test_the_start_is_the_top_of_the_weights_singular_values() -> None:
    """Eq. 2-3: A and B hold the r largest, and what is left of W has all the others."""
    for shape in ((40, 24), (24, 40), (30, 30)):
        w = weight(*shape)
        for config in (LoRAConfig(rank=6, alpha=6.0), LoRAConfig(rank=6, alpha=24.0), LoRAConfig(rank=6, alpha=-3.0)):
            _, patch = attached(w, "pissa", config)
            all_ = torch.linalg.svdvals(w.double())
            top = torch.linalg.svdvals(patch.scale * (patch.B0 @ patch.A0).double())
            left = torch.linalg.svdvals(w.double() - patch.scale * (patch.B0.double() @ patch.A0.double()))
            assert torch.allclose(top[:6], all_[:6], atol=1e-6)
            assert torch.allclose(left[:18], all_[6:24], atol=1e-6)
            assert torch.equal(patch.A, patch.A0) and torch.equal(patch.B, patch.B0)


def test_both_factors_share_a_singular_value() -> None:
    """Eq. 2: A = S^1/2 V^T and B = U S^1/2, here over the root of the scale."""
    _, patch = attached(weight(20, 12), "pissa", LoRAConfig(rank=4, alpha=8.0))
    root = torch.linalg.svdvals(weight(20, 12))[:4] / 2
    assert torch.allclose((patch.A @ patch.A.t()).detach(), torch.diag(root), atol=1e-6)
    assert torch.allclose((patch.B.t() @ patch.B).detach(), torch.diag(root), atol=1e-6)


def test_at_step_0_both_factors_learn_and_more_than_loras() -> None:
    """Section 3: LoRA's gradients are small at the start, PiSSA's are along the principal directions."""
    w = weight(64, 48)
    norms = {}
    for method in ("lora", "pissa"):
        model, patch = attached(w, method, LoRAConfig(rank=8, alpha=8.0))
        torch.manual_seed(1)
        x, target = torch.randn(200, 48), torch.randn(200, 64)
        (model(x) - target).square().mean().backward()
        norms[method] = patch.A.grad.norm().item(), patch.B.grad.norm().item()
    assert norms["lora"][0] == 0
    assert norms["pissa"][0] > 0
    assert sum(n**2 for n in norms["pissa"]) ** 0.5 >= 1.5 * sum(n**2 for n in norms["lora"]) ** 0.5


def test_it_learns_faster_than_lora_from_the_same_weight() -> None:
    """Figure 2: at one rate the loss of the first steps is lower."""
    w, losses = weight(64, 48), {}
    torch.manual_seed(2)
    x = torch.randn(256, 48)
    target = x @ (w + 0.3 * weight(64, 48, 0.7).flip(0)).t()
    for method in ("lora", "pissa"):
        model, patch = attached(w, method, LoRAConfig(rank=8, alpha=8.0))
        steps = torch.optim.SGD(patch.parameters(), lr=0.5)
        for _ in range(20):
            steps.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            steps.step()
        losses[method] = loss.item()
    assert losses["pissa"] < 0.9 * losses["lora"]


def test_a_new_patch_changes_not_a_bit() -> None:
    """In bf16 too, where W - B0 A0 + B A would not be W again."""
    for dtype in (torch.float32, torch.bfloat16):
        w = weight(48, 32).to(dtype)
        model, patch = attached(w, "pissa", LoRAConfig(rank=8))
        x = torch.randn(50, 32).to(dtype)
        with torch.no_grad():
            assert torch.equal(model(x), x @ w.t())
            patch.A += 1e-3 * patch.A.norm() * torch.randn_like(patch.A)
            moved = model(x).double() - x.double() @ w.t().double()
            change = patch.scale * (patch.B.double() @ patch.A.double() - patch.B0.double() @ patch.A0.double())
            wanted = x.double() @ change.t()
        rounding = x.double() @ w.t().double() if dtype is torch.bfloat16 else wanted
        assert (moved - wanted).norm() <= (2**-8 if dtype is torch.bfloat16 else 1e-4) * rounding.norm()


def test_a_small_move_survives_bf16() -> None:
    """A and A0 that differ by less than bf16 can tell still make a change of the right size."""
    w = weight(48, 32).bfloat16()
    _, patch = attached(w, "pissa", LoRAConfig(rank=8, alpha=8.0))
    x = torch.randn(50, 32).bfloat16()
    with torch.no_grad():
        patch.A += 1e-4 * patch.A
        change = patch.B0.double() @ (patch.A.double() - patch.A0.double())
        wanted, given = x.double() @ change.t(), patch.update(x).double()
        a, b, a0, b0 = (t.bfloat16().t() for t in (patch.A, patch.B, patch.A0, patch.B0))
        lost = x @ a @ b - x @ a0 @ b0
    assert (given - wanted).norm() <= 0.02 * wanted.norm()
    assert (lost.double() - wanted).norm() >= 0.9 * wanted.norm()


def test_over_4_bits_the_start_is_of_what_the_bits_stand_for() -> None:
    w = weight(64, 64)
    _, patch = attached(w, "pissa", LoRAConfig(rank=4, alpha=4.0), packed=True)
    held = Weight4.of(w, Scheme()).dense()
    top = torch.linalg.svdvals((patch.B0 @ patch.A0).double())[:4]
    assert torch.allclose(top, torch.linalg.svdvals(held.double())[:4], atol=1e-6)
    assert not torch.allclose(top, torch.linalg.svdvals(w.double())[:4], atol=1e-6)


def test_where_there_is_no_further_direction_it_starts_as_lora() -> None:
    w = weight(20, 3) @ torch.randn(3, 16)
    model, patch = attached(w, "pissa", LoRAConfig(rank=8, alpha=8.0))
    assert torch.equal(patch.B[:, 3:], torch.zeros(20, 5))
    assert patch.A[3:].abs().min() > 0
    assert patch.A[3:].abs().max() <= 16**-0.5
    assert torch.allclose(patch.B @ patch.A, w, atol=1e-5)
    model(torch.randn(5, 16)).square().sum().backward()
    assert patch.B.grad[:, 3:].abs().min() > 0
