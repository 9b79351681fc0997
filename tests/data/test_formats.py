"""Row formats of other libraries: each read as the same conversation, and refused with what to do."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from data.processors import picture
from data.test_samples import encoded

from tarsia.core.errors import DataError
from tarsia.data import PICTURE, Call, Message, Place, Sample, read_row

PLACE = Place("cells", 2, Path("/folder"))
USER, SAYS = Message("user", (PICTURE, "what?")), Message("assistant", ("a cat",))
MORE = (Message("user", ("and?",)), Message("assistant", ("a dog",)))
URL = "data:image/png;base64," + base64.b64encode(encoded(picture())).decode()


def row(columns: object, columnar: bool = False) -> Sample:
    assert isinstance(columns, dict)
    return read_row(columns, Place("cells", 2, Path("/folder"), columnar))


def said(*turns: str, role: str = "role", content: str = "content", names: str = "user assistant") -> list[object]:
    return [{role: names.split()[i % 2], content: text} for i, text in enumerate(turns)]


def humans(*turns: str) -> list[object]:
    return said(*turns, role="from", content="value", names="human gpt")


PARTS = [{"type": "image"}, {"type": "text", "text": "what?"}]
FOUR = ("<image>\nwhat?", "a cat", "and?", "a dog")
SAME = {
    "LLaVA": {"id": "7", "image": "a.png", "conversations": humans(*FOUR)},
    "LLaVA, a list": {"id": 7, "image": ["a.png"], "conversations": humans(*FOUR)},
    "ShareGPT": {"conversations": humans(*FOUR), "images": ["a.png"], "system": "", "tools": "", "videos": []},
    "ShareGPT, nulls": {"conversations": humans(*FOUR), "images": ["a.png"], "system": None, "audios": None},
    "messages": {"messages": said(*FOUR), "images": ["a.png"]},
    "ms-swift, no marker": {"messages": said("what?", *FOUR[1:]), "images": ["a.png"], "tools": []},
    "TRL, parts": {"messages": [{"role": "user", "content": PARTS}, *said(*FOUR)[1:]], "image": "a.png"},
    "Qwen": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "file:///folder/a.png"}, PARTS[1]]},
            *said(*FOUR)[1:],
        ]
    },
    "OpenAI": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, PARTS[1]]},
            *said(*FOUR)[1:],
        ]
    },
}


@pytest.mark.parametrize("name", SAME)
def test_every_spelling_is_the_same_conversation(name: str) -> None:
    sample = row(SAME[name])
    assert sample.messages == (USER, SAYS, *MORE)
    assert [p.content for p in sample.pictures] == [Path("/folder/a.png")]
    assert sample.tools == ()


def test_trl_prompts_learn_the_completion_only() -> None:
    as_text = row({"prompt": "what?", "completion": "a cat", "images": ["a.png"]})
    assert as_text.messages == (USER, SAYS)
    as_lists = row({"prompt": said("<image>what?", "a cat", "and?"), "completion": MORE_AS_ROW, "images": ["a.png"]})
    assert [m.text for m in as_lists.messages] == ["what?", "a cat", "and?", "a dog"]
    assert [m.learnt for m in as_lists.messages] == [True, False, True, True]
    assert row({"prompt": said("hi"), "completion": MORE_AS_ROW, "images": []}).pictures == ()


MORE_AS_ROW = [{"role": "assistant", "content": "a dog"}]


def test_openai_pictures_come_in_the_order_of_their_parts() -> None:
    content = [
        {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
        {"type": "text", "text": "left <image>, right"},
        {"type": "image"},
        {"type": "image_url", "image_url": "b.png"},
    ]
    sample = row({"messages": [{"role": "user", "content": content}], "images": ["a.png"]})
    assert sample.messages[0].parts == (PICTURE, "left <image>, right", PICTURE, PICTURE)
    assert sample.pictures[0].load().tobytes() == picture().tobytes()
    assert [p.content for p in sample.pictures[1:]] == [Path("/folder/a.png"), Path("/folder/b.png")]


WEATHER = {"name": "weather", "description": "of a town", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "weather", "arguments": {"town": "Oslo", "days": None}}
TOOL_TURNS = (
    Message("user", ("is it cold?",)),
    Message("assistant", (), (Call("weather", '{"town": "Oslo", "days": null}'),)),
    Message("tool", ("-3 <image>",)),
    Message("assistant", ("yes",)),
)
WITH_TOOLS = {
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "is it cold?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "-3 <image>"},
            {"from": "gpt", "value": "yes"},
        ],
        "tools": json.dumps([WEATHER]),
    },
    "OpenAI": {
        "messages": [
            {"role": "user", "content": "is it cold?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": json.dumps(CALL["arguments"])}}
            ]},
            {"role": "tool", "content": "-3 <image>"},
            {"role": "assistant", "content": "yes"},
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    },
    "ms-swift": {
        "messages": [
            {"role": "user", "content": "is it cold?"},
            {"role": "tool_call", "content": json.dumps(CALL)},
            {"role": "tool_response", "content": "-3 <image>"},
            {"role": "assistant", "content": "yes"},
        ],
        "tools": [json.dumps(WEATHER)],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_and_calls_are_the_same_from_everywhere(name: str) -> None:
    sample = row(WITH_TOOLS[name])
    assert sample.messages == TOOL_TURNS
    assert [json.loads(tool) for tool in sample.tools] == [{"type": "function", "function": WEATHER}]


def test_calls_made_together_are_one_turn() -> None:
    two = [{"name": "a", "arguments": {}}, {"name": "b", "arguments": '{"x": 1}'}]
    wanted = (Call("a", "{}"), Call("b", '{"x": 1}'))
    together = row(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(two)}]}
    )
    apart = row(
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "I look."},
                *({"role": "tool_call", "content": json.dumps(call)} for call in two),
            ]
        }
    )
    assert together.messages[1] == Message("assistant", (), wanted)
    assert apart.messages[1] == Message("assistant", ("I look.",), wanted)


def test_ids_names_thoughts_and_what_is_not_learnt() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
    sample = row(
        {
            "messages": [
                {"role": "user", "content": "q", "tool_calls": None},
                {"role": "assistant", "content": "", "tool_calls": [call], "loss": False},
                {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "f"},
                {"role": "assistant", "content": "four", "reasoning_content": "2 + 2", "weight": 1},
            ]
        }
    )
    asked, told, says = sample.messages[1:]
    assert (asked.calls, asked.learnt) == ((Call("f", "{}", "c1"),), False)
    assert (told.answers, told.name) == ("c1", "f")
    assert (says.thought, says.learnt) == ("2 + 2", True)


def test_empty_answers_are_answers() -> None:
    for columns in (
        {"question": "q", "answer": ""},
        {"messages": said("q", "")},
        {"conversations": humans("q", "")},
        {"prompt": "q", "completion": ""},
    ):
        assert row(columns).messages == (Message("user", ("q",)), Message("assistant", ("",)))


def chat(**message: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"} | message]}


@pytest.mark.parametrize(
    "columns, says",
    [
        ({"conversations": humans("<image>q", "a")}, "more picture placeholders"),
        ({"conversations": humans("q", "a"), "image": "a.png"}, "fewer picture placeholders"),
        ({"messages": said("<image>q", "a"), "images": ["a", "b"]}, "fewer picture placeholders"),
        ({"messages": said("a <image>q", "a")}, "more picture placeholders"),
        ({"conversations": said("q", "a")}, "belong into the column `messages`"),
        ({"messages": humans("q", "a")}, "other keys"),
        ({"conversations": [{"from": "critic", "value": "x"}]}, "unknown speaker"),
        ({"conversations": [{"from": "human", "value": None}]}, "who speaks and what is said"),
        ({"conversations": humans("q", "a"), "messages": said("q", "a")}, "no format understands"),
        ({"conversations": humans("q", "a"), "videos": ["v.mp4"]}, "it has videos"),
        ({"messages": said("q", "a"), "audios": ["a.wav"]}, "it has audios"),
        ({"messages": said("q", "a"), "rejected_response": "b"}, "understands: rejected_response"),
        ({"messages": said("q", "a"), "objects": {"bbox": []}}, "understands: objects"),
        ({"messages": said("q", "a"), "channel": "x", "loss_scale": "y"}, "understands: channel, loss_scale"),
        ({"conversations": humans("q", "a"), "system": "be kind", "tools": "{"}, "`tools` is not JSON"),
        ({"conversations": [{"from": "system", "value": "s"}], "system": "t"}, "both the column `system`"),
        ({"conversations": humans("q", "a"), "tools": "[4]"}, "a tool is not understood"),
        ({"conversations": humans("q", "a"), "tools": '{"name": "f"}'}, "`tools` is not a list"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "call of a tool is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "call of a tool is not understood"),
        ({"conversations": [{"from": "function_call", "value": "[" * 90_000}]}, "call of a tool is not JSON"),
        (chat(tool_calls=[{"name": "f", "arguments": "[]"}]), "no JSON object"),
        (chat(tool_calls=[{"name": "f", "arguments": {}, "score": 1}]), "call of a tool is not understood"),
        (chat(tool_calls={"name": "f"}), "not a list"),
        (chat(loss=0.5), "no more"),
        (chat(loss=True, weight=1), "no more"),
        (
            chat(content=[{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}]),
            "image_url is not understood",
        ),
        (chat(content=[{"type": "image_url", "image_url": {"url": "https://x/a.png"}}]), "not downloaded"),
        (chat(content=[{"type": "image", "image": "a.png", "size": 3}]), "part of a message is not understood"),
        (chat(content=[{"type": "video_url", "video_url": "x"}]), "part of a message is not understood"),
        ({"prompt": "q", "completion": said("q", "a")}, "the other is not"),
        ({"prompt": said("q"), "completion": said("q")}, "said by an assistant"),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": [CALL]}]}, "only an assistant calls"),
    ],
)
def test_what_can_not_be_meant_is_refused(columns: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        row(columns)
    assert "Row 2 of cells" in str(error.value)


def test_nulls_of_a_table_are_not_taken_for_the_rows() -> None:
    """Parquet fills the fields that one row has and another has not; in JSON a null was written by somebody."""
    columns = {"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    assert "null" in row(columns).messages[0].calls[0].arguments
    with pytest.raises(DataError, match="also writes null for what is absent"):
        row(columns, columnar=True)
    as_text = [{"name": "f", "arguments": '{"x": null}'}]
    with pytest.raises(DataError, match="JSON text"):
        row(columns | {"tools": [WEATHER | {"default": None}]}, columnar=True)
    assert row({"messages": [{"role": "assistant", "tool_calls": as_text}]}).messages[0].calls
