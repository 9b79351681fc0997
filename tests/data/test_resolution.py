"""Smaller pictures: what is shrunk and how far, which families it saves anything in, and that labels and lint agree."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import processors
from data.processors import FAMILIES, made
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from tarsia.core.errors import ConfigError, DataError
from tarsia.data import IGNORED, PICTURE, Encoder, Message, Picture, Sample, Source, read
from tarsia.data.lint import Given, lint

SMALL = 16


def noise(width: int, height: int) -> Image.Image:
    """A picture of which no two parts are alike."""
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def row(*shown: Image.Image) -> Sample:
    pictures = tuple(Picture(image, f"{i}.png", "task", 3) for i, image in enumerate(shown))
    parts = (*(PICTURE for _ in shown), "what is this?")
    return Sample((Message("user", parts), Message("assistant", ("a cat",))), pictures, "task", 3)


def template(family: str) -> str:
    return "llama 3" if family == "mllama" else "chatml"


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 90))
@example(70, 1, 7)
def test_no_side_is_longer_and_none_is_enlarged(width: int, height: int, resolution: int) -> None:
    given_ = noise(width, height)
    shown = Picture(given_, "a", "task", 0).load(resolution)
    if max(width, height) <= resolution:
        assert shown.size == (width, height) and shown.tobytes() == given_.tobytes()
    else:
        assert max(shown.size) == resolution
        exact = [side * resolution / max(width, height) for side in (width, height)]
        assert all(abs(got - wanted) <= 0.5 or got == 1 for got, wanted in zip(shown.size, exact, strict=True))
    assert Picture(shown, "a", "task", 0).load(resolution).tobytes() == shown.tobytes()


def test_it_is_shrunk_upright_and_on_white() -> None:
    """What EXIF turns is turned first, and a see-through colour does not leak into its neighbours."""
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    held = io.BytesIO()
    turned.save(held, "JPEG", exif=exif)
    assert Picture(held.getvalue(), "a", "task", 0).load(10).size == (5, 10)
    hidden = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    assert Picture(hidden, "a", "task", 0).load(10).getcolors() == [(50, (255, 255, 255))]


def test_detail_is_averaged_not_skipped() -> None:
    """Lines of one pixel become grey; nearest neighbours would make them black, white or a moire."""
    lines = np.zeros((64, 64, 3), dtype=np.uint8)
    lines[:, ::2] = 255
    shown = np.asarray(Picture(Image.fromarray(lines), "a", "task", 0).load(16), dtype=int)[:, 2:-2]
    assert abs(shown - 127).max() < 16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_gives_what_smaller_files_give(family: str) -> None:
    """Pixels, tokens, masks and labels, of rows of which some pictures are small enough and some are not."""
    processor = made(family, template(family))
    large, small = noise(64, 40), noise(12, 9)
    shrunk = large.resize((SMALL, 10), Image.Resampling.LANCZOS)
    found = Encoder(processor, resolution=SMALL).batch([row(large, small), row(small)])
    wanted = Encoder(processor).batch([row(shrunk, small), row(small)])
    assert found.inputs.keys() == wanted.inputs.keys()
    assert all(torch.equal(value, wanted.inputs[key]) for key, value in found.inputs.items())
    assert torch.equal(found.labels, wanted.labels)
    assert [int((line != IGNORED).sum()) for line in found.labels] == [
        int((line != IGNORED).sum()) for line in Encoder(processor).batch([row(large, small), row(small)]).labels
    ], "what is learnt has nothing to do with the pictures' size"
    large_rows = Encoder(processor).batch([row(large, small), row(small)])
    pixels = found.inputs["pixel_values"], large_rows.inputs["pixel_values"]
    assert pixels[0].shape != pixels[1].shape or not torch.equal(*pixels), "a shrunk picture is another one"


SAVING = {"qwen", "internvl", "llava_next", "onevision"}
"""Families in which smaller pictures have fewer tokens; docs/recipes.md names them, and the others."""


def tiled(family: str) -> Any:
    """A processor with tiles of 16 x 16, in as many places as published configurations have."""
    processor = made(family, template(family))
    if family in ("llava_next", "onevision"):
        processor.image_processor.image_grid_pinpoints = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
    return processor


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_save_tokens_and_pixels(family: str) -> None:
    whole, smaller = (Encoder(tiled(family), resolution=r).batch([row(noise(64, 64))]) for r in (None, SMALL))
    tokens = [batch.labels.shape[1] for batch in (whole, smaller)]
    pixels = [batch.inputs["pixel_values"].numel() for batch in (whole, smaller)]
    if family in SAVING:
        assert tokens[1] < tokens[0] and pixels[1] < pixels[0]
    else:
        assert tokens[1] == tokens[0] and pixels[1] == pixels[0]


def test_the_page_names_the_families() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf8")
    section = page.split("## Smaller pictures\n")[1].split("\n## ")[0]
    saving, fixed = section.split("Nothing is saved")
    names = {
        "qwen": "Qwen-VL", "internvl": "InternVL", "llava_next": "LLaVA-NeXT", "onevision": "LLaVA-OneVision",
        "llava": "LLaVA 1.5", "idefics": "Idefics3", "gemma": "Gemma 3", "mllama": "Mllama",
    }  # fmt: skip
    assert names.keys() == FAMILIES.keys()
    for family, name in names.items():
        assert (name in saving) == (family in SAVING) and (name in fixed) == (family not in SAVING), name


def test_a_picture_that_max_length_would_cut_fits_once_it_is_smaller() -> None:
    processor = made("qwen", "chatml")
    whole = Encoder(processor).batch([row(noise(64, 64))]).labels.shape[1]
    with pytest.raises(DataError, match="would cut a picture") as caught:
        Encoder(processor, whole - 17).batch([row(noise(64, 64))])
    assert "set a resolution" in (caught.value.do or "")
    assert Encoder(processor, whole - 17, resolution=8).batch([row(noise(64, 64))]).labels.shape[1] == whole - 17


@pytest.mark.parametrize("resolution", [0, -3])
def test_a_resolution_is_above_0(resolution: int) -> None:
    with pytest.raises(ConfigError, match="`resolution` must be at least 1"):
        Encoder(made(), resolution=resolution)


def test_lint_reads_rows_as_training_would(tmp_path: Path) -> None:
    """Its tokens are the encoder's, and so are its sizes: a picture that becomes too small is told."""
    rows = []
    for i in range(4):
        noise(64, 60 + i).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what?", "answer": f"a cat {i}"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf8")
    opened = read(Source(path=str(tmp_path / "rows.jsonl")))
    processor = processors.made("qwen", "chatml")
    lengths = []
    for resolution in (None, 16, 4):
        encoder = Encoder(processor, resolution=resolution)
        found = lint([Given("rows", opened)], encoder)
        tokens = [line.tokens for line in found.survey.sources[0].rows]
        assert tokens == [encoder.batch([opened[i]]).labels.shape[1] for i in range(4)]
        sizes = [(look.width, look.height) for look in found.survey.looks]
        assert sizes == [opened[i].pictures[0].load(resolution).size for i in range(4)]
        codes = {finding.code for finding in found.findings}
        assert ("tiny-picture" in codes) == (resolution == 4)
        lengths.append(max(tokens))
    assert lengths[2] < lengths[0]
