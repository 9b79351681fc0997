"""Pictures that are nearly the same: the search is exact, edited copies are found, others are not."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from data.lint_worlds import png
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageEnhance

from tarsia.data.lint import near

BITS = st.integers(0, 2**64 - 1)


def brute(hashes: np.ndarray, distance: int) -> list[list[int]]:
    n = len(hashes)
    return [[i, j] for i in range(n) for j in range(i + 1, n) if int(hashes[i] ^ hashes[j]).bit_count() <= distance]


@st.composite
def families(draw: st.DrawFn) -> np.ndarray:
    """Different hashes, many of them a few flipped bits from another."""
    found = set(draw(st.lists(BITS, min_size=1, max_size=6)))
    for seed in draw(st.lists(st.tuples(BITS, st.sets(st.integers(0, 63), min_size=1, max_size=9)), max_size=20)):
        start = sorted(found)[seed[0] % len(found)]
        found.add(start ^ sum(1 << bit for bit in seed[1]))
    return np.array(draw(st.permutations(sorted(found))), dtype=np.uint64)


@settings(max_examples=150, deadline=None)
@given(families(), st.integers(0, 9))
def test_close_hashes_are_those_of_brute_force(hashes: np.ndarray, distance: int) -> None:
    assert near.close(hashes, distance).tolist() == brute(hashes, distance)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), arrays.arrays(np.uint8, (4, 768)), st.integers(0, 63))
def test_near_pairs_are_those_of_brute_force(kinds: list[int], shown: np.ndarray, flip: int) -> None:
    hashes = (
        np.array([5, 5 ^ (1 << flip), 5 ^ 0xFFFF0000, 9], dtype=np.uint64)[kinds] if kinds else np.array([], np.uint64)
    )
    thumbnails = shown[kinds]
    expected = [
        [i, j]
        for i in range(len(kinds))
        for j in range(i + 1, len(kinds))
        if int(hashes[i] ^ hashes[j]).bit_count() <= near.DISTANCE
        and near.alike(thumbnails[i : i + 1], thumbnails[j : j + 1])[0] >= near.LIKENESS
    ]
    assert near.near(hashes, thumbnails).tolist() == expected


def test_many_of_one_hash_are_compared_with_a_few() -> None:
    thumbnails = np.tile(np.arange(768, dtype=np.uint8), (300, 1))
    pairs = near.near(np.zeros(300, np.uint64), thumbnails)
    assert set(pairs[:, 1].tolist()) == set(range(1, 300))  # every one is found to be like an earlier one
    assert len(pairs) < 64 * 300


def jpeg(picture: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(png(picture, "JPEG", quality=75)))


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-encoded": jpeg,
    "smaller": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.BICUBIC),
    "larger": lambda p: p.resize((p.width * 2, p.height * 2), Image.Resampling.LANCZOS),
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.08),
    "darker": lambda p: ImageEnhance.Brightness(p).enhance(0.85),
    "more contrast": lambda p: ImageEnhance.Contrast(p).enhance(1.15),
    "twice": lambda p: jpeg(p.resize((p.width * 7 // 8, p.height * 7 // 8), Image.Resampling.BILINEAR)),
}


def scene(seed: int, side: int = 64) -> Image.Image:
    """Coarse shapes with finer ones on them, as photographs are; nothing is clipped."""
    rng, whole = np.random.default_rng(seed), np.full((side, side, 3), 128.0)
    for cells, amount in ((3, 60), (6, 40), (12, 25), (24, 15)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        shapes = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
        whole += (shapes - 128) * amount / 128
    return Image.fromarray(np.clip(whole, 0, 255).astype(np.uint8))


def found(pictures: Sequence[Image.Image]) -> list[list[int]]:
    hashes = np.array([near.phash(p) for p in pictures], dtype=np.uint64)
    return near.near(hashes, np.stack([near.thumbnail(p) for p in pictures])).tolist()


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_are_found_and_nothing_else(edit: str) -> None:
    originals = [scene(i) for i in range(30)]
    assert found([*originals, *map(EDITS[edit], originals)]) == [[i, 30 + i] for i in range(30)]


def test_neither_hash_nor_thumbnail_alone_is_enough() -> None:
    """The hash knows no colours, and the thumbnail no fine shapes: each alone would call one of these alike."""
    grey = scene(3).convert("L")
    tinted = Image.merge("RGB", [grey.point(lambda v: v // 3), grey, grey.point(lambda v: 255 - v // 8)])
    distance = (near.phash(grey.convert("RGB")) ^ near.phash(tinted)).bit_count()
    assert distance <= near.DISTANCE and found([grey.convert("RGB"), tinted]) == []
    ramp = np.tile(np.linspace(0, 255, 64), (64, 1))
    stripes = ramp + 6 * np.sin(np.arange(64) / 2)[:, None]
    one, other = (Image.fromarray(np.clip(a, 0, 255).astype(np.uint8)).convert("RGB") for a in (ramp, stripes))
    assert near.alike(near.thumbnail(one)[None], near.thumbnail(other)[None])[0] >= near.LIKENESS
    assert found([one, other]) == []


DATA = Path(os.environ.get("TARSIA_DATA", "no-such-folder"))


@pytest.mark.skipif(not (DATA / "cifar10-test.parquet").is_file(), reason="needs photographs in TARSIA_DATA")
def test_real_photographs() -> None:
    rows = pq.read_table(DATA / "cifar10-test.parquet", columns=["image"]).slice(0, 1300).to_pylist()
    shots = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    assert found(shots) == [[221, 1272]]  # one plane, brighter: a copy that the data set really has
    for edit in EDITS.keys() - {"twice"}:  # JPEG of pictures this small leaves too little
        assert found([*shots[:100], *map(EDITS[edit], shots[:100])]) == [[i, 100 + i] for i in range(100)], edit


def test_many_of_one_hash_are_compared_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 of 100,000 frames of one scene beside all of them would else be 80 GB of thumbnails."""
    rows: list[int] = []
    plain = near.alike
    monkeypatch.setattr(near, "alike", lambda a, b: (rows.append(len(a)), plain(a, b))[1])
    near.near(np.zeros(300, np.uint64), np.tile(np.arange(768).astype(np.uint8), (300, 1)))
    assert sum(rows) == 64 * 299 and max(rows) <= 4096
