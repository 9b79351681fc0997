"""A run on every family: all three components are trained, no live patch is without gradient, recomputing is exact."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, PAD
from train import small

from tarsia.adapter import Host
from tarsia.data import IGNORED, Batch
from tarsia.train import run as run_module

PARTS = [
    {"method": "full", "select": "projector", "lr": 1e-3},
    {"method": "lora", "select": "vision", "lr": 1e-2, "rank": 2},
    {"method": "lora", "select": "language", "lr": 1e-2, "rank": 2},
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return small.rows(tmp_path_factory.mktemp("families") / "rows.jsonl", 8, (1,))


def encoder(family, config):
    """In place of a processor: the family's own inputs, one picture a row, the last tokens labelled."""

    class Made:
        closes = True

        def __init__(self, processor, max_length, variables, resolution):
            assert max_length is None and not variables and resolution is None

        def batch(self, samples):
            inputs = family.batch((1,) * len(samples), seed=samples[0].row, config=config)
            labels = torch.full_like(inputs["input_ids"], IGNORED)
            labels[:, -4:] = inputs["input_ids"][:, -4:]
            labels[inputs["input_ids"] == PAD] = IGNORED
            names = tuple(sample.source for sample in samples)
            return Batch(inputs, labels, (1,) * len(samples), names, tuple(sample.row for sample in samples))

    return Made


QUICK = ("llava", "qwen2_5_vl", "idefics3", "gemma3", "mllama")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_a_run_on_every_family(name, rows, tmp_path, monkeypatch):
    family = FAMILIES[name]
    curves = []
    for checkpointing in (False, True):
        model, config = family.build()
        monkeypatch.setattr(run_module, "Encoder", encoder(family, config))
        values = {"model": name, "parts": PARTS, "data": {"train": [{"path": str(rows)}]}, "steps": 5, "batch": 2}
        values |= {"warmup": 0, "checkpointing": checkpointing, "device": "cpu", "threads": 1}
        values |= {"out": str(tmp_path / f"out-{checkpointing}")}
        events = small.run(values, host=Host.of(model))
        assert {line.component for line in events[0].coverage} == {"vision", "projector", "language"}
        curves.append(small.curve(events))
    for plain, recomputed in zip(*curves, strict=True):
        assert plain.loss == pytest.approx(recomputed.loss, abs=1e-4)
        assert plain.grad_norm == pytest.approx(recomputed.grad_norm, rel=1e-3)
