"""A row made in parts is the processor's whole row; whatever is wrong with a request is said of it."""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import zlib
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data.processors import FAMILIES, made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tarsia.adapter import Host, open_base
from tarsia.core.errors import ServeError
from tarsia.data import PICTURE, Message, Picture, Sample
from tarsia.evaluate.chat import Chat
from tarsia.serve import read, shown
from tarsia.serve.bounds import Bounds
from tarsia.serve.read import Limits, Reader

SERVED = tuple(name for name in FAMILIES if name != "mllama")  # whose template is not of one line


def feigned(name: str, tokens: int = 4096, resolution: int | None = None, **options: Any) -> Any:
    """What ``Reader`` asks of a host, around a family's real processor."""
    processor = made(name, **options)
    image = processor.tokenizer.convert_tokens_to_ids(
        "<image_soft_token>" if name == "gemma" else processor.image_token
    )
    config = SimpleNamespace(
        image_token_id=image, get_text_config=lambda: SimpleNamespace(max_position_embeddings=tokens)
    )
    model = SimpleNamespace(generation_config=None, config=config)
    return SimpleNamespace(name=name, processor=processor, variables={}, resolution=resolution, model=model)


@cache
def mini() -> Host:
    return open_base("mini-1")


@cache
def reader(name: str) -> Reader:
    return Reader(mini() if name == "mini-1" else feigned(name))


def drawn(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def file(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    held = io.BytesIO()
    picture.save(held, form, **options)
    return held.getvalue()


def user(*parts: str | None) -> dict[str, Any]:
    """A message of texts and, for None, pictures."""
    return {
        "role": "user",
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


def whole(host: Any, talk: Sequence[dict[str, Any]], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """The row as ``evaluate`` makes it: chat, template and the processor on all at once."""
    messages = tuple(
        Message(
            one["role"], tuple(PICTURE if p["type"] == "image" else p["text"] for p in one["content"]), learnt=False
        )
        if one["role"] == "assistant"
        else Message(one["role"], tuple(PICTURE if p["type"] == "image" else p["text"] for p in one["content"]))
        for one in talk
    )
    sample = Sample(messages, tuple(Picture(p, "", "tests", 0) for p in pictures), "tests", 0)
    chat = Chat(host)
    text = chat.prompt(sample)
    bos = chat.tokenizer.bos_token
    return dict(
        host.processor(
            text=[text], images=[list(pictures)] if pictures else None, return_tensors="pt",
            add_special_tokens=not (bool(bos) and text.startswith(bos)),
        )
    )  # fmt: skip


WORDS = st.text("ab .\n漢🙂é", max_size=6)
SIZES = st.tuples(st.integers(8, 90), st.integers(8, 90))


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.parametrize("name", [*SERVED, "mini-1"])
def test_a_row_in_parts_is_the_processors_whole_row(name: str, data: st.DataObject) -> None:
    host = mini() if name == "mini-1" else feigned(name)
    sizes = data.draw(st.lists(SIZES, max_size=3))
    pictures = [drawn(*size, seed) for seed, size in enumerate(sizes)]
    parts: list[str | None] = ["x"]
    for _ in pictures:
        parts += [None, *([data.draw(WORDS)] if data.draw(st.booleans()) else [])]
    split = data.draw(st.integers(0, len(parts) - 1))
    talk = [user(*parts[split:], data.draw(WORDS))]
    if split:
        talk = [user(*parts[:split]), {"role": "assistant", "content": [{"type": "text", "text": "b a"}]}, *talk]
    prompt = reader(name).read(talk, [file(picture) for picture in pictures])
    row = whole(host, talk, pictures)
    assert list(prompt.ids) == row["input_ids"][0].tolist()
    for mark, value in prompt.marks.items():
        assert torch.equal(value, row[mark])
    assert set(prompt.marks) == {key for key in row if "token_type" in key}
    if len(pictures) == 1 or (pictures and reader(name)._together):
        inputs = {k: v for k, v in row.items() if k not in ("input_ids", "attention_mask", *prompt.marks)}
        assert set(prompt.pictures[0].inputs) == set(inputs)
        assert all(torch.equal(value, inputs[key]) for key, value in prompt.pictures[0].inputs.items())


@pytest.mark.parametrize("name", [*SERVED, "mini-1"])
def test_a_picture_is_itself_wherever_it_stands(name: str) -> None:
    """Its inputs and its key follow from its file alone, and another picture has another key."""
    first, second = file(drawn(40, 24, 1)), file(drawn(24, 60, 2))
    one = reader(name).read([user(None, "a")], [first]).pictures[0]
    if not reader(name)._together:
        both = reader(name).read([user("b", None, None)], [second, first]).pictures
        assert both[1].key == one.key != both[0].key
        assert all(torch.equal(both[1].inputs[key], one.inputs[key]) for key in one.inputs)
    joined = reader(name).read([user("b", None, None)], [first, second]).pictures
    swapped = reader(name).read([user("b", None, None)], [second, first]).pictures
    assert [one.key for one in joined] != [one.key for one in swapped]


def test_a_key_is_of_names_shapes_types_and_bytes() -> None:
    base = {"a": torch.zeros(2, 3)}
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3, dtype=torch.int32)},
              {"a": torch.ones(2, 3)}, {"a": torch.zeros(2, 3), "b": torch.zeros(1)}]  # fmt: skip
    assert len({read._key(one) for one in [base, *others]}) == 6
    assert read._key({"a": torch.zeros(3, 2).t()}) == read._key(base)


def test_the_same_file_is_processed_once_and_bytes_are_bounded() -> None:
    made_ = Reader(mini(), Limits(kept=3 * 64 * 64 * 3 * 4))
    files = [file(drawn(30, 30, seed)) for seed in range(5)]
    keys = [made_.read([user(None, "a")], [one]).pictures[0].key for one in files]
    assert (made_.hits, made_.misses) == (0, 5)
    assert made_.held == 3 * 64 * 64 * 3 * 4
    assert [made_.read([user("other text ", None)], [one]).pictures[0].key for one in files[2:]] == keys[2:]
    assert (made_.hits, made_.misses) == (3, 5)
    assert made_.read([user(None)], [files[0]]).pictures[0].key == keys[0]  # made again
    assert made_.misses == 6 and made_.held == 3 * 64 * 64 * 3 * 4
    none = Reader(mini(), Limits(kept=10))
    none.read([user(None)], [files[0]])
    assert none.held == 0


def test_what_files_say_of_a_picture_is_done_as_the_data_layer_does() -> None:
    """Upright by EXIF, on white where transparent, the first of many frames, shrunk to the base's resolution."""
    picture = drawn(30, 20, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    frames = {"save_all": True, "append_images": [drawn(30, 20, 4), drawn(30, 20, 5)]}
    files = [
        file(picture, "JPEG", exif=exif),
        file(clear),
        file(picture.quantize(16), "GIF", **frames),
        file(picture, "WEBP", **frames),
        file(picture.convert("CMYK"), "JPEG"),
        file(picture.convert("1")),
        file(picture.convert("LA")),
        file(picture.quantize(8), transparency=0),
        file(picture, "PNG", **frames),
    ]
    for resolution in (None, 12):
        for content in files:
            expected = Picture(content, "", "", 0).load(resolution)
            found = shown.decoded(content, 1, Bounds(), resolution)
            assert found.mode == "RGB" and found.tobytes() == expected.tobytes() and found.size == expected.size
    sideways = shown.decoded(files[0], 1, Bounds(), None)
    assert sideways.size == (20, 30)


def test_the_bases_resolution_is_kept_to() -> None:
    content = file(drawn(60, 30))
    small = Reader(feigned("qwen", resolution=16)).read([user(None)], [content])
    large = Reader(feigned("qwen")).read([user(None)], [content])
    assert len(small.ids) < len(large.ids)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int = 8, kind: int = 2, data: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def overdrawn() -> bytes:
    """A progressive JPEG whose last scan comes a thousand times."""
    content = file(drawn(64, 64), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 1000 + content[-2:]


BMP = file(drawn(8, 8), "BMP")
WRONG: dict[str, bytes] = {
    "nothing": b"",
    "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "another format": BMP,
    "TIFF": file(drawn(8, 8), "TIFF"),
    "no pixels": png(0, 5),
    "a bomb": png(60_000, 60_000),
    "more than PIL takes": png(12_000, 12_000),
    "too large": png(6000, 6000),
    "largest": png(2**31 - 1, 2**31 - 1),
    "beyond": png(2**32 - 1, 2**32 - 1),
    "narrow": png(1, 3000, data=b"\0\0\0\0" * 3000),
    "wide": file(drawn(600, 3)),
    "cut off": file(drawn(64, 64), "JPEG")[:700],
    "cut PNG": file(drawn(64, 64))[:2000],
    "a head alone": file(drawn(9, 9))[:33],
    "a wrong head": b"\x89PNG\r\n\x1a\n" + b"\0" * 60,
    "JPEG's head": b"\xff\xd8\xff\xe0" + b"\0" * 40,
    "16 bits": file(Image.new("I;16", (9, 9))),
    "a broken sum": png(8, 8)[:-20] + b"\0" * 20,
    "overdrawn": overdrawn(),
    "a text bomb": png(8, 8)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 80_000_000)) + png(8, 8)[33:],
    "GIF beyond": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0,\0\0\0\0\x08\0\x08\0\0\x02\x02D\x01\0;",
    "WebP": b"RIFF\x20\0\0\0WEBPVP8 " + b"\xff" * 24,
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_refused_in_a_sentence(kind: str) -> None:
    with pytest.raises(ServeError, match="Picture 2 ") as caught:
        reader("mini-1").read([user(None, None)], [file(drawn(9, 9)), WRONG[kind]])
    assert caught.value.kind == "invalid"
    assert " row " not in str(caught.value) and len(str(caught.value)) < 600


def test_a_usual_progressive_jpeg_is_taken() -> None:
    reader("mini-1").read([user(None)], [file(drawn(64, 64), "JPEG", progressive=True)])


MODES = [
    (mode, form)
    for form, modes in {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"),
                        "GIF": ("L", "P", "RGB"), "WEBP": ("RGB", "RGBA")}.items()
    for mode in modes
]  # fmt: skip


@cache
def sound(mode: str, form: str) -> bytes:
    return file(drawn(13, 11).convert("I").convert("I;16") if mode == "I;16" else drawn(13, 11, mode=mode), form)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_and_random_files_are_read_or_refused(data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        content = bytearray(sound(*data.draw(st.sampled_from(MODES))))
        for _ in range(data.draw(st.integers(0, 6))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
    else:
        heads = st.sampled_from((b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\x30\0\0\0WEBPVP8L"))
        content = bytearray(data.draw(heads) + data.draw(st.binary(max_size=80)))
    try:
        reader("mini-1").read([user(None)], [bytes(content)])
    except ServeError as error:
        if error.kind != "invalid":
            raise


WRONG_TALKS: dict[str, Any] = {
    "none": [],
    "an assistant last": [user("a"), {"role": "assistant", "content": "b"}],
    "a role": [{"role": "root", "content": "a"}],
    "no role": [{"content": "a"}],
    "no content": [{"role": "user"}],
    "content": [{"role": "user", "content": 3}],
    "a part": [{"role": "user", "content": ["a"]}],
    "a type": [{"role": "user", "content": [{"type": "audio"}]}],
    "a text": [{"role": "user", "content": [{"type": "text", "text": 3}]}],
    "a control": [user("a <|end|> b")],
    "a marker": [user("a <image> b")],
    "a control of the system": [{"role": "system", "content": "<|user|>"}, user("a")],
    "half a pair": [user("a \ud83d b")],
    "a place too many": [user("a", None)],
    "an assistant's picture": [user("a"), {"role": "assistant", "content": [{"type": "image"}]}, user("b")],
}


@pytest.mark.parametrize("kind", WRONG_TALKS)
def test_wrong_conversations_are_refused_in_a_sentence(kind: str) -> None:
    pictures = [file(drawn(9, 9))] if kind == "an assistant's picture" else []
    with pytest.raises(ServeError) as caught:
        reader("mini-1").read(WRONG_TALKS[kind], pictures)
    assert caught.value.kind == "invalid"
    assert "Row 0" not in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(("role", "content", "x")),
            st.one_of(
                st.sampled_from(("user", "assistant", "system", "tool", None)),
                st.text(max_size=5),
                st.integers(),
                st.lists(
                    st.dictionaries(st.sampled_from(("type", "text")), st.sampled_from(("text", "image", "a", None))),
                    max_size=3,
                ),
            ),
        ),
        max_size=4,
    ),
    st.integers(0, 1),
)
def test_any_conversation_is_read_or_refused(talk: list[dict[str, Any]], pictures: int) -> None:
    try:
        reader("mini-1").read(talk, [file(drawn(9, 9))] * pictures)
    except ServeError as error:
        if error.kind != "invalid":
            raise


def test_a_file_too_many_and_pictures_too_many() -> None:
    with pytest.raises(ServeError, match="places differ"):
        reader("mini-1").read([user("a")], [file(drawn(9, 9))])
    few = Reader(mini(), Limits(pictures=2))
    with pytest.raises(ServeError, match="too many pictures") as caught:
        few.read([user(None, None, None)], [file(drawn(9, 9))] * 3)
    assert (caught.value.kind, caught.value.given, caught.value.allowed) == ("invalid", 3, 2)
    with pytest.raises(ServeError, match="too large a file"):
        shown.decoded(b"\xff\xd8" * 99, 1, Bounds(bytes=100), None)


@pytest.mark.parametrize("text", ["漢" * 3000, "a " * 3000, " " * 2_000_000])
def test_a_conversation_that_is_too_long_says_how_long_it_is(text: str) -> None:
    with pytest.raises(ServeError, match="longer than this model reads") as caught:
        reader("mini-1").read([user(text)], [])
    assert caught.value.kind == "too_long"
    assert caught.value.allowed == "1024 tokens"
    assert int(str(caught.value.given).split()[0]) > 1024


def test_pictures_count_among_the_tokens() -> None:
    content = file(drawn(9, 9))
    with pytest.raises(ServeError) as caught:
        reader("mini-1").read([user(*[None] * 17)], [content] * 17)
    assert caught.value.kind == "too_long"
    assert f"{17 * 64} of them for pictures" in str(caught.value.given)


def test_pictures_are_processed_no_further_than_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [file(drawn(9, 9, seed)) for seed in range(24)]
    for limits, most, kind in ((Limits(), 17, "longer than"), (Limits(bytes=3 * 64 * 64 * 3 * 4), 4, "larger")):
        made_, seen = Reader(mini(), limits), []
        real = made_._processed
        monkeypatch.setattr(
            made_, "_processed", lambda pictures, real=real, seen=seen: seen.append(1) or real(pictures)
        )
        with pytest.raises(ServeError, match=kind) as caught:
            made_.read([user(*[None] * 24)], files)
        assert caught.value.kind == "too_long" and len(seen) == most


def test_a_system_prompt_and_several_turns() -> None:
    talk = [
        {"role": "system", "content": "Be kind."},
        user("a", None),
        {"role": "assistant", "content": "b"},
        user("c"),
    ]
    prompt = reader("mini-1").read(talk, [file(drawn(9, 9))])
    text = mini().processor.tokenizer.decode(prompt.ids)
    assert text.index("Be kind.") < text.index("<image>") < text.index("b") < text.rindex("c")
    assert text.rstrip().endswith("<|assistant|>")
    assert reader("mini-1")(talk, [file(drawn(9, 9))]).ids == prompt.ids


def test_threads_make_what_one_makes_alone() -> None:
    made_ = Reader(feigned("idefics"), Limits(kept=1))
    files = [file(drawn(20 + 7 * n, 30, n)) for n in range(6)]
    alone = [made_.read([user(None, "a b" * n)], [content]) for n, content in enumerate(files)]
    found: dict[int, Any] = {}

    def work(n: int) -> None:
        found[n] = [made_.read([user(None, "a b" * n)], [files[n]]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, prompts in found.items():
        assert all((p.ids, p.pictures[0].key) == (alone[n].ids, alone[n].pictures[0].key) for p in prompts)
    assert len(found) == 6


def test_a_processor_that_does_otherwise_with_rows_is_refused() -> None:
    """Planted: token types that are not where the pictures are; a text that is changed where there are two."""
    host = feigned("qwen")
    kind = type(host.processor)

    class Other(kind):  # type: ignore[misc, valid-type]
        def create_mm_token_type_ids(self, ids: Any) -> Any:
            return [[1] * len(one) for one in ids]

    host.processor.__class__ = Other
    with pytest.raises(ServeError, match="picture by picture") as caught:
        Reader(host)
    assert "token types" in str(caught.value)
    host = feigned("llava")
    plain = type(host.processor)

    class Changed(plain):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, text: Any = None, **options: Any) -> Any:
            text = [one + "!" if one.count("<image>") > 1 else one for one in text]
            return super().__call__(*args, text=text, **options)

    host.processor.__class__ = Changed
    with pytest.raises(ServeError, match="picture by picture"):
        Reader(host)


def test_pictures_that_change_each_other_are_given_together() -> None:
    """LLaVA-OneVision cuts a picture into tiles only where it is alone."""
    made_ = reader("onevision")
    one, two = file(drawn(16, 40, 1)), file(drawn(16, 40, 2))
    assert len(made_.read([user(None)], [one]).pictures) == 1
    assert len(made_.read([user(None, None)], [one, two]).pictures) == 1
    assert made_.read([user(None)], [one]).pictures[0].inputs["pixel_values"].shape[1] > 1
    assert made_.read([user(None, None)], [one, two]).pictures[0].inputs["pixel_values"].shape[1] == 1


def test_places_that_differ_from_the_pictures_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made_ = Reader(mini())
    real = made_._processed
    monkeypatch.setattr(made_, "_processed", lambda p: read.Made(real(p).picture, real(p).written, 63))
    with pytest.raises(ServeError, match="differ") as caught:
        made_.read([user(None)], [file(drawn(9, 9))])
    assert caught.value.kind == "internal"


def test_what_the_processor_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made_ = Reader(mini())

    def refuse(pictures: Any) -> Any:
        raise ValueError("absolute aspect ratio must be smaller than 200")

    monkeypatch.setattr(made_, "_processed", refuse)
    with pytest.raises(ServeError, match="does not take picture 1") as caught:
        made_.read([user(None)], [file(drawn(9, 9))])
    assert caught.value.kind == "invalid" and "aspect ratio" in str(caught.value)


def test_files_are_told_apart_by_all_their_bytes() -> None:
    assert shown.digest(b"a") == hashlib.sha256(b"a").digest()
