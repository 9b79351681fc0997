"""Grouped and packed batches: the same rows in the same steps, the same curve, less padding."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, PAD
from train import small
from transformers import masking_utils

from tarsia.adapter import Host, open_base
from tarsia.core.errors import AnatomyError, ConfigError, TrainingError
from tarsia.data import IGNORED, Batch
from tarsia.train import run as run_module
from tarsia.train.events import Step, read_log
from tarsia.train.exact import threads
from tarsia.train.loop import fit
from tarsia.train.run import prepare


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Uneven rows of two sources, without dropout, whose draws would differ with the layout."""
    folder = tmp_path_factory.mktemp("batching")
    values = small.world(folder)
    for name, lengths in (("task", (1, 150, 3, 30)), ("talk", (2, 200, 9))):
        path = folder / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for i, line in enumerate(lines):
            line["question"] += " red" * lengths[i % len(lengths)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values["parts"][2]["dropout"] = 0.0
    values["data"]["mix"] = "weighted"
    return values | {"batch": 3, "accumulate": 3, "steps": 4}


def at(values, tmp_path: Path, batching: str, **changes):
    return values | {"batching": batching, "out": str(tmp_path / batching)} | changes


def micro_batches(values, steps: int = 4) -> list[tuple[Batch, ...]]:
    """The batches of a run's first steps, without training."""
    host = open_base(values["model"])
    with threads(1) as count:
        run = prepare(small.recipe(values), host, count)
        found = []
        for step in range(steps):
            run.step = step
            found.append(run.batches())
    return found


def rows_of(batches) -> list[tuple[str, int]]:
    return sorted(pair for batch in batches for pair in zip(batch.sources, batch.rows, strict=True))


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_the_same_rows_in_every_step_and_fewer_positions(values, tmp_path, batching):
    plain, other = (micro_batches(at(values, tmp_path, name)) for name in ("plain", batching))
    positions = [sum(batch.labels.numel() for batches in run for batch in batches) for run in (plain, other)]
    assert positions[1] < 0.85 * positions[0]
    for a, b in zip(plain, other, strict=True):
        assert rows_of(a) == rows_of(b)
        assert [len(batch.rows) for batch in a] == [len(batch.rows) for batch in b]
        longest = [max(batch.labels.shape[1] for batch in batches) for batches in (a, b)]
        assert longest[0] == longest[1]


def test_a_step_has_its_own_rows_of_the_stream(values, tmp_path):
    host = open_base(values["model"])
    with threads(1) as count:
        run = prepare(small.recipe(at(values, tmp_path, "plain")), host, count)
    run.step = 2
    assert run.dealt() == ((18, 19, 20), (21, 22, 23), (24, 25, 26))
    assert rows_of(run.batches()) == sorted((s.source, s.row) for s in (run.mixture[n] for n in range(18, 27)))


def test_grouped_micro_batches_hold_rows_of_like_length(values, tmp_path):
    for batches in micro_batches(at(values, tmp_path, "grouped")):
        lengths = [sorted(batch.inputs["attention_mask"].sum(1).tolist()) for batch in batches]
        assert all(a[-1] <= b[0] for a, b in itertools.pairwise(lengths))


@pytest.mark.parametrize("mix", ["sampled", "weighted"])
def test_the_curve_is_the_same_curve(values, tmp_path, mix):
    values = values | {"data": values["data"] | {"mix": mix}}
    curves = [small.curve(small.run(at(values, tmp_path, name))) for name in ("plain", "grouped", "packed")]
    for plain, *others in zip(*curves, strict=True):
        for step in others:
            assert step.loss == pytest.approx(plain.loss, rel=1e-4)
            assert step.grad_norm == pytest.approx(plain.grad_norm, rel=1e-3)
            assert step.losses == pytest.approx(plain.losses, rel=1e-3)
            assert step.rows == plain.rows
            assert step.tokens_by_source == plain.tokens_by_source


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_an_interrupted_run_goes_on_to_the_same_bits(values, tmp_path, batching):
    whole, parts = (at(values, tmp_path / name, batching, save_every=1) for name in ("whole", "parts"))
    small.run(whole)
    small.until(fit(small.recipe(parts)), 2)
    small.run(parts)
    logs = [list(read_log(Path(values["out"]) / "events.jsonl")) for values in (whole, parts)]
    curves = [[event for event in log if event["event"] == "step"] for log in logs]
    for event in (*curves[0], *curves[1]):
        del event["tokens_per_second"]
    assert curves[0] == curves[1]


def test_rows_that_see_each_other_stop_the_run(values, tmp_path, monkeypatch):
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(TrainingError, match="not computed as each is alone") as caught:
        small.run(at(values, tmp_path, "packed"))
    assert "row " in caught.value.given
    assert "grouped" in caught.value.do
    small.run(at(values, tmp_path, "grouped", steps=3))


def test_what_gains_nothing_is_refused(values, tmp_path):
    with pytest.raises(ConfigError, match="nothing to group"):
        small.recipe(at(values, tmp_path, "grouped", accumulate=1))
    with pytest.raises(ConfigError, match="nothing to pack"):
        small.recipe(at(values, tmp_path, "packed", batch=1))
    with pytest.raises(ConfigError, match="'batching'"):
        small.recipe(at(values, tmp_path, "pakced"))


def test_a_family_whose_rows_can_not_be_packed_is_refused_before_the_first_step(values, tmp_path):
    model, _ = FAMILIES["gemma3"].build()
    host = Host.of(model)
    with pytest.raises(AnatomyError, match="gemma3 can not be packed"):
        small.run(at(values, tmp_path, "packed"), host=host)


def by_row(family, config):
    """In place of a processor: one picture in each second pair of rows, the last tokens labelled."""

    class Made:
        closes = True

        def __init__(self, processor, max_length, variables, resolution):
            pass

        def batch(self, samples):
            most = min(1, family.max_pictures or 1)
            pictures = tuple(most if (sample.row // 2) % 2 else family.min_pictures for sample in samples)
            inputs = family.batch(pictures, seed=samples[0].row, config=config)
            labels = torch.full_like(inputs["input_ids"], IGNORED)
            labels[:, -5:] = inputs["input_ids"][:, -5:]
            labels[inputs["input_ids"] == PAD] = IGNORED
            names = tuple(sample.source for sample in samples)
            return Batch(inputs, labels, pictures, names, tuple(sample.row for sample in samples))

    return Made


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_without_a_picture_beside_rows_with_one(name, tmp_path, monkeypatch):
    """Micro-batches with pictures, without any, and with both: each family trains, every patch has a gradient."""
    family = FAMILIES[name]
    model, config = family.build()
    monkeypatch.setattr(run_module, "Encoder", by_row(family, config))
    monkeypatch.setattr(run_module.Run, "dealt", lambda run: orders[run.step % 2])
    orders = [((0, 1), (2, 3), (1, 2)), ((4, 5), (6, 4), (7, 0))]
    values = {
        "model": name,
        "parts": [{"method": "lora", "select": select, "lr": 1e-2, "rank": 2} for select in ("language", "vision")],
        "data": {"train": [{"path": str(small.rows(tmp_path / "rows.jsonl", 8, (0, 0, 1, 1)))}]},
        "steps": 6, "batch": 2, "accumulate": 3, "warmup": 0, "device": "cpu", "threads": 1,
        "out": str(tmp_path / "out"),
    }  # fmt: skip
    monkeypatch.setattr(run_module.Mixture, "row", lambda mixture, n: (0, n % 8))
    if not family.text_only:
        with pytest.raises(TrainingError, match="can not be called on rows of which none has a picture") as caught:
            small.run(values, host=Host.of(model))
        assert "row 0 of rows" in caught.value.given
        assert "pixel_values" in caught.value.given
        orders = [((0, 2), (2, 3), (1, 2)), ((4, 6), (6, 4), (7, 0))]
    events = small.run(values, host=Host.of(model))
    assert len([event for event in events if isinstance(event, Step)]) == 6


@pytest.mark.slow
def test_packed_with_recomputed_activations_and_kept_features(values, tmp_path):
    """The other ways to spend less, together with packing: still the plain curve."""
    language = [part for part in values["parts"] if part["select"].startswith("language")]
    plain = small.curve(small.run(at(values, tmp_path, "plain", parts=language, steps=3)))
    both = at(values, tmp_path, "packed", parts=language, steps=3, checkpointing=True)
    both |= {"features": {"path": str(tmp_path / "features")}}
    events = small.run(both)
    for step, expected in zip(small.curve(events), plain, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=1e-4)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
    assert events[-1].adapter.card["features"]["computed"] > 0
