"""A run writes into its adapter's card what a router chooses it by; where it can not, it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train import small

from tarsia.adapter import load, open_base
from tarsia.adapter.prototypes import Look
from tarsia.adapter.signature import picture_inputs, signature, view
from tarsia.core.errors import AdapterError
from tarsia.data import Source, read
from tarsia.serve.route import CARD, Router
from tarsia.train.events import Notice
from tarsia.train.recipe import Recipe


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """The small world's recipe, with one source of twenty rows of a picture each."""
    folder = tmp_path_factory.mktemp("routed")
    values = small.world(folder)
    path = small.rows(folder / "seen.jsonl", 20, pictures=(1,))
    source = {**values["data"]["train"][0], "path": str(path), "name": "seen"}
    return values | {"data": {"train": [source]}, "steps": 8, "out": str(folder / "out")}


def card_of(values):
    return load(Path(values["out"]) / "adapter").card


@pytest.fixture(scope="module")
def run(values):
    return small.run(values)


def test_the_card_says_what_the_pictures_look_like(run, values):
    assert not [event for event in run if isinstance(event, Notice) and "chosen" in event.what]
    look = Look.read(card_of(values)[CARD])
    host = open_base(values["model"])
    assert look.view == view(host)
    rows = read(Source(**{key: values["data"]["train"][0][key] for key in ("path", "name")}))
    shown = torch.stack([signature(host, picture_inputs(host, row.pictures[0])) for row in rows])
    kept = torch.cdist(look.apart, shown).min(1).values
    assert float(kept.max()) < 0.05 * float(shown.std())  # the bare base's, of these very pictures
    assert look.pictures <= 20


def test_a_router_takes_the_card_and_chooses_the_adapter(run, values):
    host = open_base(values["model"])
    router = Router(view(host), strange=0.0)
    router.add("seen@1", card_of(values))
    row = read(Source(path=values["data"]["train"][0]["path"], name="seen"))[0]
    assert router.choose([signature(host, picture_inputs(host, row.pictures[0]))]).name == "seen@1"


@pytest.mark.parametrize("most,why", [(0, "routing: 0"), (3, "3 pictures")])
def test_without_enough_pictures_the_card_and_the_run_say_why(values, tmp_path, most, why):
    changed = values | {"routing": most, "steps": 2, "warmup": 0, "out": str(tmp_path / "out")}
    events = small.run(changed)
    said = [event.what for event in events if isinstance(event, Notice) and "can not be chosen" in event.what]
    assert bool(said) is bool(most)  # who asked for none need not be told
    assert why in card_of(changed)[CARD]["none"]
    with pytest.raises(AdapterError, match=r"seen@1(.|\n)*" + why):
        Router(view(open_base(values["model"]))).add("seen@1", card_of(changed))


def test_how_many_pictures_changes_no_run(values):
    assert Recipe.of(values).hash == Recipe.of(values | {"routing": 0}).hash
