"""A conversation as its template writes it, and which characters the assistant said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tarsia.core.errors import DataError
from tarsia.data.bounds import check_bounded
from tarsia.data.samples import PICTURE, Call, Message, Sample

Span = tuple[int, int]
_PROBE: Final = "probe"
_TRIAL: Final = Call("f", "{}", "trial0000")  # some templates want ids of nine characters
_CLOCK: Final = "tarsia: no clock here"
# Private use characters: nothing that a template looks for, cuts off or changes the case of.
_OTHER: Final = "\ue0f1\ue0f2\ue0f3"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text, with one picture marker a picture, and the assistant's [start, end) in it."""

    text: str
    spans: tuple[Span, ...]


class Template:
    """A processor's chat template, tried out before it is trusted.

    ``variables`` are the template's own (a date, say); ``strftime_now`` among them is what the clock says
    to a template that reads it whatever it is given. ``marker`` is what stands for a picture in the text,
    ``closing`` what the template writes after an answer. Raises DataError where there is no template, it
    could run without end, it reads the clock, it does not render pictures and texts, or it has no
    generation prompt for what it writes before an answer.
    """

    def __init__(self, processor: Any, variables: Mapping[str, object] | None = None) -> None:
        self._processor, self._variables = processor, dict(variables or {})
        self._as_parts: dict[tuple[str, bool], bool] = {}
        template = getattr(processor, "chat_template", None)
        if not template:
            raise DataError(
                f"{type(processor).__name__} has no chat template.",
                do="set processor.chat_template to the template that the model was trained with; models that know "
                "a prefix and a suffix and no turns (PaliGemma, BLIP-2) can not be taught with conversations here",
            )
        if isinstance(template, Mapping):  # named templates, of which apply_chat_template takes this one
            if "default" not in template:
                raise DataError(
                    f"{type(processor).__name__} has named chat templates and none that is the default.",
                    given=", ".join(map(str, template)),
                    do="set processor.chat_template to one of them",
                )
            template = template["default"]
        marker = getattr(processor, "image_token", None)
        if not isinstance(marker, str):
            raise DataError(f"{type(processor).__name__} has no image token that a template could write.")
        self.marker: str = marker
        if not isinstance(template, str):
            raise DataError("A chat template is a text.", given=type(template).__name__)
        check_bounded(template)
        self._clock = _clock(template, self._variables)
        self._try()

    def render(self, sample: Sample) -> Rendered:
        """Render ``sample``; spans follow from the texts of its beginnings, never from a search for the answer.

        A turn that is learnt begins where the text of the messages before it, with the generation prompt,
        ends: in training the model then stands where it stands when it is asked. (A prompt that ends in
        other white space than the turn's header is let through: the turn then begins with its answer.) It
        ends where the text with it ends; where the template writes the turn otherwise once more follows, as
        those that drop earlier thoughts do, where the turn ends with another text in the answer's place.

        Raises DataError where that is not so, an assistant's turn holds a picture or starts the
        conversation, the template leaves out the answer, a call, a thought or a tool, or the text has more
        picture markers than the row has pictures.
        """
        chat = self._chat(sample.messages, sample, sample.tools)
        whole = self._apply(chat, prompt=False, where=sample, tools=sample.tools)
        spans = []
        for i, message in enumerate(sample.messages):
            if message.role != "assistant":
                continue
            if i == 0 or message.n_pictures:
                raise _refused(sample, "an assistant's turn starts the row, or holds a picture.")
            if message.learnt:
                spans.append(self._span(sample, i, chat, whole))
        if (markers := whole.count(self.marker)) != len(sample.pictures):
            raise _refused(
                sample,
                "the rendered text and the row differ in pictures.",
                f"{markers} markers {self.marker!r}, {len(sample.pictures)} pictures",
            )
        if missing := [name for name in map(_tool_name, sample.tools) if name not in whole]:
            raise _refused(sample, "the chat template does not write the row's tools.", ", ".join(missing))
        return Rendered(whole, tuple(spans))

    def _span(self, sample: Sample, i: int, chat: Sequence[Mapping[str, object]], whole: str) -> Span:
        """Where turn ``i`` begins and ends in ``whole``, proved."""
        message = sample.messages[i]
        before = self._apply(chat[:i], prompt=True, where=sample, tools=sample.tools)
        after = self._apply(chat[: i + 1], prompt=False, where=sample, tools=sample.tools)
        if after.startswith(before) and whole.startswith(after):
            span = len(before), len(after)
        else:
            found = None if message.calls else self._in_its_place(sample, i, chat, whole)
            start = None if found is None else _start(before, whole[: found[0]])
            if found is None or start is None:
                raise _not_a_beginning(sample, i, before if whole.startswith(after) else after, whole)
            span = start, found[1]
        said = whole[slice(*span)]
        # The prompt may say the beginning of an answer: it opens a thought, say. That part is not learnt.
        opened = self._apply(chat[:i], prompt=False, where=sample, tools=sample.tools)
        written = whole[len(opened) : span[1]] if whole.startswith(opened) else said
        wanted = [*(p for p in message.parts if isinstance(p, str)), message.thought]
        if not all(text.strip() in written for text in wanted):
            raise _refused(sample, f"the chat template does not write what message {i} says.", message.text)
        if not all(word in said for call in message.calls for word in (call.name, *_leaves(call.arguments))):
            raise _refused(sample, f"the chat template does not write what message {i} calls.", message.calls[0].name)
        return span

    def _in_its_place(self, sample: Sample, i: int, chat: Sequence[Mapping[str, object]], whole: str) -> Span | None:
        """Where the answer of turn ``i`` begins, and the turn ends: everything else stays when it is another text."""
        other = [*chat]
        other[i] = self._message(replace(sample.messages[i], parts=(_OTHER,)), sample, sample.tools)
        put = self._apply(other, prompt=False, where=sample, tools=sample.tools).split(_OTHER)
        alone = self._apply(other[: i + 1], prompt=False, where=sample, tools=sample.tools).split(_OTHER)
        if len(put) != 2 or len(alone) != 2 or not put[1].startswith(alone[1]):
            return None
        (head, tail), closing = put, alone[1]
        end = len(whole) - len(tail)
        same = whole.startswith(head) and whole.endswith(tail) and len(head) <= end
        if not same or whole[len(head) : end].strip() != sample.messages[i].text.strip():
            return None
        return len(head), end + len(closing)

    def write(self, messages: Sequence[Message], *, prompt: bool, tools: Sequence[str] = ()) -> str:
        """The messages as the template writes them, with what asks for an answer after them where ``prompt``."""
        return self._apply(self._chat(messages, None, tools), prompt=prompt, where=None, tools=tools)

    def _chat(self, messages: Sequence[Message], where: Sample | None, tools: Sequence[str]) -> list[dict[str, object]]:
        return [self._message(message, where, tools) for message in messages]

    def _message(self, message: Message, where: Sample | None, tools: Sequence[str]) -> dict[str, object]:
        # Llama 3's writes tools into what the user says first, and takes that as a string then only.
        key = message.role, bool(tools)
        if key not in self._as_parts:
            self._as_parts[key] = self._takes_parts(message.role, where, tools)
        if message.n_pictures and not self._as_parts[key]:
            raise _refused(where, f"the chat template shows no pictures in a turn of the {message.role}.")
        parts = [_part(part) for part in message.parts] if self._as_parts[key] else message.text
        turn: dict[str, object] = {"role": message.role, "content": parts}
        # Templates ask whether a key is there, so none is there for nothing.
        calls = [_call(call) for call in message.calls]
        rest = {
            "tool_calls": calls,
            "reasoning_content": message.thought,
            "tool_call_id": message.answers,
            "name": message.name,
        }
        return turn | {key: value for key, value in rest.items() if value}

    def _takes_parts(self, role: str, where: Sample | None, tools: Sequence[str]) -> bool:
        """Whether the template reads a list of parts in this role, or only a string."""
        inside = role != "user" and self._as_parts.get(("user", bool(tools)), True)
        user: dict[str, object] = {"role": "user", "content": [_part(_PROBE)] if inside else _PROBE}
        calls: dict[str, object] = {"role": "assistant", "content": "", "tool_calls": [_call(_TRIAL)]}
        for content in ([_part(_PROBE)], _PROBE):
            turn: dict[str, object] = {"role": role, "content": content}
            trials: dict[str, list[dict[str, object]]] = {
                "user": [turn],
                "system": [turn, user],
                "assistant": [user, turn],
                "tool": [user, calls, turn | {"tool_call_id": _TRIAL.id, "name": _TRIAL.name}],
            }
            chat = trials[role]
            try:
                text = self._apply(chat, prompt=False, where=where, tools=tools)
            except DataError:
                if content is _PROBE:
                    raise
                continue
            # A template that knows no parts prints the list itself, quotes and all; texts it may put in quotes.
            listed = not isinstance(content, str) and re.search(rf"['\"]{_PROBE}['\"]", text)
            if text.count(_PROBE) == sum(turn["content"] != "" for turn in chat) and not listed:
                return not isinstance(content, str)
        raise _refused(where, f"the chat template does not write what the {role} says.", text)

    def _try(self) -> None:
        question, answer = Message("user", (PICTURE, _PROBE)), Message("assistant", (_PROBE,))
        asked = self.write([question], prompt=False)
        if asked.count(self.marker) != 1:
            raise DataError(
                "The chat template does not write the image token for a picture.",
                given=self.marker,
                do="use the template that belongs to this processor",
            )
        prompted = self.write([question], prompt=True)
        said = self.write([question, answer], prompt=False).removeprefix(prompted)
        header, _, self.closing = said.partition(_PROBE)
        if header.strip() and prompted == asked:
            raise DataError(
                "The chat template has no generation prompt, so an answer's header would be learnt with it.",
                given=repr(header.strip()),
                do="let the template write it under {% if add_generation_prompt %}",
            )

    def _apply(
        self, chat: Sequence[Mapping[str, object]], *, prompt: bool, where: Sample | None, tools: Sequence[str] = ()
    ) -> str:
        options: dict[str, object] = {"tools": [json.loads(tool) for tool in tools]} if tools else {}
        try:
            text: str = self._processor.apply_chat_template(
                list(chat), tokenize=False, add_generation_prompt=prompt, **self._clock, **options, **self._variables
            )
        except Exception as error:  # noqa: BLE001 (a template is a program of somebody's: it may raise anything)
            if _CLOCK in str(error):
                raise DataError(
                    "The chat template reads the clock, so the same row would change from day to day.",
                    do="give it its date: variables: {date_string: 26 Jul 2024} in a recipe, or --variable; or "
                    "{strftime_now: 26 Jul 2024} for a template that asks for no other",
                ) from None
            raise _refused(where, f"the chat template refuses it: {str(error) or type(error).__name__}.") from None
        return text


def _clock(template: str, variables: dict[str, object]) -> dict[str, object]:
    """The template with a macro in the clock's place: it says the date that is given, or refuses."""
    if "strftime_now" not in template:
        return {}
    said = variables.pop("strftime_now", None)
    body = f"raise_exception({json.dumps(_CLOCK)})" if said is None else json.dumps(str(said))
    return {"chat_template": f"{{%- macro strftime_now(form) -%}}{{{{ {body} }}}}{{%- endmacro %}}\n{template}"}


def _start(before: str, head: str) -> int | None:
    """Where a turn begins whose answer follows ``head``: after the prompt, or, past other white space, at once."""
    if head.startswith(before):
        return len(before)
    stem = before.rstrip()
    return len(head) if head.startswith(stem) and not head[len(stem) :].strip() else None


def _part(part: object) -> dict[str, object]:
    return {"type": "image"} if part is PICTURE else {"type": "text", "text": part}


def _call(call: Call) -> dict[str, object]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"type": "function", "function": function, **({"id": call.id} if call.id else {})}


def _tool_name(tool: str) -> str:
    return str(json.loads(tool)["function"]["name"])


def _leaves(arguments: str) -> Iterator[str]:
    """Every key and value of a call's arguments, as JSON and as most templates write it."""
    waiting = [json.loads(arguments)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            yield json.dumps(value, ensure_ascii=False)[1:-1]


def _refused(sample: Sample | None, what: str, given: object = None) -> DataError:
    head = f"Row {sample.row} of {sample.source}" if sample else "A trial of the chat template"
    return DataError(f"{head}: {what}", given=given)


def _not_a_beginning(sample: Sample, turn: int, part: str, whole: str) -> DataError:
    same = next((k for k, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    return DataError(
        f"Row {sample.row} of {sample.source}: the chat template writes the beginning of a conversation "
        f"otherwise once more follows, so what message {turn} says can not be told exactly.",
        given=f"{part[max(0, same - 20) : same + 40]!r} became {whole[max(0, same - 20) : same + 40]!r}",
        do="use a template that keeps earlier turns as they are (no dropped thoughts), rows of one turn, or mark "
        "the earlier turns with `loss: false`",
    )
