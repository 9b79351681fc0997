"""What the process that speaks HTTP and the worker that holds the base say to each other.

Every message is one frame (``serve.frames``): its JSON text has the fields of one class below, and the pictures of a
``generate`` are the frame's blobs, as they came from the client (PNG, JPEG, ...), in the order of the ``image`` parts.

    to the worker                                   from the worker
    configure   first, once                         opening ..., then ready   or   unable, and the worker ends
    generate                                        started, text ..., done (one a choice)   or   failed
    cancel                                          nothing more of this id
    load, unload, models                            answer, with the same id
    drain                                           drained, when nothing runs any more; then the worker ends
    stop                                            the worker ends
                                                    stats twice a second, log where there is something to say

After ``failed`` nothing more is said of a request; else it is over with the ``done`` of its last choice. Ids are the
sender's, and never used twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tarsia.core.errors import ServeError, TarsiaError
from tarsia.serve.frames import BrokenFrame, Frame
from tarsia.serve.request import Sampling

FailureKind: TypeAlias = Literal[
    "invalid", "unknown_adapter", "refused", "damaged", "too_long", "timeout", "overloaded", "lost", "internal"
]
LEAST_LOGPROB: Final = -9999.0
"""Stands for the logarithm of 0, which JSON can not write."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Message):
    """A text within a message."""

    type: Literal["text"] = "text"
    text: str


class PicturePart(_Message):
    """The place of the next picture within a message."""

    type: Literal["image"] = "image"


class ChatMessage(_Message):
    """What somebody said, as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: tuple[Annotated[TextPart | PicturePart, Field(discriminator="type")], ...]


# What the worker is told ------------------------------------------------------------------------------------------


class Configure(_Message):
    """How the worker opens its base and what it may use. Sizes in bytes; ``threads`` 0: all cores.

    ``four_bits`` are the keywords of ``adapter.four_bits.FourBits``, None for a base as it is. ``rows`` run at
    once, ``waiting`` are open at most; ``chunk`` tokens of prompts are read in a step; an answer has ``answer`` tokens
    where nothing else is asked. ``unproved``: adapters without outputs on their card are served too.
    """

    command: Literal["configure"] = "configure"
    model: str
    library: str | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    device: str = "auto"
    four_bits: dict[str, Any] | None = None
    resolution: int | None = None
    threads: int = Field(default=0, ge=0)
    readers: int = Field(default=2, ge=1)
    cache_bytes: int | None = Field(default=None, ge=1)
    picture_bytes: int | None = Field(default=None, ge=1)
    adapter_bytes: int | None = Field(default=None, ge=1)
    rows: int = Field(default=32, ge=1)
    chunk: int = Field(default=512, ge=1)
    waiting: int = Field(default=1024, ge=1)
    answer: int = Field(default=1024, ge=1)
    unproved: bool = False


class Generate(_Message):
    """Answer these messages. ``adapter`` is a reference or a name, None the bare base, "auto" what the router chooses.

    ``seconds`` is how long anybody waits from now on (None: for ever), ``weight`` the tenant's share against others'.
    For "auto" alone: ``may`` are shell patterns of the names among which the router chooses (None: all), and ``base``
    whether it may leave the answer to the bare base.
    """

    command: Literal["generate"] = "generate"
    id: str
    messages: tuple[ChatMessage, ...]
    adapter: str | None = None
    sampling: Sampling = Sampling()
    tenant: str = ""
    weight: float = Field(default=1.0, gt=0)
    seconds: float | None = None
    may: tuple[str, ...] | None = None
    base: bool = True


class Cancel(_Message):
    """Nobody waits for the request ``id`` any more."""

    command: Literal["cancel"] = "cancel"
    id: str


class Load(_Message):
    """Serve the adapter at ``source`` (a reference, or a folder below one of the sources) as ``name`` from now on."""

    command: Literal["load"] = "load"
    id: str
    name: str
    source: str


class Unload(_Message):
    """Take no new requests for ``name``; those that run finish."""

    command: Literal["unload"] = "unload"
    id: str
    name: str


class Models(_Message):
    """Which adapters may be asked for."""

    command: Literal["models"] = "models"
    id: str


class Drain(_Message):
    """Take nothing new, finish what runs, say ``drained`` and end."""

    command: Literal["drain"] = "drain"


class Stop(_Message):
    """End now."""

    command: Literal["stop"] = "stop"


# What the worker says ---------------------------------------------------------------------------------------------


class Opening(_Message):
    """What the worker is busy with before it is ready, for people."""

    event: Literal["opening"] = "opening"
    what: str


class Ready(_Message):
    """The worker takes requests. ``context`` and ``most_tokens`` in tokens: the model's, and what the cache holds.

    ``pictures``: whether the base sees; ``router``: whether "auto" may be asked for; ``vocabulary``: how many ids.
    """

    event: Literal["ready"] = "ready"
    model: str
    family: str
    form: str
    digest: str
    dtype: str
    device: str
    context: int
    most_tokens: int
    vocabulary: int
    pictures: bool
    router: bool
    seconds: float


class ServedAdapter(_Message):
    """An adapter as a request got it: the version that it started with, and the hash of its content.

    ``source`` is the library's own reference, with its version, where the name is one that was loaded.
    """

    name: str
    version: int | None
    hash: str
    source: str | None = None


class Started(_Message):
    """A request has its place in the next step. ``routed`` is what the router says of its choice, for "auto".

    ``cached_tokens`` of the prompt were read before; ``picture_hits`` None: nobody counted.
    """

    event: Literal["started"] = "started"
    id: str
    adapter: ServedAdapter | None = None
    routed: dict[str, Any] | None = None
    prompt_tokens: int
    cached_tokens: int = 0
    picture_hits: int | None = None


class Likely(_Message):
    """A token, its bytes (of UTF-8, may be part of a character) and the natural logarithm of its probability."""

    token: str
    bytes: tuple[int, ...]
    logprob: float


class Logprob(Likely):
    """A token that was said, and the likeliest in its place."""

    top: tuple[Likely, ...] = ()


class Text(_Message):
    """More of choice ``choice``: may be "" while a character or a stop string is not whole yet.

    ``tokens`` is how many tokens this stands for, ``logprobs`` has one entry for each where they were asked for.
    """

    event: Literal["text"] = "text"
    id: str
    choice: int = 0
    text: str
    logprobs: tuple[Logprob, ...] | None = None
    tokens: int = 0


class Done(_Message):
    """A choice is complete: its end was said (or a stop string), or it is as long as it may be."""

    event: Literal["done"] = "done"
    id: str
    choice: int = 0
    reason: Literal["stop", "length"]
    completion_tokens: int


class Failure(_Message):
    """Why something is refused: ServeError in JSON."""

    kind: FailureKind
    message: str
    given: str | None = None
    allowed: str | None = None
    do: str | None = None

    @classmethod
    def facts(cls, error: TarsiaError, kind: FailureKind = "invalid") -> dict[str, str | None]:
        """The fields for an error; ``kind`` for one that does not know its own."""
        told = {name: None if (v := getattr(error, name)) is None else str(v) for name in ("given", "allowed", "do")}
        return {"kind": error.kind if isinstance(error, ServeError) else kind, "message": error.what, **told}

    @classmethod
    def of(cls, error: TarsiaError, kind: FailureKind = "invalid") -> Failure:
        """The failure that tells of an error."""
        return Failure.model_validate(cls.facts(error, kind))

    @property
    def error(self) -> ServeError:
        """The error that this tells of."""
        return ServeError(self.kind, self.message, given=self.given, allowed=self.allowed, do=self.do)


class Unable(Failure):
    """The worker can not open what it was told to, and ends."""

    event: Literal["unable"] = "unable"


class Failed(Failure):
    """A request has come to nothing; whatever text was sent before is not its answer."""

    event: Literal["failed"] = "failed"
    id: str

    @classmethod
    def about(cls, id_: str, error: TarsiaError, kind: FailureKind = "invalid") -> Self:
        """What is said of request ``id_`` that an error has ended."""
        return cls.model_validate({"id": id_, **cls.facts(error, kind)})


class Model(_Message):
    """What may be asked for: an adapter of the library (its current version) or one that was loaded by name.

    ``unproved`` is why nothing proves one that is ``resident``; None where something does. ``foreign``: it is of
    another base, and refused where it is asked for.
    """

    name: str
    version: int | None
    hash: str
    methods: str = ""
    bytes: int = 0
    source: str | None = None
    resident: bool = False
    unproved: str | None = None
    foreign: bool = False


class Answer(_Message):
    """The end of load, unload or models: what there is then, or why not."""

    event: Literal["answer"] = "answer"
    id: str
    models: tuple[Model, ...] = ()
    failure: Failure | None = None


class AdapterStats(_Message):
    """Counts of one adapter since the worker began ("" is the bare base)."""

    requests: int = 0
    running: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Stats(_Message):
    """Gauges (what is now) and counters (since the worker began). Seconds, bytes, tokens, blocks.

    ``process_bytes`` is 0 where the system does not say; ``adapters`` are the hundred that were asked most.
    """

    event: Literal["stats"] = "stats"
    # gauges
    reading: int = 0
    waiting: int = 0
    running: int = 0
    blocks_used: int = 0
    blocks_free: int = 0
    picture_bytes: int = 0
    adapter_bytes: int = 0
    adapters_resident: int = 0
    process_bytes: int = 0
    # counters
    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    picture_hits: int = 0
    picture_misses: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    adapter_refusals: int = 0
    block_evictions: int = 0
    preemptions: int = 0
    adapters: dict[str, AdapterStats] = {}


class Log(_Message):
    """Something for the structured log: ``what`` for people, ``facts`` for machines."""

    event: Literal["log"] = "log"
    level: Literal["debug", "info", "warning", "error"]
    what: str
    facts: dict[str, Any] = {}


class Drained(_Message):
    """Nothing runs any more."""

    event: Literal["drained"] = "drained"


Command: TypeAlias = Configure | Generate | Cancel | Load | Unload | Models | Drain | Stop
Event: TypeAlias = Opening | Ready | Unable | Started | Text | Done | Failed | Answer | Stats | Log | Drained
RequestEvent: TypeAlias = Started | Text | Done | Failed

_M = TypeVar("_M")
_COMMANDS: TypeAdapter[Command] = TypeAdapter(Annotated[Command, Field(discriminator="command")])
_EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


def framed(message: Command | Event, blobs: Sequence[bytes] = ()) -> Frame:
    """A message as a frame."""
    return Frame(message.model_dump_json().encode(), tuple(blobs))


def command_in(frame: Frame) -> Command:
    """The command in a frame. Raises BrokenFrame for anything else."""
    command = _read(_COMMANDS, frame)
    pictures = _pictures(command)
    if pictures != len(frame.blobs):
        raise BrokenFrame("A command's blobs are not its pictures.", given=len(frame.blobs), allowed=pictures)
    return command


def event_in(frame: Frame) -> Event:
    """The event in a frame. Raises BrokenFrame for anything else."""
    if frame.blobs:
        raise BrokenFrame("An event has no blobs.", given=len(frame.blobs), allowed=0)
    return _read(_EVENTS, frame)


def finite(logprob: float) -> float:
    """A log-probability as it is written: ``LEAST_LOGPROB`` at the least."""
    return LEAST_LOGPROB if math.isnan(logprob) else max(logprob, LEAST_LOGPROB)


def _pictures(command: Command) -> int:
    if not isinstance(command, Generate):
        return 0
    return sum(isinstance(part, PicturePart) for message in command.messages for part in message.content)


def _read(adapter: TypeAdapter[_M], frame: Frame) -> _M:
    try:
        return adapter.validate_json(frame.text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BrokenFrame("A frame's text is no message.", given=f"{where}: {first['msg']}") from None
