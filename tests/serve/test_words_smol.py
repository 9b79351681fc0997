"""Text, schemas and prompts with a large byte-level tokenizer; needs TARSIA_SMOL (see bench)."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tarsia.adapter import Host, open_base
from tarsia.evaluate.chat import Chat
from tarsia.serve.constrain import Compiler
from tarsia.serve.read import Reader
from tarsia.serve.request import Sampling
from tarsia.serve.sample import Drawer, Drawn, draw
from tarsia.serve.words import Spelling, Words

FOLDER = Path(os.environ.get("TARSIA_SMOL", "absent")) / "small"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="TARSIA_SMOL has no folder `small`")


@pytest.fixture(scope="module")
def host() -> Host:
    return open_base(str(FOLDER), dtype="bfloat16")


def test_parts_make_the_text(host: Host) -> None:
    tokenizer: Any = host.processor.tokenizer
    spelling = Spelling(tokenizer)
    texts = st.text("ab ,\n漢字🙂👩\u200d👧\u0301é", max_size=25).map(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    )

    @settings(deadline=None, max_examples=200)
    @given(st.one_of(texts, st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)))
    def parts(ids: list[int]) -> None:
        words = Words(spelling)
        told = "".join([*map(words.add, ids), words.flush()])
        assert told == tokenizer.decode(ids, skip_special_tokens=True)
        assert told.strip() == Chat.decode(chat, ids) or set(ids) & chat.ends

    chat = Chat(host)
    parts()


def test_answers_under_a_schema_are_instances(host: Host) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="the validator that answers are judged by")
    chat = Chat(host)
    vocabulary = host.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    compiler = Compiler(chat.tokenizer, chat.ends, vocabulary)
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["kind", "n"],
        "additionalProperties": False,
    }
    text = json.dumps(schema)
    for seed in range(5):
        drawer = Drawer(Sampling(schema=text, seed=seed), vocabulary, constraint=compiler.compile(text).constraint())
        said, generator = [], torch.Generator().manual_seed(seed)
        while not drawer.finished and len(said) < 200:
            drawn = draw(torch.randn(1, vocabulary, generator=generator), [drawer])[0]
            assert isinstance(drawn, Drawn)
            said.append(drawn.token)
        answer = chat.tokenizer.decode([token for token in said if token not in chat.ends])
        jsonschema_rs.validator_for(schema).validate(json.loads(answer))


def test_prompts_are_those_of_evaluate(host: Host) -> None:
    from tarsia.data import PICTURE, Message, Picture, Sample

    reader, chat = Reader(host), Chat(host)
    noise = torch.randint(256, (48, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    held = io.BytesIO()
    Image.fromarray(noise.numpy()).save(held, "PNG")
    for count in (0, 1, 2):
        parts = (*[PICTURE] * count, "what is this?")
        shown = tuple(Picture(held.getvalue(), "", "tests", 0) for _ in range(count))
        sample = Sample((Message("user", parts),), shown, "tests", 0)
        inputs = chat.inputs([sample], [chat.prompt(sample)])
        content = [{"type": "image"} if p is PICTURE else {"type": "text", "text": p} for p in parts]
        prompt = reader.read([{"role": "user", "content": content}], [held.getvalue()] * count)
        assert list(prompt.ids) == inputs["input_ids"][0].tolist()
        if count:
            joined = torch.cat([picture.inputs["pixel_values"] for picture in prompt.pictures])
            assert torch.equal(joined.to(inputs["pixel_values"].dtype), inputs["pixel_values"])
