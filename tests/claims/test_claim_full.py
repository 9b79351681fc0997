"""``full`` is fine-tuning: the same losses as training the modules themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws.laws import digests, loss
from laws.worlds import World, worlds
from torch import nn

import tarsia.methods  # noqa: F401 (registers every method)
from tarsia.core.attach import Part, attach, base_parameters, patches
from tarsia.methods.full import FullConfig

Optimiser = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMISERS = {
    "sgd": lambda learnt: torch.optim.SGD(learnt, lr=0.05, momentum=0.9),
    "adamw": lambda learnt: torch.optim.AdamW(learnt, lr=1e-3, weight_decay=0.1),
}


def curve(model: nn.Module, learnt: list[nn.Parameter], world: World, make: Optimiser) -> list[float]:
    optimiser, losses = make(learnt), []
    for _ in range(5):
        optimiser.zero_grad()
        value = loss(model, world.inputs)
        value.backward()
        optimiser.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("world", ["text", "pictures", "experts"])
def test_the_loss_curve_is_that_of_fine_tuning(world: str, optimiser: str) -> None:
    here = worlds()[world]
    model = here.model()
    before = digests(model)
    components = sorted({site.component for site in here.sites if site.dead is None})
    attach(model, here.sites, [Part("full", str(component), FullConfig()) for component in components])
    trained = [name for site in patches(model, "default") for name in site.tensors]
    given = curve(
        model,
        [p for patch in patches(model, "default").values() for p in patch.parameters()],
        here,
        OPTIMISERS[optimiser],
    )
    plain = here.model().requires_grad_(False)
    own = base_parameters(plain)
    wanted = curve(plain, [own[name].requires_grad_(True) for name in trained], here, OPTIMISERS[optimiser])
    assert wanted[-1] < wanted[0] - 0.05, "nothing is learnt"
    assert given == pytest.approx(wanted, abs=1e-6, rel=1e-6)
    assert digests(model) == before
