"""Conversations and their pictures: what is refused, and that nothing is decoded early."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import pytest
from data.processors import picture
from PIL import Image

from tarsia.core.errors import DataError
from tarsia.data import PICTURE, Message, Picture, Place, Sample, read_row


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG that says this size and has no pixels."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", body), (b"IDAT", b"nothing"))
    packed = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def load(content: Path | bytes | Image.Image) -> Image.Image:
    return Picture(content, "cell.png", "cells", 7).load()


def test_every_kind_of_content_is_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    wanted = picture().tobytes()
    for content in (path, path.read_bytes(), picture()):
        loaded = load(content)
        assert (loaded.mode, loaded.size, loaded.tobytes()) == ("RGB", (16, 16), wanted)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(mode) -> None:
    """As Transformers' own processors take it, not the colour that lies hidden under it."""
    hidden = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    hidden.putpixel((1, 0), (0, 0, 0, 255))
    shown = Picture(hidden.convert(mode), "hidden", "task", 0).load()
    assert [shown.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


def test_grey_and_palette_and_alpha_become_rgb() -> None:
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        assert load(encoded(picture().convert(mode), "TIFF")).mode == "RGB"


def test_a_picture_on_its_side_is_turned() -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert load(buffer.getvalue()).size == (4, 8)


@pytest.mark.parametrize(
    "content, says",
    [
        (Path("/nowhere/cell.png"), "is missing"),
        (b"GIF? no", "not a picture"),
        (b"", "not a picture"),
        (encoded(picture())[:60], "can not be decoded"),
        (header(12, 12), "can not be decoded"),
        (header(10_000, 10_000), "too large"),
        (header(60_000, 60_000), "too large"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (encoded(Image.new("I;16", (4, 4))), "more than 8 bits"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "more than 8 bits"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_picture_names_row_source_and_file(content: Path | bytes | Image.Image, says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        load(content)
    assert all(word in str(error.value) for word in ("row 7", "cells", "cell.png"))


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 7"):
        load(tmp_path)


USER, SAYS = Message("user", (PICTURE, "what?")), Message("assistant", ("a cat",))


@pytest.mark.parametrize("pictures, word", [(0, "more"), (2, "fewer")])
def test_placeholders_and_pictures_must_be_as_many(pictures: int, word: str) -> None:
    with pytest.raises(DataError, match=f"{word} picture placeholders") as error:
        Sample((USER, SAYS), (Picture(picture(), "x", "cells", 3),) * pictures, "cells", 3)
    assert "Row 3 of cells" in str(error.value)
    assert f"1 placeholders, {pictures} pictures" in str(error.value)


def test_roles_and_emptiness() -> None:
    with pytest.raises(DataError, match="unknown role"):
        Sample((Message("critic", ("x",)),), (), "s", 0)
    with pytest.raises(DataError, match="no messages"):
        Sample((), (), "s", 0)


def row(**columns: object) -> Sample:
    return read_row(columns, Place("cells", 2, Path("/folder")))


def parts(sample: Sample) -> list[tuple[object, ...]]:
    return [message.parts for message in sample.messages]


def test_question_and_answer() -> None:
    assert parts(row(question="what?", answer="a cat")) == [("what?",), ("a cat",)]
    sample = row(question="what?", answer="a <image> tag", images=["a.png", "/b.png"])
    assert parts(sample) == [(PICTURE, PICTURE, "what?"), ("a <image> tag",)]
    assert [p.content for p in sample.pictures] == [Path("/folder/a.png"), Path("/b.png")]
    assert parts(row(question="left <image> right <image>", answer="x", images=["a", "b"]))[0] == (
        "left ", PICTURE, " right ", PICTURE,
    )  # fmt: skip


def test_a_marker_takes_one_newline_with_it() -> None:
    for text, wanted in (
        ("<image>\nwhat?", (PICTURE, "what?")),
        ("what?\n<image>", ("what?", PICTURE)),
        ("a\n<image>\n\nb", ("a\n", PICTURE, "\nb")),
        ("<image>", (PICTURE,)),
    ):
        assert parts(row(question=text, answer="x", image="a.png"))[0] == wanted


def test_messages_with_strings_or_parts() -> None:
    as_text = row(
        messages=[{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}], images=["a"]
    )
    as_parts = row(
        id=4,
        messages=[
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        ],
        images=["a"],
        question=None,
    )
    assert parts(as_text) == parts(as_parts) == [(PICTURE, "what?"), ("a cat",)]
    assert parts(row(messages=[{"role": "user", "content": "hi"}], images=[])) == [("hi",)]
    assert parts(row(messages=[{"role": "assistant", "content": "a <image> tag"}])) == [("a <image> tag",)]


def test_pictures_of_every_spelling() -> None:
    data = encoded(picture())
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for value in (url, {"bytes": data, "path": "x.png"}, {"bytes": data, "path": None}, data, picture()):
        sample = row(question="what?", answer="a", image=value)
        assert sample.pictures[0].load().tobytes() == picture().tobytes()
    assert row(question="q", answer="a", image={"bytes": None, "path": "x.png"}).pictures[0].content == Path(
        "/folder/x.png"
    )


@pytest.mark.parametrize(
    "columns, says",
    [
        ({"text": "hello"}, "no known format"),
        ({}, "no known format"),
        ({"question": "q", "answer": "a", "imgae": "x.png"}, "no format understands: imgae"),
        ({"question": "q", "answer": "a", "messages": []}, "no format understands"),
        ({"question": "q", "answer": 4}, "`answer` is not a text"),
        ({"question": "q", "answer": "a", "image": "a", "images": ["b"]}, "both `image` and `images`"),
        ({"question": "q", "answer": "a", "images": "a.png"}, "`images` is not a list"),
        ({"question": "q", "answer": "a", "image": ["a.png", 7]}, "not understood"),
        ({"question": "q", "answer": "a", "videos": ["a.mp4"]}, "it has videos"),
        ({"question": "half \ud83d", "answer": "a"}, "half of a character"),
        ({"question": "q", "answer": "a", "image": 5}, "not understood"),
        ({"question": "q", "answer": "a", "image": "http://x/a.png"}, "not downloaded"),
        ({"question": "q", "answer": "a", "image": "data:image/png;base64,%%%"}, "data URL is broken"),
        ({"question": "q", "answer": "a", "image": "data:nothing"}, "data URL is broken"),
        ({"messages": "hello"}, "not a list"),
        ({"messages": ["hello"]}, "not an object"),
        ({"messages": [{"role": "user"}]}, "other keys"),
        ({"messages": [{"role": "user", "content": "x", "loss": False}]}, "no more"),
        ({"messages": [{"role": "user", "content": 3}]}, "neither a text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "not understood"),
        ({"messages": [{"role": 1, "content": "x"}]}, "role is not a text"),
    ],
)
def test_a_bad_row_names_itself(columns: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        row(**columns)
    assert "Row 2 of cells" in str(error.value)


def test_unknown_columns_are_listed_with_those_understood() -> None:
    with pytest.raises(DataError) as error:
        row(instruction="q", output="a")
    assert all(
        word in str(error.value) for word in ("instruction, output", "messages", "question", "answer", "columns")
    )


@pytest.mark.parametrize("error", [EOFError(), struct.error("short"), zlib.error("bad"), OverflowError("large")])
def test_whatever_a_decoder_raises_is_told_with_its_row(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Image.Image:
        raise error

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(DataError, match=f"row 7 of cells can not be decoded: {str(error) or 'EOFError'}"):
        load(b"")


@pytest.mark.parametrize("resolution", [None, 7, 400])
@pytest.mark.parametrize("turn", [1, 6])
def test_sides_are_those_of_what_is_shown_and_nothing_is_decoded(
    resolution: int | None, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    held = io.BytesIO()
    Image.new("RGB", (31, 17), "red").save(held, "JPEG", exif=exif)
    picture = Picture(held.getvalue(), "a", "task", 0)
    shown = picture.load(resolution).size

    def decoded(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert picture.sides(resolution) == (max(shown), min(shown))


def test_sides_of_a_missing_picture_name_its_row() -> None:
    with pytest.raises(DataError, match="picture of row 3 of task is missing"):
        Picture(Path("/nowhere.png"), "a", "task", 3).sides()
