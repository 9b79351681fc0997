"""The bodies that are understood. What they do not name is refused, by its name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

_LONGEST_ID: Final = 2**31 - 1
_Bias = Annotated[float, Field(ge=-100, le=100)]
_TokenId = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
ModelName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        description="The base's name, an adapter (name, name@3, name@tag, name#hash), an alias, or auto.",
    ),
]


class Body(BaseModel):
    """What comes from a client: no more than what is named, of the types that are named."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A text within a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """A picture: ``data:image/png;base64,...``, or an address at a host that the server allows."""

    url: str
    detail: Literal["auto"] | None = Field(
        default=None, description="Pictures are seen as the base's processor sees them; low and high are refused."
    )


class ImagePart(Body):
    """The place of a picture within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Body):
    """What the assistant is told once."""

    role: Literal["system"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]


class UserMessage(Body):
    """What the user says and shows."""

    role: Literal["user"]
    content: str | Annotated[list[Part], Field(min_length=1)]


class AssistantMessage(Body):
    """What the assistant said before."""

    role: Literal["assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    refusal: None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class JsonSchema(Body):
    """A JSON schema that the answer is an instance of."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(default=None, description="Answers always follow the schema; false is refused.")
    description: Annotated[str, Field(max_length=1024)] | None = None

    @field_validator("strict")
    @classmethod
    def _strictly(cls, value: bool | None) -> bool | None:
        if value is False:
            raise ValueError("answers always follow the schema: strict can not be false")
        return value


class TextFormat(Body):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Some JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """An instance of a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Body):
    """``include_usage``: a last chunk says what the request took."""

    include_usage: bool = False


class ChatRequest(Body):
    """A chat that wants an answer. Bounds that the server sets are not in here; a refusal names them."""

    model: ModelName
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=_LONGEST_ID)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_LONGEST_ID)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_LONGEST_ID)] | None = Field(
        default=None, description="0 and -1: all tokens (vLLM)."
    )
    n: Annotated[int, Field(ge=1, le=_LONGEST_ID)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_LONGEST_ID)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[_TokenId, _Bias] | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = Field(default=None, description="A JSON schema (vLLM).")
    ignore_eos: bool | None = Field(default=None, description="Go on to max_tokens, whatever is said (vLLM).")
    user: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="Of whom the request is; a hash of it stands in the server's log."
    )

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        for wrong, what in (
            (self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens),
             "max_tokens and max_completion_tokens say different things"),
            (self.top_logprobs is not None and not self.logprobs, "top_logprobs needs logprobs to be true"),
            (self.stream_options is not None and not self.stream, "stream_options needs stream to be true"),
            (self.guided_json is not None and self.response_format is not None,
             "guided_json and response_format say the same thing twice"),
            (self.messages[-1].role != "user", "the last message has to be the user's"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(what)
        return self

    @property
    def most(self) -> int | None:
        """How many tokens an answer may have; None: nothing was said."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def answer_schema(self) -> str | None:
        """The JSON schema of the answer as a text; None: free text. Raises ValueError for a text that is no JSON."""
        if isinstance(self.guided_json, str):
            return self.guided_json
        if self.guided_json is not None:
            return json.dumps(self.guided_json)
        match self.response_format:
            case ObjectFormat():
                return '{"type": "object"}'
            case SchemaFormat(json_schema=asked):
                return json.dumps(asked.schema_)
        return None


class LoadRequest(Body):
    """Serve an adapter under a name (vLLM). ``lora_path``: a reference of the library, or an allowed folder's path."""

    lora_name: Annotated[str, Field(min_length=1, max_length=100)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = Field(default=False, description="Replace what is served under the name.")


class UnloadRequest(Body):
    """Serve a name no more (vLLM)."""

    lora_name: Annotated[str, Field(min_length=1, max_length=100)]
