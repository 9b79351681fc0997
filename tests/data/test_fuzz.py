"""Anything at all for rows, pictures, files and templates: only a TarsiaError may come out, and at once.

A few hundred cases by default, 5,000 with ``-m slow``. Sizes are bounded, so nothing here can take long
unless the code makes it so.
"""

from __future__ import annotations

import gzip
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.processors import TEMPLATES, made, picture
from data.published import PUBLISHED
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tarsia.core.errors import TarsiaError
from tarsia.data import Encoder, Picture, Place, Sample, Source, read, read_row

FEW = {"rows": 150, "files": 60, "pictures": 100, "templates": 60, "conversations": 60}
MANY = {"rows": 2000, "files": 600, "pictures": 1200, "templates": 600, "conversations": 600}


def fuzzed(kind: str, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same test twice: some cases, and very many under ``-m slow``."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(count: int) -> None:
            quiet = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            quiet(given(*strategies)(test))()

        return pytest.mark.parametrize(
            "count", [FEW[kind], pytest.param(MANY[kind], marks=pytest.mark.slow)], ids=["few", "many"]
        )(run)

    return decorate


WORDS = st.sampled_from(
    [
        "messages", "conversations", "prompt", "completion", "question", "answer", "image", "images", "tools", "system",
        "role", "content", "from", "value", "user", "assistant", "human", "gpt", "function_call", "observation", "tool",
        "type", "text", "image_url", "url", "tool_calls", "function", "name", "arguments", "loss", "weight", "videos",
        "<image>", "<image>\nwhat?", "\ud800", "\x00", "data:image/png;base64,AAAA", "file:///a%00b", "https://x/y",
        "[", "{}", '{"name": "f", "arguments": {}}', "NaN", "bytes", "path", "id", "", "e\u0301😀", "a" * 300,
    ]
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(max_size=8), st.binary(max_size=8),
    st.just(Image.new("RGB", (2, 2))),
)  # fmt: skip
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4), st.tuples(inner, inner)
    ),
    max_leaves=12,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "tool_call", "tool_response", "critic"])
PARTS = st.one_of(
    st.just({"type": "image"}),
    st.fixed_dictionaries({"type": st.just("text"), "text": st.one_of(WORDS, ANYTHING)}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.one_of(WORDS, ANYTHING)}),
    ANYTHING,
)
CONTENT = st.one_of(WORDS, st.text(max_size=10), st.lists(PARTS, max_size=3), ANYTHING)
CALLS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": WORDS, "arguments": ANYTHING})}), ANYTHING
    ),
    max_size=2,
)
TURN = st.one_of(
    st.fixed_dictionaries(
        {"role": ROLES, "content": CONTENT},
        optional={"tool_calls": CALLS, "loss": ANYTHING, "name": ANYTHING, "reasoning_content": CONTENT},
    ),
    st.fixed_dictionaries({"from": WORDS, "value": CONTENT}),
    ANYTHING,
)
TURNS = st.one_of(st.lists(TURN, max_size=4), ANYTHING)
REST = {
    "image": st.one_of(WORDS, ANYTHING), "images": st.one_of(st.lists(WORDS, max_size=2), ANYTHING),
    "tools": st.one_of(CALLS, ANYTHING), "system": ANYTHING, "videos": ANYTHING, "id": ANYTHING,
}  # fmt: skip
ROW = st.one_of(
    st.fixed_dictionaries({"messages": TURNS}, optional=REST),
    st.fixed_dictionaries({"conversations": TURNS}, optional=REST),
    st.fixed_dictionaries({"prompt": TURNS, "completion": TURNS}, optional=REST),
    st.fixed_dictionaries({"question": CONTENT, "answer": CONTENT}, optional=REST),
    st.dictionaries(WORDS, ANYTHING, max_size=5),
)
ENCODERS = {name: Encoder(made("llava", name)) for name in ("chatml", "llama 3")}
ENCODERS |= {
    name: Encoder(PUBLISHED[name].processor(), variables=dict(PUBLISHED[name].variables))
    for name in ("Qwen3-VL", "Qwen3-VL, thinking", "Gemma-3", "Mistral-Small-3.1")
}


def refused(run: Callable[[], object]) -> bool:
    """Whether a TarsiaError came out; anything else fails the test."""
    try:
        run()
    except TarsiaError:
        return True
    return False


@fuzzed("rows", ROW, st.booleans(), st.sampled_from(sorted(ENCODERS)))
def test_any_row(row: dict[str, object], columnar: bool, name: str) -> None:
    place = Place("fuzz", 3, Path("/nowhere"), columnar)
    samples: list[Sample] = []
    if not refused(lambda: samples.append(read_row(row, place))):
        refused(lambda: ENCODERS[name].batch(samples))


def test_rows_of_a_good_shape_are_read() -> None:
    """What is fuzzed is not refused wholesale."""
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    rows += [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    for name, encoder in ENCODERS.items():
        for row in rows:
            read_one = read_row(row, Place("fuzz", 0, Path()))
            assert not refused(lambda one=read_one, by=encoder: by.batch([one])) or name == "Mistral-Small-3.1"


def as_json(rows: object) -> bytes:
    return json.dumps(rows, default=str).encode("utf-8", "surrogatepass")


def as_lines(rows: list[object]) -> bytes:
    return b"\n".join(map(as_json, rows))


GARBLED = st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")))
FILES = st.one_of(
    st.tuples(st.just("a.json"), st.one_of(GARBLED, st.lists(ROW, max_size=3).map(as_json), ANYTHING.map(as_json))),
    st.tuples(st.just("a.jsonl"), st.one_of(GARBLED, st.lists(ROW, max_size=3).map(as_lines))),
    st.tuples(st.just("a.csv"), st.one_of(GARBLED, GARBLED.map(lambda b: b"question,answer\n" + b))),
    st.tuples(st.just("a.parquet"), st.one_of(GARBLED, GARBLED.map(lambda b: b"PAR1" + b + b"PAR1"))),
    st.tuples(st.just("a.jsonl.gz"), st.one_of(
        GARBLED, GARBLED.map(gzip.compress), GARBLED.map(lambda b: gzip.compress(b)[:-5])
    )),
    st.tuples(st.just("dataset_info.json"), st.one_of(
        GARBLED,
        st.fixed_dictionaries({"mine": st.fixed_dictionaries({}, optional={
            "file_name": st.one_of(st.just("a.json"), ANYTHING), "formatting": st.one_of(st.just("sharegpt"), ANYTHING),
            "columns": ANYTHING, "tags": ANYTHING, "num_samples": ANYTHING, "split": ANYTHING,
        })}).map(as_json),
    )),
    st.tuples(st.just("metadata.csv"), GARBLED.map(lambda b: b"file_name,question,answer\n" + b)),
    st.tuples(st.just("state.json"), st.one_of(GARBLED, ANYTHING.map(as_json))),
    st.tuples(st.just("dataset_dict.json"), st.one_of(GARBLED, ANYTHING.map(as_json))),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    HERE.append(tmp_path_factory.mktemp("fuzz"))
    return HERE[0]


HERE: list[Path] = []


@pytest.mark.usefixtures("folder")
@fuzzed("files", FILES)
def test_any_file(file: tuple[str, bytes]) -> None:
    name, body = file
    (HERE[0] / name).write_bytes(body)
    whole = name in ("metadata.csv", "state.json", "dataset_dict.json")
    entry = "mine" if name == "dataset_info.json" else None
    source = Source(path=str(HERE[0] if whole else HERE[0] / name), entry=entry)
    try:
        refused(lambda: list(read(source)))
        refused(lambda: read(source).digest())
    finally:
        (HERE[0] / name).unlink()


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO")
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "LA", "PA", "La", "RGBa")


@st.composite
def encoded(draw: st.DrawFn) -> bytes:
    """A picture of some kind and mode, whole, cut off, or with some bytes changed; or no picture."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=80))
    kind, mode = draw(st.sampled_from(KINDS)), draw(st.sampled_from(MODES))
    width, height = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    image = Image.new(mode, (width, height))
    buffer = io.BytesIO()
    options: dict[str, Any] = {}
    if draw(st.booleans()) and kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"save_all": True, "append_images": [image] * draw(st.integers(1, 3))}
    if draw(st.booleans()) and kind in ("JPEG", "PNG", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 12))
        options["exif"] = exif.tobytes()
    try:
        image.save(buffer, kind, **options)
    except (OSError, ValueError, KeyError, SystemError, TypeError):  # this kind has no such mode
        buffer = io.BytesIO()
        Image.new("RGB", (width, height)).save(buffer, kind)
    body = bytearray(buffer.getvalue())
    for _ in range(draw(st.integers(0, 4))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body[: draw(st.integers(0, len(body)))] if draw(st.booleans()) else body)


@fuzzed("pictures", encoded())
def test_any_picture(body: bytes) -> None:
    found: list[Image.Image] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
        if not refused(lambda: found.append(Picture(body, "x", "fuzz", 0).load())):
            assert found[0].mode == "RGB" and found[0].width * found[0].height > 0


BLOCKS = st.sampled_from(
    [
        "{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}", "{% else %}", "{% endif %}",
        "{{ m['role'] }}", "{{ m.content }}", "{{ m['content'][0]['text'] }}", "{{ m.content | trim }}",
        "{% for c in m['content'] %}", "{{ c.text }}", "{{ c['text'] }}", "<image>", "assistant:", "{{ bos_token }}",
        "{% set x = x ~ x %}", "{{ x }}", "{% for i in range(9999) %}", "{{ i }}", "{{ tools | tojson }}",
        "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}", "{{ f(m) }}", "{% generation %}", "{% endgeneration %}",
        "{{ raise_exception('no') }}", "{{ strftime_now('%d') }}", "{{ 1 / 0 }}", "{{ messages[9].role }}",
        "{{ 'a' * 3 }}", "{{ ''.__class__ }}", "{{ [].append(1) }}", "{% break %}", "{{ loop.index0 % 2 }}",
        "{{ messages | sort }}", "{{ messages | sum }}", "{{ m | map('upper') | list }}", "{% include 'x' %}",
        "{% import 'x' as y %}", "{% extends 'x' %}", "{{ namespace(a=1).b }}", "{{ dict(a=1)['b'] }}", "</s>", " ",
        "\n", "{{ messages[0]['content'] | int }}", "{{ lipsum(9) }}", "{{ cycler().next() }}",
        "{% raw %}", "{# ",
        "{{ messages | length / 0 }}", "{{ m.content.split('a')[7] }}", "{{ 'x' | attr('format') }}",
    ]
)  # fmt: skip
KNOWN = st.sampled_from([t.replace("MARK", "<image>") for t in TEMPLATES.values()])


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Fragments in any order, or a real template with one cut out, put in or broken off."""
    if draw(st.booleans()):
        return "".join(draw(st.lists(st.one_of(BLOCKS, st.text(max_size=4)), max_size=14)))
    text = draw(KNOWN)
    at = draw(st.integers(0, len(text)))
    end = draw(st.integers(at, min(len(text), at + 30)))
    return text[:at] + draw(st.one_of(st.just(""), BLOCKS)) + text[end:]


@fuzzed("templates", templates())
@example("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}")
def test_any_template(template: str) -> None:
    processor = made("llava")
    processor.chat_template = template
    encoders: list[Encoder] = []
    if not refused(lambda: encoders.append(Encoder(processor))):
        place = Place("fuzz", 0, Path())
        turns = [("user", "<image>what?"), ("assistant", "a cat"), ("user", "and?"), ("assistant", "")]
        messages = [{"role": role, "content": text} for role, text in turns]
        row = read_row({"messages": messages, "image": picture()}, place)
        refused(lambda: encoders[0].batch([row]))


TALK = st.lists(
    st.tuples(st.sampled_from(["system", "user", "user", "assistant", "assistant", "tool"]), st.text(max_size=12)),
    max_size=5,
)


@fuzzed("conversations", TALK, st.integers(0, 3), st.sampled_from(sorted(ENCODERS)), st.integers(1, 60))
def test_any_conversation_and_length(talk: list[tuple[str, str]], pictures: int, name: str, length: int) -> None:
    messages = [{"role": role, "content": text} for role, text in talk]
    samples: list[Sample] = []
    row = {"messages": messages, "images": [picture()] * pictures}
    if not refused(lambda: samples.append(read_row(row, Place("fuzz", 0, Path())))):
        base = ENCODERS[name]
        cut = Encoder(base.processor, length, variables={"strftime_now": "x"})
        refused(lambda: cut.batch(samples))
        refused(lambda: base.batch(samples))
