"""Rows of conversations: LLaVA's {from, value}, and ShareGPT's as LLaMA-Factory writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tarsia.data.formats.parts import read_list, read_pictures, read_text, split_markers
from tarsia.data.formats.registry import Place, Row, row_format, shown
from tarsia.data.formats.tools import read_call_text, read_tools
from tarsia.data.samples import Message, Sample

SPEAKERS: Final[Mapping[str, str]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
"""Who speaks, as these rows spell it, and the role."""


@row_format("conversations", required=("conversations",), optional=("image", "images", "system", "tools"))
def read_conversation(row: Row, place: Place) -> Sample:
    """``conversations`` of {from, value}; every picture has its <image> in what a human says."""
    messages = tuple(_turn(turn, place) for turn in read_list(row["conversations"], "`conversations`", place))
    system = read_text(row.get("system", ""), "`system`", place)
    if system and messages and messages[0].role == "system":
        raise place.error(
            "both the column `system` and the first turn say what the system says.", allowed="one of them"
        )
    if system:
        messages = (Message("system", (system,)), *messages)
    return Sample(messages, read_pictures(row, place), place.source, place.row, read_tools(row, place))


def _turn(turn: object, place: Place) -> Message:
    given = {str(k): v for k, v in turn.items() if v is not None} if isinstance(turn, Mapping) else {}
    if set(given) != {"from", "value"}:
        raise place.error(
            "a turn has other keys than who speaks and what is said.",
            given=shown(turn),
            allowed='{"from", "value"}',
            do="rows of {role, content} belong into the column `messages`",
        )
    speaker = read_text(given["from"], "a turn's `from`", place)
    text = read_text(given["value"], "a turn's value", place)
    if speaker not in SPEAKERS:
        raise place.error("a turn is of an unknown speaker.", given=repr(speaker), allowed=", ".join(SPEAKERS))
    if speaker == "function_call":
        return Message("assistant", (), read_call_text(text, place))
    role = SPEAKERS[speaker]
    return Message(role, split_markers(text) if role in ("user", "system") else (text,))
