"""What is answered, as OpenAI's clients read it, and the ``tarsia`` object that says who answered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from tarsia.serve.wire import Logprob, Started


class ErrorFacts(BaseModel):
    """OpenAI's error object; ``message`` says what was given, what is allowed and what to do."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """Any answer that is none."""

    error: ErrorFacts


class TopLogprob(BaseModel):
    """A token that could have been said; ``bytes`` of UTF-8, which may be part of a letter."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was said, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """One entry for every token that was said."""

    content: list[TokenLogprob]


class AdapterFacts(BaseModel):
    """The version of an adapter that answered; of a name that was loaded, ``source`` is the library's for it."""

    name: str
    version: int | None
    hash: str
    source: str | None


class TarsiaFacts(BaseModel):
    """Who answered: ``adapter`` null is the bare base; ``routed`` is what the router says of its choice."""

    adapter: AdapterFacts | None
    routed: dict[str, Any] | None
    cached_tokens: int


class PromptDetails(BaseModel):
    """Of the prompt's tokens, those that were read before."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens; an answer's are those of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Said(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """One answer."""

    index: int
    message: Said
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """All answers to a request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    tarsia: TarsiaFacts


class Delta(BaseModel):
    """More of what the assistant says."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """More of one answer."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    tarsia: TarsiaFacts | None = None


class Permission(BaseModel):
    """vLLM's and OpenAI's former permission object, for clients that read it."""

    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelFacts(BaseModel):
    """The base (``parent`` null) or an adapter, as vLLM lists them; ``root`` is what stands behind the name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tarsia"] = "tarsia"
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[Permission]
    tarsia: dict[str, Any] = Field(default_factory=dict)


class ModelList(BaseModel):
    """What a key may ask for."""

    object: Literal["list"] = "list"
    data: list[ModelFacts]


class Health(BaseModel):
    """A word on how it is."""

    status: str


def facts(started: Started) -> TarsiaFacts:
    """Who answers."""
    by = started.adapter
    adapter = None if by is None else AdapterFacts(**by.model_dump())
    return TarsiaFacts(adapter=adapter, routed=started.routed, cached_tokens=started.cached_tokens)


def logprobs(entries: tuple[Logprob, ...] | None) -> Logprobs | None:
    """Log-probabilities in OpenAI's words."""
    if entries is None:
        return None
    return Logprobs(
        content=[
            TokenLogprob(
                token=entry.token,
                logprob=entry.logprob,
                bytes=list(entry.bytes),
                top_logprobs=[
                    TopLogprob(token=top.token, logprob=top.logprob, bytes=list(top.bytes)) for top in entry.top
                ],
            )
            for entry in entries
        ]
    )


def usage(started: Started, completion: int) -> Usage:
    """What a request took."""
    return Usage(
        prompt_tokens=started.prompt_tokens,
        completion_tokens=completion,
        total_tokens=started.prompt_tokens + completion,
        prompt_tokens_details=PromptDetails(cached_tokens=started.cached_tokens),
    )
