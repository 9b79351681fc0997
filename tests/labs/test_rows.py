"""The rows of the experiments: belts, the base's world and blood smears, each against a count of its own."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from base.photos import photographs, png
from base.test_texts import answer as seen
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tarsia.base import pictures, texts
from tarsia.data import Source, read
from tarsia.labs import belt as belts
from tarsia.labs import smears, sources

SPLITS = ("train", "held-out")


def questions(kind, count, split):
    return [question for question, _, _ in sources.WORLD[kind](count, split)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 20_000_000))
def test_a_belt_is_a_function_of_its_number(seed):
    (first, item), (again, same), (other, _) = belts.belt(seed), belts.belt(seed), belts.belt(seed + 1)
    assert first.size == (64, 64) and first.mode == "RGB"
    assert first.tobytes() == again.tobytes() and item == same
    assert first.tobytes() != other.tobytes()
    assert item.bin == belts.BINS[item.material]


def test_materials_are_told_apart_by_eye():
    """Neighbours in plain pixels and colours know the material far better than chance: labels belong to pictures."""

    def rows(seeds):
        drawn = [belts.belt(seed) for seed in seeds]
        pixels = np.stack([np.asarray(p, float)[14:50, 14:50].reshape(-1, 3) for p, _ in drawn])
        features = [np.sort(pixels, axis=1)[:, ::18].reshape(len(drawn), -1), 3 * pixels.std(1)]
        return np.concatenate(features, 1), [item.material for _, item in drawn]

    (known, labels), (asked, values) = rows(range(300)), rows(range(10**7, 10**7 + 60))
    nearest = ((asked[:, None] - known) ** 2).sum(-1).argmin(1)
    right = np.mean([labels[n] == value for n, value in zip(nearest, values, strict=True)])
    assert set(values) == set(belts.BINS)
    assert right > 0.6, "chance is 0.2"


def test_each_material_has_a_bin_of_its_own():
    assert len(set(belts.BINS.values())) == len(belts.BINS)


def test_rows_of_belts_say_what_is_drawn():
    for (question, said, (shown,)), (asked, where, (again,)) in zip(
        sources.materials(6, "train"), sources.bins(6, "train"), strict=True
    ):
        assert (question, asked) == ("What material is on the belt?", "Which bin does it go in?")
        assert where == belts.BINS[said]
        assert shown.tobytes() == again.tobytes()


@pytest.mark.parametrize(
    "module, name, kind", [(sources, "belt", sources.materials), (sources, "belt", sources.bins),
                           (pictures, "scene", sources.scenes), (pictures, "digit", sources.digits)]
)  # fmt: skip
def test_pictures_are_of_one_split(monkeypatch, module, name, kind):
    drawn = []
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda number: drawn.append(number) or real(number))
    numbers = {}
    for split in SPLITS:
        assert len(list(kind(30, split))) == 30
        numbers[split] = set(drawn)
        drawn.clear()
    assert len(numbers["train"]) == len(numbers["held-out"]) == 30
    assert not numbers["train"] & numbers["held-out"]
    if name != "digit":
        assert min(numbers["held-out"]) >= 10_000_000, "the base was trained on lower ones"


def test_digits_end_with_their_split():
    assert [len(list(sources.digits(9999, split))) for split in SPLITS] == [1497, 300]


@pytest.mark.parametrize("kind", ["words", "refusals", "talk"])
def test_texts_are_of_one_split(kind):
    train, held = (set(questions(kind, 200, split)) for split in SPLITS)
    assert train and held and not train & held
    assert not any(map(texts.held_out, train)) and all(map(texts.held_out, held))


def test_scenes_are_answered_rightly_in_words(monkeypatch):
    drawn = []
    real = pictures.scene
    monkeypatch.setattr(pictures, "scene", lambda number: drawn.append(real(number)) or drawn[-1])
    for question, said, (shown,) in sources.scenes(80, "held-out"):
        picture, things = drawn[-1]
        assert shown is picture
        assert said == seen(question, list(things)), question


def test_refusals_are_refused_and_talk_is_not():
    assert {said for _, said, _ in sources.WORLD["refusals"](50, "train")} == {texts.REFUSAL}
    assert texts.REFUSAL not in {said for _, said, _ in sources.WORLD["talk"](50, "train")}


@pytest.mark.parametrize("kind", [*sources.WORLD.values(), sources.materials, sources.bins])
def test_rows_are_the_same_whenever_they_are_drawn(kind):
    first, again = (list(kind(5, "held-out")) for _ in range(2))
    assert [(q, a, [p.tobytes() for p in shown]) for q, a, shown in first] == [
        (q, a, [p.tobytes() for p in shown]) for q, a, shown in again
    ]


def test_rows_come_back_from_their_file(tmp_path):
    rows = [*sources.bins(2, "train"), *sources.WORLD["words"](2, "train")]
    two = tuple(itertools.chain.from_iterable(shown for _, _, shown in rows))
    rows.append(("What is in the two pictures?", "a bin and ünïcode", two))
    path = tmp_path / "new" / "rows.parquet"
    assert sources.write(path, rows) == 5
    assert [file.name for file in path.parent.iterdir()] == ["rows.parquet"]
    back = read(Source(path=str(path), name="rows"))
    assert len(back) == 5
    for (question, said, shown), sample in zip(rows, back, strict=True):
        assert [message.role for message in sample.messages] == ["user", "assistant"]
        assert sample.messages[0].text.strip() == question
        assert sample.messages[1].text == said
        assert [picture.load().tobytes() for picture in sample.pictures] == [p.tobytes() for p in shown]


def test_a_write_that_fails_leaves_the_last_file(tmp_path):
    path = tmp_path / "rows.parquet"
    sources.write(path, sources.WORLD["talk"](2, "train"))
    before = path.read_bytes()

    def broken():
        yield from sources.WORLD["talk"](1, "train")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        sources.write(path, broken())
    assert path.read_bytes() == before


SHADES = {"RBC": (200, 60, 60), "WBC": (90, 60, 160), "Platelets": (40, 200, 40)}
"""Cells are drawn in these colours on white, and lie far from each other, so that pixels tell how many there are."""


@pytest.fixture(scope="module")
def smear(tmp_path_factory):
    """Three smears of 480 x 360 with cells of 16 x 12 pixels on a grid."""
    rng, rows = random.Random(0), []
    for _ in range(3):
        picture = Image.new("RGB", (480, 360), "white")
        draw, boxes = ImageDraw.Draw(picture), []
        for x, y in rng.sample(list(itertools.product(range(8, 460, 60), range(8, 340, 60))), 28):
            label = rng.choices(tuple(SHADES), (6, 1, 1))[0]
            draw.rectangle((x, y, x + 15, y + 11), fill=SHADES[label])
            boxes.append({"label": label, "xmin": x, "ymin": y, "xmax": x + 16, "ymax": y + 12})
        rows.append({"image": {"bytes": png(picture)}, "boxes": boxes})
    path = tmp_path_factory.mktemp("smears") / "smears.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path, [box["label"] for row in rows for box in row["boxes"]]


def like(shown, label):
    return np.abs(np.asarray(shown, int) - SHADES[label]).max(-1) < 30


def test_a_cell_is_shown_under_its_name(smear):
    path, labels = smear
    rows = list(smears.cells(path, 9))
    names = [said for _, said, _ in rows]
    for label, name in smears.CELLS.items():
        assert names.count(name) == min(9, labels.count(label)) > 0
    for question, said, (shown,) in rows:
        (label,) = [label for label, name in smears.CELLS.items() if name == said]
        assert question == "What cell is this?" and shown.size == (64, 64)
        at = like(shown, label)
        assert at[32, 32] and 0.35 < at.mean() < 0.6, "the crop is 1.3 times the longer side, in the middle"
    assert [(a, p[0].tobytes()) for _, a, p in smears.cells(path, 9)] == [(a, p[0].tobytes()) for _, a, p in rows]
    assert [a for _, a, _ in smears.cells(path, 9, seed=1)] != names


def test_cells_are_counted_as_pixels_count_them(smear, monkeypatch):
    """Middles in a window by brute force: the colour of the smear there, seen in the very window that is shown."""
    windows = []
    real = Image.Image.crop

    def crop(self, box=None):
        windows.append(np.asarray(real(self, box)))
        return real(self, box)

    monkeypatch.setattr(Image.Image, "crop", crop)
    rows = 0
    for question, said, (shown,) in smears.counts(smear[0], 12):
        red = like(windows[-1], "RBC")
        assert red.shape == (220, 220) and shown.size == (64, 64)
        corners, found = red.copy(), 0
        corners[1:, 1:] = red[1:, 1:] & ~red[:-1, 1:] & ~red[1:, :-1]
        corners[0, 1:], corners[1:, 0] = red[0, 1:] & ~red[0, :-1], red[1:, 0] & ~red[:-1, 0]
        for y, x in np.argwhere(corners):
            tall, wide = 0, 0
            while y + tall < 220 and red[y + tall, x]:
                tall += 1
            while x + wide < 220 and red[y, x + wide]:
                wide += 1
            found += inside(y, tall, 12) and inside(x, wide, 16)
        assert (question, said) == ("How many red blood cells are there?", pictures.NUMBERS[found])
        rows += 1
    assert rows >= 20


def inside(start, length, whole):
    """Whether the middle of a side of ``whole`` pixels, seen from ``start`` on for ``length``, is in the window."""
    first = start if start > 0 else length - whole
    return 0 <= first + whole / 2 < 220


def test_photographs_are_drawn_by_class(tmp_path):
    path = photographs(tmp_path / "p.parquet", 40)
    rows = list(smears.photographs(path, 15))
    assert len(rows) == 15 and len({said for _, said, _ in rows}) > 4
    dogs = list(smears.photographs(path, 99, only="dog"))
    assert [said for _, said, _ in dogs] == ["a dog"] * 4
    shots, _ = pictures.photographs(path)
    assert {shown.tobytes() for _, _, (shown,) in dogs} <= {shot.tobytes() for shot in shots[5::10]}
