"""A chat as the worker takes it, and what the worker says as OpenAI's clients take it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from tarsia.serve import wire
from tarsia.serve.http import answers
from tarsia.serve.http.errors import Refusal
from tarsia.serve.http.pictures import Seen, of_data
from tarsia.serve.http.remote import Fetcher
from tarsia.serve.http.room import Share
from tarsia.serve.http.running import Run
from tarsia.serve.http.schema import ChatRequest, ImagePart, TextPart
from tarsia.serve.http.settings import Limits
from tarsia.serve.request import Sampling


def check(asked: ChatRequest, limits: Limits) -> None:
    """Raises Refusal (400) where the request asks for more than the server gives, by the name of it."""
    texts, pictures = _texts(asked), len(_images(asked))
    for given, allowed, param, what in (
        (len(asked.messages), limits.messages, "messages", "There are too many messages."),
        (sum(map(len, texts)), limits.text, "messages", "The texts are too long: characters."),
        (pictures, limits.pictures, "messages", "There are too many pictures."),
        (asked.most or 0, limits.tokens, "max_tokens", "The answer may not be as long."),
        (asked.n or 1, limits.choices, "n", "There are too many choices."),
        (asked.top_logprobs or 0, limits.logprobs, "top_logprobs", "There are too many likeliest tokens."),
        (len(asked.stops), limits.stops, "stop", "There are too many stop strings."),
        (max(map(len, asked.stops), default=0), limits.stop, "stop", "A stop string is too long."),
        (len(asked.logit_bias or ()), limits.biases, "logit_bias", "There are too many biases."),
        (len(asked.answer_schema or ""), limits.schema, "response_format", "The schema is too large."),
    ):
        if given > allowed:
            raise Refusal.invalid(what, param, given=f"{param}: {given}", allowed=f"at most {allowed}")


def sampling(asked: ChatRequest, most: int) -> Sampling:
    """How the answers are drawn; ``most`` tokens where the request does not say."""
    return Sampling(
        max_tokens=asked.most,
        at_most=most,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(0, asked.top_k or 0),
        seed=asked.seed,
        stop=asked.stops,
        choices=asked.n or 1,
        logprobs=asked.top_logprobs or 0 if asked.logprobs else None,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        bias={int(token): value for token, value in (asked.logit_bias or {}).items()},
        schema=asked.answer_schema,
        ignore_end=bool(asked.ignore_eos),
    )


def messages(asked: ChatRequest) -> tuple[wire.ChatMessage, ...]:
    """The conversation with its parts in their order; pictures are places."""
    return tuple(
        wire.ChatMessage(
            role=message.role,
            content=(wire.TextPart(text=message.content),)
            if isinstance(message.content, str)
            else tuple(
                wire.TextPart(text=part.text) if isinstance(part, TextPart) else wire.PicturePart()
                for part in message.content
            ),
        )
        for message in asked.messages
    )


async def pictures(asked: ChatRequest, limits: Limits, fetcher: Fetcher, share: Share) -> list[bytes]:
    """The pictures as they came, in the order of their places. Raises Refusal (400, 429)."""
    found: list[bytes] = []
    size = pixels = 0
    for place, part in _images(asked):
        url = part.image_url.url
        if url[:5].lower() == "data:":
            seen: Seen = await asyncio.to_thread(of_data, url, limits, place)
        else:
            seen = await fetcher.fetch(url, place, share)
        found.append(seen.raw)
        size, pixels = size + len(seen.raw), pixels + seen.pixels
        if pixels > limits.all_pixels:
            raise Refusal.invalid("The pictures have too many pixels together.", "messages", allowed=limits.all_pixels)
        if size > limits.all_pictures:
            raise Refusal.invalid("The pictures have too many bytes together.", "messages", allowed=limits.all_pictures)
    return found


def _texts(asked: ChatRequest) -> list[str]:
    return [
        text
        for message in asked.messages
        for text in (
            [message.content]
            if isinstance(message.content, str)
            else [part.text for part in message.content if isinstance(part, TextPart)]
        )
    ]


def _images(asked: ChatRequest) -> list[tuple[str, ImagePart]]:
    return [
        (f"messages.{i}.content.{j}.image_url", part)
        for i, message in enumerate(asked.messages)
        if not isinstance(message.content, str)
        for j, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def headers(started: wire.Started) -> dict[str, str]:
    """Who answers, for those who do not read bodies."""
    by = started.adapter
    found = {
        "x-tarsia-adapter": "(base)" if by is None else by.name if by.version is None else f"{by.name}@{by.version}"
    }
    if by is not None:
        found["x-tarsia-adapter-hash"] = by.hash
    return found


async def whole(run: Run, started: wire.Started, asked: ChatRequest) -> answers.ChatAnswer:
    """All answers, when they are complete. Raises Refusal."""
    texts = [""] * run.choices
    told: list[list[answers.TokenLogprob]] = [[] for _ in texts]
    reasons: dict[int, Any] = {}
    async for event in run.events():
        if isinstance(event, wire.Done):
            reasons[event.choice] = event.reason
            continue
        texts[event.choice] += event.text
        if (found := answers.logprobs(event.logprobs)) is not None:
            told[event.choice] += found.content
    return answers.ChatAnswer(
        id=run.ticket.id,
        created=int(time.time()),
        model=asked.model,
        choices=[
            answers.Choice(
                index=i,
                message=answers.Said(content=text),
                logprobs=answers.Logprobs(content=told[i]) if asked.logprobs else None,
                finish_reason=reasons[i],
            )
            for i, text in enumerate(texts)
        ],
        usage=answers.usage(started, run.completion),
        tarsia=answers.facts(started),
    )


@dataclass(eq=False)
class Chunks:
    """A request's answers as events of a stream (``data: {...}``), the last of them ``[DONE]`` where all went well."""

    run: Run
    started: wire.Started
    asked: ChatRequest

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        options = self.asked.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        head = {"id": self.run.ticket.id, "object": "chat.completion.chunk", "created": self._at}
        return _event({**head, "model": self.asked.model, "choices": choices, **usage, **more})

    def __post_init__(self) -> None:
        self._at = int(time.time())
        self._usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        self._tarsia = answers.facts(self.started).model_dump()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for i in range(self.run.choices):
                more = {"tarsia": self._tarsia} if i == 0 else {}
                yield self._chunk([_choice(i, {"role": "assistant", "content": ""})], **more)
            async for event in self.run.events():
                if isinstance(event, wire.Done):
                    yield self._chunk([_choice(event.choice, {}, reason=event.reason)])
                elif event.text or event.logprobs:
                    told = answers.logprobs(event.logprobs)
                    said = None if told is None else told.model_dump()
                    yield self._chunk([_choice(event.choice, {"content": event.text}, said)])
        except Refusal as refusal:
            self.run.failed(refusal)
            yield _event(refusal.body)  # and no [DONE]: nobody shall take this for an end
            return
        if self._usage:
            usage = answers.usage(self.started, self.run.completion).model_dump()
            yield self._chunk([], usage=usage, tarsia=self._tarsia)
        yield b"data: [DONE]\n\n"


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values, separators=(",", ":")).encode() + b"\n\n"
