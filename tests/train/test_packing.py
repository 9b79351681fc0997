"""Packed rows are computed as each alone: same losses, same gradients, or the family is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import BOS, FAMILIES, FIRST_WORD, PAD, VARIANTS, VIDEO
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from tarsia.anatomy import anatomy_of
from tarsia.core.errors import AnatomyError, TrainingError
from tarsia.data import IGNORED, Batch
from tarsia.data.pack import PADDING, next_fit, pack
from tarsia.train.packing import prove
from tarsia.train.step import backward, learnt, token_losses

ALL = FAMILIES | VARIANTS
REFUSED = ("paligemma", "paligemma2", "gemma3", "gemma3-head", "mllama", "blip_2")
PACKED = [name for name in ALL if name not in REFUSED]
EXTRA = (0, 30, 3, 11, 0, 7)
PICTURES = (0, 1, 3, 0, 1, 0)


def uneven(family, config, pictures=PICTURES, extra=EXTRA, seed=0) -> Batch:
    """A padded batch whose rows have so many words more at their end, about half of all tokens labelled."""
    inputs = family.batch(pictures, seed=seed, config=config)
    generator = torch.Generator().manual_seed(seed)
    ids = [row[row != PAD] for row in inputs["input_ids"]]
    ids = [
        torch.cat([row, torch.randint(FIRST_WORD, VIDEO, (more,), generator=generator)])
        for row, more in zip(ids, extra, strict=True)
    ]
    length = max(map(len, ids))
    inputs["input_ids"] = torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=PAD) for row in ids])
    inputs["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    if family.types:
        marked = inputs[family.types]
        inputs[family.types] = torch.nn.functional.pad(marked, (0, length - marked.shape[1]))
    labels = inputs["input_ids"].clone()
    # words are labelled, and so is each row's first token, which nothing may predict
    unlabelled = torch.rand(labels.shape, generator=generator) < 0.5
    unlabelled[:, 0] = False
    labels[((labels < FIRST_WORD) | (labels >= VIDEO)) & (labels != BOS)] = IGNORED
    labels[unlabelled] = IGNORED
    names = tuple("ab"[row % 2] for row in range(len(pictures)))
    return Batch(inputs, labels, tuple(pictures), names, tuple(range(10, 10 + len(pictures))))


def packed(model, batch: Batch) -> Batch:
    return pack(batch, anatomy_of(model.config).positions(model, batch.inputs))


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(model, batch: Batch) -> Batch:
    """Losses and every gradient of the packed batch are those of the padded one. Returns the packed one."""
    tight = packed(model, batch)
    padded = backward(model, [batch], 1)
    expected = gradients(model)
    found_losses = backward(model, [tight], 1)
    found = gradients(model)
    assert found_losses.tokens == padded.tokens
    assert found_losses.rows == padded.rows
    assert found_losses.total == pytest.approx(padded.total, rel=1e-5)
    assert found.keys() == expected.keys()
    scale = max(float(g.norm()) for g in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1e-3 * scale), name
    return tight


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_is_padded(name, attention):
    family = ALL[name]
    model, config = family.build()
    if model.config.get_text_config()._attn_implementation != attention:
        if name == "llava-gemma2":
            pytest.skip("Transformers has no other attention for Gemma-2")
        model.set_attn_implementation(attention)
    batch = uneven(family, config)
    tight = assert_equal(model, batch)
    assert tight.labels.shape[0] < len(batch.rows)
    assert tight.labels.shape[1] <= batch.labels.shape[1]
    assert torch.allclose(
        token_losses(model, tight.inputs, tight.labels), token_losses(model, batch.inputs, batch.labels), atol=1e-5
    )
    assert learnt(tight) == learnt(batch)


@pytest.mark.parametrize("name", PACKED)
def test_rows_without_any_picture_are_packed_too(name):
    family = ALL[name]
    model, config = family.build()
    assert_equal(model, uneven(family, config, (0, 0, 0, 0), (0, 9, 2, 0)))


@pytest.mark.parametrize("name", REFUSED)
def test_families_whose_rows_would_see_each_other_are_refused(name):
    family = ALL[name]
    model, config = family.build()
    inputs = family.batch((1, 1), config=config)
    with pytest.raises(AnatomyError, match="can not be packed") as caught:
        anatomy_of(config).positions(model, inputs)
    assert len(caught.value.given) > 20
    assert "grouped" in caught.value.do


def test_an_attention_that_keeps_no_rows_apart_is_refused():
    family = FAMILIES["llava"]
    model, config = family.build()
    config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(AnatomyError, match="not kept apart") as caught:
        anatomy_of(config).positions(model, family.batch((1, 1)))
    assert caught.value.given == "flash_attention_2"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_positions_are_those_of_each_row_alone(name):
    """Rotary positions are relative, so that the losses alone would not tell a row that begins at 100."""
    family = FAMILIES[name]
    model, config = family.build()
    inputs = family.batch((0, 1, 3), config=config)
    count = anatomy_of(config).positions(model, inputs)
    along = count if count.ndim == 2 else count[0]
    for row, mask in zip(along, inputs["attention_mask"].bool(), strict=True):
        assert row[mask].tolist() == list(range(int(mask.sum())))
    if count.ndim == 3:
        assert not torch.equal(count[2], count[3]), "height and width are counted apart"
        real = inputs["attention_mask"][0].bool()
        assert (count[1:, 0, real] == along[0, real]).all(), "a row without a picture counts tokens alone"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_rows_are_packed_as_they_are(data):
    family = ALL[data.draw(st.sampled_from(["llava", "qwen2_5_vl", "smolvlm"]))]
    rows = data.draw(st.lists(st.tuples(st.sampled_from([0, 1, 3]), st.integers(0, 40)), min_size=1, max_size=6))
    pictures, extra = zip(*rows, strict=True)
    model, config = family.build()
    batch = uneven(family, config, pictures, extra, seed=data.draw(st.integers(0, 9)))
    tight = assert_equal(model, batch)
    assert tight.labels.shape[1] == batch.labels.shape[1]
    assert sorted(set(tight.owners.flatten().tolist()) - {PADDING}) == list(range(len(rows)))


def test_a_check_that_can_fail(monkeypatch):
    """Where Transformers no longer tells packed rows apart, they see each other and the comparison says so."""
    family = FAMILIES["llava"]
    model, config = family.build()
    batch = uneven(family, config)
    assert_equal(model, batch)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(AssertionError):
        assert_equal(model, batch)


def test_the_layout():
    ids = torch.tensor([[1, 8, 9, 0, 0], [1, 10, 11, 12, 13], [1, 14, 0, 0, 0], [1, 15, 16, 0, 0], [1, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    inputs, labels = {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(ids == 0, IGNORED)
    batch = Batch(inputs, labels, (0,) * 5, tuple("abcde"), (5, 6, 7, 8, 9))
    tight = pack(batch, (mask.cumsum(1) - 1).clamp(min=0))
    assert tight.inputs["input_ids"].tolist() == [
        [1, 8, 9, 0, 0],
        [1, 10, 11, 12, 13],
        [1, 14, 1, 15, 16],
        [1, 0, 0, 0, 0],
    ]
    assert tight.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert tight.owners.tolist() == [[0, 0, 0, -1, -1], [1] * 5, [2, 2, 3, 3, 3], [4, -1, -1, -1, -1]]
    i = IGNORED
    assert tight.labels.tolist() == [[i, 8, 9, i, i], [i, 10, 11, 12, 13], [i, 14, i, 15, 16], [i] * 5]
    assert "attention_mask" not in tight.inputs
    assert learnt(tight) == learnt(batch) == [0, 0, 1, 1, 1, 1, 2, 3, 3]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_lines_are_no_longer_than_the_longest_row(lengths):
    lines = next_fit(lengths)
    assert [row for line in lines for row in line] == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in line) for line in lines]
    assert max(sums) == max(lengths)
    assert all(a + lengths[line[0]] > max(lengths) for a, line in zip(sums, lines[1:], strict=False))


def test_a_base_of_double_precision_is_held_to_the_same():
    family = FAMILIES["llava"]
    model, config = family.build()
    model.double()
    batch = uneven(family, config)
    batch = replace(batch, inputs=batch.inputs | {"pixel_values": batch.inputs["pixel_values"].double()})
    prove(model, batch, packed(model, batch))


def test_errors_name_the_rows_of_a_packed_batch():
    family = FAMILIES["llava"]
    model, config = family.build()
    tight = packed(model, uneven(family, config))
    spoilt = torch.tensor(learnt(tight)) == 4

    def spoil(head, args, logits):
        return logits.masked_fill(spoilt[None, :, None], float("nan"))

    handle = model.get_output_embeddings().register_forward_hook(spoil)
    with pytest.raises(TrainingError, match="loss of step 3 is not a number") as caught:
        backward(model, [tight], 3)
    handle.remove()
    assert caught.value.given == "row 14 of a"
