"""The rows of the probe at a run's end: as many as a micro-batch, and more only where those show no effect."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tarsia.adapter.proof import Unmoved
from tarsia.core.errors import AdapterError
from tarsia.train import loop


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Something like a run whose rows 3, 5, 6, 8 and 9 have pictures."""
    mixture = {n: SimpleNamespace(pictures=(1,) if n in (3, 5, 6, 8, 9) else ()) for n in range(64)}
    monkeypatch.setattr(loop, "relieved", lambda run, what, *_: what())
    return SimpleNamespace(
        mixture=mixture,
        recipe=SimpleNamespace(batch=2),
        model=torch.nn.Identity(),
        device=torch.device("cpu"),
        features=None,
        host=None,
        encode=lambda numbers: SimpleNamespace(inputs=list(numbers)),
    )


def _tried(monkeypatch: pytest.MonkeyPatch, run: Any, *refusals: AdapterError) -> list[list[int]]:
    tried: list[list[int]] = []
    left = list(refusals)

    def probe(host: Any, inputs: list[int]) -> str:
        tried.append(inputs)
        if left:
            raise left.pop(0)
        return "probe"

    monkeypatch.setattr(loop, "probe", probe)
    try:
        loop.final_probe(run)
    except AdapterError:
        tried.append([])
    return tried


def test_as_many_as_a_micro_batch_those_with_pictures_first(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    assert _tried(monkeypatch, run) == [[3, 5]]
    run.recipe.batch = 16
    assert _tried(monkeypatch, run) == [[3, 5, 6, 8]]


def test_more_where_those_show_no_effect(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    assert _tried(monkeypatch, run, Unmoved("nothing")) == [[3, 5], [3, 5, 6, 8]]
    assert _tried(monkeypatch, run, Unmoved("nothing"), Unmoved("nothing")) == [[3, 5], [3, 5, 6, 8], []]


def test_any_other_refusal_is_told(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    assert _tried(monkeypatch, run, AdapterError("no numbers")) == [[3, 5], []]
