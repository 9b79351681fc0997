"""The four shifts: pictures that are functions of their number, splits that share no row, answers that are right."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from base.photos import photographs, png
from data.processors import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.base import pictures, texts
from tarsia.evaluate import METRICS
from tarsia.labs import belt, replay_rows, shift_blueprint, shift_commands, shift_infrared, smears, sources
from tarsia.labs.shifts import SHIFTS

SPLITS = ("train", "validation", "held-out")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 20_000_000))
@pytest.mark.parametrize("draw", [shift_infrared.infrared, shift_blueprint.blueprint])
def test_a_picture_is_a_function_of_its_number(draw, seed):
    (first, what), (again, same), (other, _) = draw(seed), draw(seed), draw(seed + 1)
    assert first.size == (64, 64) and first.mode == "RGB"
    assert first.tobytes() == again.tobytes() and what == same
    assert first.tobytes() != other.tobytes()


def nearest(draw, features, label):
    """Share of new pictures whose nearest neighbour has their label."""

    def rows(seeds):
        drawn = [draw(seed) for seed in seeds]
        return np.stack([features(np.asarray(p, float)) for p, _ in drawn]), [label(what) for _, what in drawn]

    (known, labels), (asked, values) = rows(range(160)), rows(range(10**7, 10**7 + 40))
    found = ((asked[:, None] - known) ** 2).sum(-1).argmin(1)
    return np.mean([labels[n] == value for n, value in zip(found, values, strict=True)])


def test_materials_are_told_apart_in_the_infrared():
    """By nothing but how warm the pixels are, sorted: labels belong to pictures."""
    right = nearest(
        shift_infrared.infrared, lambda p: np.sort(p.reshape(-1, 3), axis=0)[::64].ravel(), lambda item: item.material
    )
    assert right > 0.6, "chance is 0.2"


def test_an_infrared_belt_keeps_the_plants_decision():
    for (_, said, (shown,)), (_, where, (again,)) in zip(
        shift_infrared.materials(8, "train"), shift_infrared.bins(8, "train"), strict=True
    ):
        assert where == belt.BINS[said]
        assert shown.tobytes() == again.tobytes()
    assert set(shift_infrared.SURFACES) == set(belt.BINS)


def test_numbers_on_blueprints_are_told_apart():
    for dimension, window in (("width", np.s_[24:, 10:54]), ("height", np.s_[10:54, 6:46])):
        seeds = [n for n in range(480) if shift_blueprint.blueprint(n)[1].dimension == dimension]
        known, asked = seeds[:180], seeds[180:220]
        drawn = {n: shift_blueprint.blueprint(n) for n in known + asked}
        pixels = {n: np.asarray(p.convert("L"), float)[window].ravel() for n, (p, _) in drawn.items()}
        table = np.stack([pixels[n] for n in known])
        right = [
            drawn[known[int(((table - pixels[n]) ** 2).sum(1).argmin())]][1].size == drawn[n][1].size for n in asked
        ]
        assert np.mean(right) > 0.6, "chance is 0.11"


def test_a_blueprint_is_asked_for_the_dimension_that_it_has():
    asked = list(shift_blueprint.dimensions(40, "train"))
    for seed, (question, said, _) in enumerate(asked):
        _, part = shift_blueprint.blueprint(seed)
        assert question == ("How wide is the plate?" if part.dimension == "width" else "How high is the plate?")
        assert said == f"{part.size} cm"
    assert {said for _, said, _ in asked} == {f"{size} cm" for size in shift_blueprint.SIZES}


def test_a_command_picks_what_lies_there():
    """The base's own answer to "What is in the ...?" is the thing that the command names."""
    for seed, (order, command, _) in enumerate(shift_commands.commands(60, "train")):
        _, things = pictures.scene(seed + 1_000_000)
        here = next(p for p in pictures.POSITIONS if p in order)
        found = next((t for t in things if t.position == here), None)
        fields = json.loads(command)
        assert fields["pick"] == (texts.article(f"{found.colour} {found.shape}") if found else "nothing")
        assert fields.get("to") == (next(p for p in shift_commands.PLACES if f"the {p}." in order) if found else None)
        assert METRICS["fields"](command, command) == 1.0


def test_half_a_command_has_half_its_fields():
    right = json.dumps(shift_commands.order_of([pictures.Thing("star", "red", "top left")], random.Random(1))[1])
    assert METRICS["fields"](right.replace("red", "blue"), right) in (0.5, 0.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files named and laid out as those in TARSIA_DATA."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    boxes = [
        {"label": label, "xmin": 40 + 90 * i, "xmax": 80 + 90 * i, "ymin": 100, "ymax": 140}
        for i, label in enumerate(smears.CELLS)
    ]
    for k, split in enumerate(("train", "val", "test")):
        rows = [{"image": {"bytes": png(picture(shade=90 * k + 9 * i + 1).resize((320, 240)))}, "boxes": boxes}
                for i in range(3)]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"bccd-{split}.parquet")
    for split in ("train", "test"):
        photographs(tmp_path / f"cifar10-{split}.parquet", 40)
    return tmp_path


def marks(rows):
    """What a row is: its question, and its pictures' bytes where it has any."""
    return {(question if not shown else "", *(p.tobytes() for p in shown)) for question, _, shown in rows}


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shifts_splits_share_no_row(name, folder, monkeypatch):
    from tarsia.labs import shifts

    monkeypatch.setattr(shifts, "_counts", lambda split: 12)
    found = [SHIFTS[name].rows(split, folder) for split in SPLITS]
    assert len({tuple(split) for split in found}) == 1
    for source in found[0]:
        train, validation, held = (marks(split[source]) for split in found)
        assert train and validation and held
        assert not train & validation and not train & held and not validation & held


def test_what_is_replayed_is_never_measured(folder, monkeypatch):
    monkeypatch.setattr(replay_rows, "_DRAWN", 4000)
    monkeypatch.setattr(replay_rows, "MEASURED", 20)
    monkeypatch.setattr(replay_rows, "REPLAYED", dict.fromkeys(replay_rows.REPLAYED, 30))
    train, validation, held = (replay_rows.general(split, folder) for split in SPLITS)
    assert set(train) == set(validation) == set(held) == set(replay_rows.REPLAYED)
    for source in train:
        if source == "photographs":  # the forty of either file are the same drawings here
            assert not marks(validation[source]) & marks(held[source])
            continue
        a, b, c = marks(train[source]), marks(validation[source]), marks(held[source])
        assert a and b and c and not a & b and not a & c and not b & c
    assert all(texts.held_out(question) for question, _, _ in held["words"])
    assert len(held["words"]) == len(marks(held["words"])), "a question is measured once"


def test_without_data_there_are_no_photographs(monkeypatch):
    monkeypatch.setattr(replay_rows, "_DRAWN", 2000)
    assert "photographs" not in replay_rows.general("validation", None)


def test_two_processes_may_write_one_file(tmp_path, monkeypatch):
    """The name under which a file is written belongs to one writer alone."""
    import pyarrow.parquet as pq

    names = []
    real = pq.write_table
    monkeypatch.setattr(sources.pq, "write_table", lambda table, path: names.append(path) or real(table, path))
    for _ in range(2):
        sources.write(tmp_path / "rows.parquet", [("q", "a", ())])
    assert len(set(names)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]
