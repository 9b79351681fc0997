"""The loss and its gradient are Transformers' own, on fewer positions of the language head."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, PAD, VARIANTS

from tarsia.core.errors import TrainingError
from tarsia.data import Batch
from tarsia.train.step import IGNORED, backward, only_predicting, token_losses

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


@pytest.fixture(scope="module")
def llava():
    model, _ = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].batch((0, 1, 2))
    return model, inputs, labelled(inputs["input_ids"])


def batch(inputs, labels, sources=("a", "b", "a")) -> Batch:
    return Batch(inputs, labels, (0, 1, 2), sources, (3, 4, 5))


def test_only_positions_that_predict_a_label_go_through_the_head(llava):
    model, inputs, labels = llava
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(args[0].shape))
    losses = token_losses(model, inputs, labels)
    handle.remove()
    count = int((labels[:, 1:] != IGNORED).sum())
    assert seen == [(1, count, 32)]
    assert count < labels.numel() / 2
    assert losses.shape == (count,)
    assert losses.dtype == torch.float32


def test_each_loss_belongs_to_its_row(llava):
    model, inputs, labels = llava
    all_rows = token_losses(model, inputs, labels)
    owners = (labels[:, 1:] != IGNORED).nonzero()[:, 0]
    for row in range(3):
        alone = labels.clone()
        alone[torch.arange(3) != row] = IGNORED
        torch.testing.assert_close(token_losses(model, inputs, alone), all_rows[owners == row])


@pytest.mark.parametrize("fails", [False, True])
def test_the_head_is_as_it_was_afterwards(llava, fails):
    model, inputs, labels = llava
    before = model(**inputs).logits
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), only_predicting(model, labels):
        model(**inputs)
        _ = 1 / (not fails)
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(model(**inputs).logits, before)


def test_a_head_that_is_not_called_or_sees_something_else(llava):
    model, inputs, labels = llava
    with pytest.raises(TrainingError, match="exactly once"), only_predicting(model, labels):
        pass
    with pytest.raises(TrainingError, match="one position for each label"), only_predicting(model, labels):
        model(**inputs, logits_to_keep=1)
    with pytest.raises(TrainingError, match="no language head"), only_predicting(torch.nn.Linear(1, 1), labels):
        pass


def test_micro_batches_weigh_by_their_tokens(llava):
    """Rows 0 and 1, then row 2, give the gradient of all three; a micro-batch without labels adds nothing."""
    model, inputs, labels = llava
    expected = token_losses(model, inputs, labels)
    expected.mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = []
    for rows in ((0, 1), (2,), ()):
        chosen = torch.full_like(labels, IGNORED)
        chosen[list(rows)] = labels[list(rows)]
        parts.append(batch(inputs, chosen))
    losses = backward(model, parts, 1)
    assert losses.loss == pytest.approx(expected.mean().item(), abs=1e-5)
    assert losses.rows == {"a": 6, "b": 3}
    owners = (labels[:, 1:] != IGNORED).nonzero()[:, 0]
    assert losses.means["b"] == pytest.approx(expected[owners == 1].mean().item(), abs=1e-5)
    assert losses.tokens == {"a": int((owners != 1).sum()), "b": int((owners == 1).sum())}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    model.zero_grad()


def test_a_step_without_labels_is_refused(llava):
    model, inputs, labels = llava
    with pytest.raises(TrainingError, match="Step 7 has no labelled token") as caught:
        backward(model, [batch(inputs, torch.full_like(labels, IGNORED))], 7)
    assert "row 4 of b" in caught.value.given
