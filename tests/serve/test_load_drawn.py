"""Adapters that are drawn for a load: each its own, proved as a trained one is, and made once."""

from __future__ import annotations

import pytest
import torch

from tarsia.adapter import load, open_base, prove, put, save
from tarsia.core.attach import Part, detach, patches, slots
from tarsia.core.errors import AdapterError, LibraryError
from tarsia.core.method import find
from tarsia.library import Library
from tarsia.library.opening import open_adapter
from tarsia.serve.load import drawn, inside

LORA = (Part("lora", "language.*.{q,v}; vision.*.{q,v}", find("lora").configure({"rank": 2, "alpha": 4.0})),)


@pytest.fixture(scope="module")
def drawer():
    host = open_base("mini-1", dtype="float32", device="cpu")
    written, pictures = inside.shown(host, inside.Text("What is shown?", 0))
    return drawn.Drawer(host, host.processor(text=[written], images=pictures, return_tensors="pt"))


def test_a_drawn_adapter_is_proved_as_a_trained_one_is(drawer, tmp_path) -> None:
    save(drawer.draw(drawn.Make(LORA, 0.1), 3), tmp_path / "it")
    adapter, host = load(tmp_path / "it"), drawer.host
    put(host, adapter, "it")
    try:
        assert prove(host, "it", adapter.probe) < 1e-5
        with torch.no_grad():
            next(iter(patches(host.model, "it").values())).B.mul_(1.5)
        with pytest.raises(AdapterError, match="not those of the day"):
            prove(host, "it", adapter.probe)
    finally:
        detach(host.model, "it")


def test_what_is_recorded_is_what_a_probe_of_the_model_records(drawer) -> None:
    from tarsia.adapter import probe

    host, make = drawer.host, drawn.Make(LORA, 0.1)
    mine = drawer.draw(make, 5)
    put(host, mine, "it")
    theirs = probe(host, drawer.inputs)
    detach(host.model, "it")
    assert torch.equal(mine.probe.tokens, theirs.tokens)
    assert torch.allclose(mine.probe.logits, theirs.logits, atol=1e-4)
    assert mine.probe.difference == pytest.approx(theirs.difference, abs=1e-4) and theirs.difference > 0.1
    assert mine.probe.peak == pytest.approx(theirs.peak, abs=1e-4) and mine.probe.dtype == theirs.dtype == "float32"


def test_every_number_is_another_adapter_and_the_same_again(drawer) -> None:
    first, again, other = (drawer.draw(drawn.Make(LORA, 0.1), seed).patches for seed in (1, 1, 2))
    for path, patch in first.items():
        for name, tensor in patch.tensors.items():
            assert torch.equal(tensor, again[path].tensors[name])
            assert not torch.equal(tensor, other[path].tensors[name])
    assert {path.partition(".")[0] for path in first} >= {"model"} and not list(slots(drawer.host.model))


def test_one_that_hardly_moves_the_base_is_not_made(drawer) -> None:
    with pytest.raises(AdapterError, match="hardly moves"):
        drawer.draw(drawn.Make(LORA, 1e-6), 0)
    assert not list(slots(drawer.host.model))


def test_what_is_there_is_not_made_again(drawer, tmp_path) -> None:
    library, make, shown = Library.make(tmp_path / "library"), drawn.Make(LORA, 0.1), []
    wanted = [(f"task-{i}", make, i) for i in range(2)]
    for _ in range(2):
        assert list(drawn.publish(drawer, library, wanted, lambda i, name: shown.append(name))) == ["task-0", "task-1"]
    assert shown == ["task-0", "task-1"] and len(library.search()) == 2
    assert open_adapter(library, "task-1").card["drawn"] == {"seed": 1, "by": 0.1, "trained": False}
    drawn.held(library, ["task-0"])
    with pytest.raises(LibraryError, match="lacks 1 of 2"):
        drawn.held(library, ["task-0", "task-7"])
