"""The loss and its gradient are Transformers' own, on fewer positions of the language head."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, PAD, VARIANTS

from tarsia.train.step import IGNORED, token_losses

ALL = FAMILIES | VARIANTS


def rows_for(family):
    low, high = family.min_pictures, family.max_pictures
    return tuple(n for n in (0, 1, 3) if n >= low and n <= (high or n) and (family.text_only or n))


def labelled(ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Labels on about half of the real tokens, as answers of several turns have them."""
    labels = ids.clone()
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    labels[(ids == PAD) | ~chosen] = IGNORED
    return labels


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_are_those_of_transformers(name):
    family = ALL[name]
    model, config = family.build()
    inputs = family.batch(rows_for(family), config=config)
    labels = labelled(inputs["input_ids"])

    model(**inputs, labels=labels).loss.backward()
    expected_loss = model(**inputs, labels=labels).loss.item()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = token_losses(model, inputs, labels).mean()
    ours.backward()

    assert ours.item() == pytest.approx(expected_loss, abs=1e-5)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) <= 1e-5 * max(1, scale), key
