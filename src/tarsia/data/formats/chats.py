"""Rows of messages: OpenAI's, TRL's, ms-swift's; and prompts with completions, as TRL has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from tarsia.data.formats.parts import pictures_first, read_list, read_picture, read_pictures, read_text, split_markers
from tarsia.data.formats.registry import Place, Row, row_format, shown
from tarsia.data.formats.tools import read_call_text, read_calls, read_tools
from tarsia.data.samples import PICTURE, Message, Picture, Placeholder, Sample

# ms-swift's roles beside OpenAI's: a turn that is nothing but calls, and what a tool answers.
_CALLS: Final = ("tool_call", "function_call")
_ANSWERS: Final = ("tool_response", "observation")
_KEYS: Final = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content"})
# Whether a message is learnt from: ms-swift's name for it, and OpenAI's.
_LEARNT: Final = ("loss", "weight")
_PART: Final = (
    '{"type": "text", "text"}, {"type": "image"} (its file goes into `images`), {"type": "image", "image"} or '
    '{"type": "image_url", "image_url": {"url"}}'
)


class _Album:
    """The pictures of a row in the order of their placeholders: from its column, or from the very part."""

    def __init__(self, row: Row, place: Place) -> None:
        self._column = list(read_pictures(row, place))
        self._waiting = iter(self._column)
        self._taken: list[Picture | None] = []

    @property
    def column(self) -> int:
        """How many pictures the row's column has."""
        return len(self._column)

    @property
    def shown(self) -> int:
        """How many placeholders there are so far."""
        return len(self._taken)

    def show(self, own: Picture | None) -> Placeholder:
        """Note a placeholder; ``own`` is its picture where the part brings it."""
        self._taken.append(own)
        return PICTURE

    def pictures(self) -> tuple[Picture, ...]:
        """As many as the row has; a Sample refuses them where the placeholders are more or fewer."""
        taken = [own or next(self._waiting, None) for own in self._taken]
        return (*(picture for picture in taken if picture), *self._waiting)


@row_format("messages", required=("messages",), optional=("image", "images", "tools"))
def read_messages(row: Row, place: Place) -> Sample:
    """``messages`` of {role, content}; pictures where <image> stands, or first where it stands nowhere."""
    album = _Album(row, place)
    messages = _turns(row["messages"], "`messages`", place, album)
    return _sample(messages, row, place, album)


@row_format("prompt and completion", required=("prompt", "completion"), optional=("image", "images", "tools"))
def read_prompt(row: Row, place: Place) -> Sample:
    """TRL's: two texts, or two lists of messages. Only what is said in the completion is learnt."""
    album = _Album(row, place)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise place.error("one of `prompt` and `completion` is a text, the other is not.", allowed="two of a kind")
    if isinstance(prompt, str):
        given = _parts(read_text(prompt, "`prompt`", place), "user", place, album)
        said = read_text(completion, "`completion`", place)
        return _sample((Message("user", given), Message("assistant", (said,))), row, place, album)
    before = tuple(_unlearnt(m) for m in _turns(prompt, "`prompt`", place, album))
    after = _turns(completion, "`completion`", place, album)
    if any(message.role not in ("assistant", "tool") for message in after):
        raise place.error("a completion is said by an assistant.", given=", ".join(m.role for m in after))
    return _sample((*before, *after), row, place, album)


def _sample(messages: Sequence[Message], row: Row, place: Place, album: _Album) -> Sample:
    if not album.shown:
        messages = pictures_first(messages, album.column)
    return Sample(tuple(messages), album.pictures(), place.source, place.row, read_tools(row, place))


def _unlearnt(message: Message) -> Message:
    if message.role != "assistant":
        return message
    return Message("assistant", message.parts, message.calls, message.thought, learnt=False)


def _turns(value: object, name: str, place: Place, album: _Album) -> tuple[Message, ...]:
    messages: list[Message] = []
    for turn in read_list(value, name, place):
        if not isinstance(turn, Mapping):
            raise place.error("a message is not an object.", given=shown(turn), allowed='{"role", "content"}')
        turn = {str(key): held for key, held in turn.items() if held is not None}
        message = _turn(turn, place, album)
        # ms-swift writes what is said and each call as turns of their own that follow each other.
        if turn["role"] in _CALLS and messages and messages[-1].role == "assistant":
            last = messages.pop()
            if last.learnt != message.learnt:
                raise place.error("calls of one turn differ in whether they are learnt.", given=shown(turn))
            message = replace(last, calls=last.calls + message.calls)
        messages.append(message)
    return tuple(messages)


def _turn(turn: Mapping[str, object], place: Place, album: _Album) -> Message:
    if "role" not in turn or not ("content" in turn or turn.get("tool_calls")) or set(turn) - {*_KEYS, *_LEARNT}:
        raise place.error(
            "a message has other keys than a role and a content.",
            given=", ".join(sorted(turn)),
            allowed="role, content, name, tool_call_id; of an assistant tool_calls, reasoning_content, loss or weight",
        )
    role, content = read_text(turn["role"], "a message's role", place), turn.get("content", ())
    if role in _CALLS:
        text = read_text(content, "the content of a call", place)
        return Message("assistant", (), read_call_text(text, place), learnt=_learnt(turn, place))
    role = "tool" if role in _ANSWERS else role
    return Message(
        role,
        _parts(content, role, place, album),
        read_calls(turn.get("tool_calls") or (), place),
        read_text(turn.get("reasoning_content", ""), "`reasoning_content`", place),
        read_text(turn.get("tool_call_id", ""), "`tool_call_id`", place),
        read_text(turn.get("name", ""), "a message's name", place),
        _learnt(turn, place),
    )


def _learnt(turn: Mapping[str, object], place: Place) -> bool:
    given = [turn[key] for key in _LEARNT if key in turn]
    if not given:
        return True
    if len(given) > 1 or given[0] not in (0, 1) or turn["role"] not in ("assistant", *_CALLS):
        raise place.error(
            "`loss` or `weight` says whether an assistant's message is learnt, no more.",
            given=shown(given),
            allowed="one of them, in an assistant's message: true or false, 1 or 0",
            do="other weights by message are not built in: take them out",
        )
    return bool(given[0])


def _parts(content: object, role: str, place: Place, album: _Album) -> tuple[str | Placeholder, ...]:
    if isinstance(content, str):
        text = read_text(content, "a message's content", place)
        # What an assistant or a tool says is text to the letter: only the others can show a picture.
        parts = (text,) if role in ("assistant", "tool") else split_markers(text)
        return tuple(album.show(None) if part is PICTURE else part for part in parts)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise place.error("a message's content is neither a text nor a list.", given=shown(content))
    return tuple(_part(part, place, album) for part in content)


def _part(part: object, place: Place, album: _Album) -> str | Placeholder:
    given = {str(k): v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
    kind = given.pop("type", None)
    if kind == "text" and set(given) == {"text"}:
        return read_text(given["text"], "a part's text", place)
    if kind == "image" and not given:
        return album.show(None)
    if kind == "image" and len(given) == 1 and set(given) <= {"image", "url", "path"}:
        return album.show(read_picture(next(iter(given.values())), place))
    if kind == "image_url" and set(given) == {"image_url"}:
        return album.show(_from_url(given["image_url"], place))
    raise place.error("a part of a message is not understood.", given=shown(part), allowed=_PART)


def _from_url(value: object, place: Place) -> Picture:
    """OpenAI's part; its `detail` may say how large the picture is shown, which the processor decides here."""
    given = {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {"url": value}
    if given.pop("detail", "auto") not in ("auto", "high") or set(given) != {"url"}:
        raise place.error(
            "an image_url is not understood.",
            given=shown(value),
            allowed='a URL, or {"url", "detail": "auto" or "high"}',
            do="scale the picture down yourself where its detail is low",
        )
    return read_picture(given["url"], place)
