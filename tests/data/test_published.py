"""The published templates of thirteen families: labels against two oracles that share nothing with the encoder.

1. transformers' own masks: each template is written with {% generation %} round what the assistant says, and
   ``apply_chat_template(return_assistant_tokens_mask=True)`` marks the tokens.
2. Token by token: the prompt of each turn is tokenised alone by the processor, then the prompt with the
   answer, spelt by hand from the table; the tokens that the second has more are the turn's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from data.processors import picture
from data.published import PUBLISHED, Published

from tarsia.core.errors import DataError
from tarsia.data import IGNORED, PICTURE, Call, Encoder, Message, Picture, Sample

WEATHER = json.dumps({
    "type": "function",
    "function": {"name": "weather", "description": "of a town", "parameters": {"type": "object", "properties": {}}},
})  # fmt: skip
CALL = Call("weather", '{"town": "Oslo", "days": [1, null]}', "call00001")


def user(text: str, pictures: int = 0) -> Message:
    return Message("user", (*(PICTURE,) * pictures, text))


def says(text: str, **rest: Any) -> Message:
    return Message("assistant", (text,), **rest)


def sample(*messages: Message, tools: tuple[str, ...] = ()) -> Sample:
    count = sum(m.n_pictures for m in messages)
    pictures = tuple(Picture(picture(16, i), f"{i}.png", "cells", 0) for i in range(count))
    return Sample(messages, pictures, "cells", 0, tools)


SYSTEM = Message("system", ("be kind",))
CASES = {
    "single": (user("what is this?", 1), says("a cat")),
    "text only": (user("what is a bird?"), says("it has wings")),
    "several pictures": (user("how many?", 2), says("4 cats")),
    "empty": (user("what is this?", 1), says("")),
    "white space": (user("what is this?", 1), says("a cat\n\n  and a dog")),
    "symbols": (user("what? {{ x }} {% endif %}", 1), says("é😀 {{ y }} ASSISTANT: USER: x")),
    "system": (SYSTEM, user("what is this?", 1), says("a cat")),
    "multi-turn": (user("what is this?", 1), says("a cat"), user("and then?"), says("a dog 4"), user("so?"), says("4")),
    "multi-turn, the same answer": (user("what?", 1), says("a cat"), user("what?"), says("a cat")),
    "multi-turn, empty": (user("what?", 1), says(""), user("and?"), says(""), user("so?"), says("4")),
    "multi-turn, pictures": (user("what?", 1), says("a cat"), user("and here?", 2), says("2 dogs")),
    "multi-turn, system": (SYSTEM, user("what?"), says("a cat"), user("and here?", 1), says("2 dogs")),
    "only the last is learnt": (user("what?", 1), says("a cat", learnt=False), user("and?"), says("a dog")),
}
TOOL = Message("tool", ('"cold, -3"',), answers="call00001", name="weather")
WITH_TOOLS = {
    "tools": (user("is it cold?"), Message("assistant", (), (CALL,)), TOOL, says("yes, -3")),
    "tools, system": (SYSTEM, user("cold?"), Message("assistant", (), (CALL,)), TOOL, says("yes, -3")),
    "tools, not called": (user("is this cold?"), says("no")),
}
ONE_CALL = ("Llama-3.2-Vision",)
TWO_CALLS = (user("cold?"), Message("assistant", (), (CALL, replace(CALL, id="call00002"))), TOOL, TOOL, says("yes"))
# What these templates make of a conversation is not what they make of its beginnings: the turn would be learnt
# in another context than the one in which it is asked for.
REFUSED = {
    # The prompt opens a thought, and no earlier turn has one any more.
    ("Qwen3-VL, thinking", "multi-turn"), ("Qwen3-VL, thinking", "multi-turn, the same answer"),
    ("Qwen3-VL, thinking", "multi-turn, empty"), ("Qwen3-VL, thinking", "multi-turn, pictures"),
    ("Qwen3-VL, thinking", "multi-turn, system"), ("Qwen3-VL, thinking", "tools"),
    ("Qwen3-VL, thinking", "tools, system"),
    # No system prompt stands before a conversation with a picture, wherever in it the picture comes.
}  # fmt: skip
DATED = (SYSTEM,)  # Mistral's writes today's date where nobody says what the system says


def conversations(published: Published) -> dict[str, Sample]:
    found = {name: sample(*messages) for name, messages in CASES.items()}
    if published.tools:
        found |= {name: sample(*messages, tools=(WEATHER,)) for name, messages in WITH_TOOLS.items()}
    if "strftime_now" in dict(published.variables):
        found = {
            k: s if s.messages[0].role == "system" else replace(s, messages=(*DATED, *s.messages))
            for k, s in found.items()
        }
    return found


PAIRS = [(name, case) for name, published in PUBLISHED.items() for case in conversations(published)]


def as_chat(row: Sample, published: Published) -> list[dict[str, Any]]:
    """The row as transformers takes it: parts, with the very pictures; texts where the template wants them."""
    shown = iter(row.pictures)
    chat: list[dict[str, Any]] = []
    for m in row.messages:
        parts = [
            {"type": "image", "image": next(shown).content} if p is PICTURE else {"type": "text", "text": p}
            for p in m.parts
        ]
        as_text = m.role == "tool" or (published.family == "mllama" and (m.role == "system" or bool(row.tools)))
        turn: dict[str, Any] = {"role": m.role, "content": m.text if as_text else parts}
        if m.calls:
            turn["tool_calls"] = [
                {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
                for c in m.calls
            ]
        chat.append(turn | ({"tool_call_id": m.answers, "name": m.name} if m.answers else {}))
    return chat


def options(row: Sample, published: Published) -> dict[str, Any]:
    # Where the system's text is given, what the clock says is read and not written.
    given = {key: value for key, value in published.variables if key != "strftime_now"}
    return given | ({"tools": [json.loads(t) for t in row.tools]} if row.tools else {})


def ours(published: Published, row: Sample) -> tuple[list[int], list[int]]:
    batch = Encoder(published.processor(), variables=dict(published.variables)).batch([row])
    labels = batch.labels[0].tolist()
    return batch.inputs["input_ids"][0].tolist(), [i for i, label in enumerate(labels) if label != IGNORED]


@pytest.mark.parametrize("name, case", PAIRS)
def test_labels_are_those_of_transformers_masks_and_of_the_tokens_one_by_one(name: str, case: str) -> None:
    published = PUBLISHED[name]
    row = conversations(published)[case]
    if (name, case) in REFUSED:
        with pytest.raises(DataError, match="writes the beginning of a conversation otherwise"):
            ours(published, row)
        return
    ids, found = ours(published, row)
    assert found
    assert found == by_mask(published, row, ids), "transformers' masks"
    assert found == one_by_one(published, row, ids), "token by token"


def by_mask(published: Published, row: Sample, ids: list[int]) -> list[int]:
    processor, given = published.processor(marked=True), options(row, published)
    out = processor.apply_chat_template(
        [as_chat(row, published)], tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        return_tensors="pt", processor_kwargs={"return_mm_token_type_ids": False}, **given,
    )  # fmt: skip
    assert out["input_ids"][0].tolist() == ids
    mask = out["assistant_masks"][0]
    turns = iter(m.learnt for m in row.messages if m.role == "assistant")
    found, learnt = [], False
    for t, on in enumerate(map(bool, mask)):
        if on and (t == 0 or not mask[t - 1]):
            learnt = next(turns)
        found += [t] if on and learnt else []
    return found


def one_by_one(published: Published, row: Sample, ids: list[int]) -> list[int]:
    processor = published.processor()
    chat, found = as_chat(row, published), []
    # How many tokens a picture has may follow from how many there are; none of them is ever said.
    words = [t for t, i in enumerate(ids) if i != processor.image_token_id]
    for i, message in enumerate(row.messages):
        if message.role != "assistant" or not message.learnt:
            continue
        shown = [p.content for p in row.pictures][: sum(m.n_pictures for m in row.messages[:i])]
        prompt = processor.apply_chat_template(
            chat[:i], tokenize=False, add_generation_prompt=True, **options(row, published)
        )
        if published.family == "onevision":  # it writes a space that its prompt has not
            prompt = prompt[:-1] + " \n"
        said = message.text.strip() if published.strips else message.text
        if message.calls:
            said = spelt(published, message)
        text = prompt + published.opening + said + published.closing
        # White space is split otherwise before a letter than at the end (GPT-2's pattern), so a letter follows.
        follows = "x" if said or published.opening else published.closing
        last = len(tokens(processor, "|" + follows, [])) - len(tokens(processor, "|", []))
        before, after = (tokens(processor, t, shown) for t in (prompt + follows, text))
        before = before[: len(before) - last]
        assert [ids[t] for t in words[: len(after)]] == after and after[: len(before)] == before
        found += words[len(before) : len(after)]
    return found


def tokens(processor: Any, text: str, pictures: list[Any]) -> list[int]:
    bos = processor.tokenizer.bos_token
    made = processor(text=[text], images=[pictures] if pictures else None, add_special_tokens=not text.startswith(bos))
    return [i for i in made["input_ids"][0] if i != processor.image_token_id]


def spelt(published: Published, message: Message) -> str:
    """The calls, by hand."""
    body = '{"name": "weather", "%s": {"town": "Oslo", "days": [1, null]}'
    if published.family == "pixtral":
        return "[TOOL_CALLS] [" + ", ".join(body % "arguments" + f', "id": "{c.id}"}}' for c in message.calls) + "]"
    if published.family == "mllama":
        return body % "parameters" + "}"
    return "\n".join("<tool_call>\n" + body % "arguments" + "}\n</tool_call>" for _ in message.calls)


@pytest.mark.parametrize("name", [n for n, p in PUBLISHED.items() if p.tools])
def test_calls_made_together(name: str) -> None:
    published = PUBLISHED[name]
    row = sample(*DATED, *TWO_CALLS, tools=(WEATHER,))
    if name in ONE_CALL:
        with pytest.raises(DataError, match="only supports single tool-calls"):
            ours(published, row)
    elif "thinking" in name:
        with pytest.raises(DataError, match="otherwise once more follows"):
            ours(published, row)
    else:
        ids, found = ours(published, row)
        assert found == by_mask(published, row, ids) == one_by_one(published, row, ids)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_template_that_has_no_tools_refuses_them(name: str) -> None:
    published = PUBLISHED[name]
    row = sample(*DATED, *WITH_TOOLS["tools"], tools=(WEATHER,))
    without = replace(row, messages=tuple(m for m in row.messages if not m.calls and m.role != "tool"))
    if not published.tools:
        for told in (row, without, replace(row, tools=())):
            with pytest.raises(DataError):
                ours(published, told)
    assert Encoder(published.processor(), variables=dict(published.variables)).closes == published.closes


def test_thoughts_are_learnt_where_the_template_writes_them() -> None:
    published = PUBLISHED["Qwen3-VL, thinking"]
    processor = published.processor()
    for answer in (says("a cat", thought="it has fur"), says("<think>\nit has fur\n</think>\n\na cat")):
        ids, found = ours(published, sample(user("what?", 1), answer))
        assert processor.tokenizer.decode([ids[i] for i in found]) == "it has fur\n</think>\n\na cat<|im_end|>"
    earlier = says("a cat", thought="it has fur", learnt=False)
    ids, found = ours(published, sample(user("what?", 1), earlier, user("and?"), says("4")))
    assert processor.tokenizer.decode([ids[i] for i in found]) == "\n</think>\n\n4<|im_end|>"
    with pytest.raises(DataError, match="loss: false"):
        ours(published, sample(user("what?", 1), replace(earlier, learnt=True), user("and?"), says("4")))
    with pytest.raises(DataError, match="does not write what message 1 says"):
        ours(PUBLISHED["InternVL3"], sample(user("what?", 1), says("a cat", thought="it has fur")))


def test_a_picture_that_comes_late_changes_what_llama_wrote_before() -> None:
    """It drops its system prompt, date and all, where any turn shows a picture."""
    late = sample(user("what is a cat?"), says("an animal"), user("and this?", 1), says("a dog"))
    with pytest.raises(DataError, match="otherwise once more follows"):
        ours(PUBLISHED["Llama-3.2-Vision"], late)


def test_a_clock_needs_a_date() -> None:
    for name in ("Llama-3.2-Vision", "Mistral-Small-3.1"):
        with pytest.raises(DataError, match="reads the clock"):
            Encoder(PUBLISHED[name].processor())
        with pytest.raises(DataError, match="reads the clock"):  # another variable is no date
            Encoder(PUBLISHED[name].processor(), variables={"name": "x"})
    encoder = Encoder(PUBLISHED["Mistral-Small-3.1"].processor(), variables={"strftime_now": "2024-07-26"})
    batch = encoder.batch([sample(user("what?"), says("a cat"))])
    assert "The date is 2024-07-26." in encoder.processor.tokenizer.decode(batch.inputs["input_ids"][0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_with_and_without_pictures_stand_in_one_batch(name: str) -> None:
    published = PUBLISHED[name]
    rows = [conversations(published)[case] for case in ("system", "multi-turn, pictures", "text only")]
    if name == "Qwen3-VL, thinking":
        rows = rows[::2]
    encoder = Encoder(published.processor(), variables=dict(published.variables))
    batch = encoder.batch(rows)
    for i, row in enumerate(rows):
        ids, found = ours(published, row)
        mask = batch.inputs["attention_mask"][i].bool()
        assert batch.inputs["input_ids"][i][mask].tolist() == ids
        assert [t for t, label in enumerate(batch.labels[i][mask].tolist()) if label != IGNORED] == found
