"""A conversation as its template writes it, and which characters the assistant said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jinja2

from tarsia.core.errors import DataError
from tarsia.data.samples import PICTURE, Message, Sample

Span = tuple[int, int]
_PROBE: Final = "probe"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text, with one picture marker a picture, and the assistant's [start, end) in it."""

    text: str
    spans: tuple[Span, ...]


class Template:
    """A processor's chat template, tried out before it is trusted.

    ``variables`` are the template's own (a date, say). ``marker`` is what stands for a picture in the
    text, ``closing`` what the template writes after an answer. Raises DataError where there is no template,
    it reads the clock, it does not render pictures and texts, or it has no generation prompt for what
    it writes before an answer.
    """

    def __init__(self, processor: Any, variables: Mapping[str, object] | None = None) -> None:
        self._processor, self._variables = processor, dict(variables or {})
        self._as_parts: dict[str, bool] = {}
        template = getattr(processor, "chat_template", None)
        if not template:
            raise DataError(
                f"{type(processor).__name__} has no chat template.",
                do="set processor.chat_template to the template that the model was trained with",
            )
        marker = getattr(processor, "image_token", None)
        if not isinstance(marker, str):
            raise DataError(f"{type(processor).__name__} has no image token that a template could write.")
        self.marker: str = marker
        if "strftime_now" in str(template) and not self._variables:
            raise DataError(
                "The chat template reads the clock, so the same row would change from day to day.",
                do="give it its date: variables: {date_string: 26 Jul 2024} in a recipe, or --variable",
            )
        self._try()

    def render(self, sample: Sample) -> Rendered:
        """Render ``sample``; spans follow from the texts of its beginnings, never from a search.

        An assistant's turn i starts where the text of the messages before it, with the generation
        prompt, ends, and ends where the text with it ends. Raises DataError where these are not
        beginnings of the whole, an assistant's turn holds a picture or starts the conversation, or
        the text has more picture markers than the row has pictures.
        """
        chat = self._chat(sample.messages, sample)
        whole = self._apply(chat, prompt=False, where=sample)
        spans = []
        for i, message in enumerate(sample.messages):
            if message.role != "assistant":
                continue
            if i == 0 or message.n_pictures:
                raise _refused(sample, "an assistant's turn starts the row, or holds a picture.")
            before = self._apply(chat[:i], prompt=True, where=sample)
            after = self._apply(chat[: i + 1], prompt=False, where=sample)
            if not after.startswith(before) or not whole.startswith(after):
                raise _not_a_beginning(sample, i, before if whole.startswith(after) else after, whole)
            if not all(p.strip() in whole[len(before) : len(after)] for p in message.parts if isinstance(p, str)):
                raise _refused(sample, f"the chat template does not write what message {i} says.", message.text)
            spans.append((len(before), len(after)))
        if (markers := whole.count(self.marker)) != len(sample.pictures):
            raise _refused(
                sample,
                "the rendered text and the row differ in pictures.",
                f"{markers} markers {self.marker!r}, {len(sample.pictures)} pictures",
            )
        return Rendered(whole, tuple(spans))

    def write(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The messages as the template writes them, with what asks for an answer after them where ``prompt``."""
        return self._apply(self._chat(messages, None), prompt=prompt, where=None)

    def _chat(self, messages: Sequence[Message], where: Sample | None) -> list[dict[str, object]]:
        return [self._message(message, where) for message in messages]

    def _message(self, message: Message, where: Sample | None) -> dict[str, object]:
        if message.role not in self._as_parts:
            self._as_parts[message.role] = self._takes_parts(message.role, where)
        if self._as_parts[message.role]:
            return {"role": message.role, "content": [_part(part) for part in message.parts]}
        if message.n_pictures:
            raise _refused(where, f"the chat template shows no pictures in a turn of the {message.role}.")
        return {"role": message.role, "content": message.text}

    def _takes_parts(self, role: str, where: Sample | None) -> bool:
        """Whether the template reads a list of parts in this role, or only a string."""
        user: dict[str, object] = {"role": "user", "content": [_part(_PROBE)]}
        for content in ([_part(_PROBE)], _PROBE):
            turn: dict[str, object] = {"role": role, "content": content}
            chat: list[dict[str, object]] = {"user": [turn], "system": [turn, user], "assistant": [user, turn]}[role]
            try:
                text = self._apply(chat, prompt=False, where=where)
            except DataError:
                if content is _PROBE:
                    raise
                continue
            # A template that knows no parts prints the list itself, quotes and all.
            if text.count(_PROBE) == len(chat) and not re.search(rf"['\"]{_PROBE}['\"]", text):
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

    def _apply(self, chat: Sequence[Mapping[str, object]], *, prompt: bool, where: Sample | None) -> str:
        try:
            text: str = self._processor.apply_chat_template(
                list(chat), tokenize=False, add_generation_prompt=prompt, **self._variables
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _refused(where, f"the chat template refuses it: {error}.") from None
        return text


def _part(part: object) -> dict[str, object]:
    return {"type": "image"} if part is PICTURE else {"type": "text", "text": part}


def _refused(sample: Sample | None, what: str, given: object = None) -> DataError:
    head = f"Row {sample.row} of {sample.source}" if sample else "A trial of the chat template"
    return DataError(f"{head}: {what}", given=given)


def _not_a_beginning(sample: Sample, turn: int, part: str, whole: str) -> DataError:
    same = next((k for k, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    return DataError(
        f"Row {sample.row} of {sample.source}: the chat template writes the beginning of a conversation "
        f"otherwise once more follows, so what message {turn} says can not be told exactly.",
        given=f"{part[max(0, same - 20) : same + 40]!r} became {whole[max(0, same - 20) : same + 40]!r}",
        do="use a template that keeps earlier turns as they are (no dropped thoughts), or rows of one turn",
    )
