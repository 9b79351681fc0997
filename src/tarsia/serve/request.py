"""What is asked of the engine, and what it says back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:  # the process that speaks HTTP reads this file too, and has no torch
    from torch import Tensor

AUTO: Final = "auto"
"""The name under which a request leaves the choice of its adapter to the router."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn.

    ``max_tokens`` None: as many as there is room for, and no more than ``at_most``. ``temperature`` 0 takes the
    likeliest. ``logprobs`` is how many of the likeliest are told beside each token's own (None: nothing is told).
    ``schema`` is a JSON schema that the answer must be an instance of, "{}" any JSON; None: free text. ``choices``
    answers are given, each drawn with a seed of its own that follows from ``seed``. ``ignore_end`` goes on to
    ``max_tokens`` whatever is said.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    choices: int = 1
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    schema: str | None = None
    ignore_end: bool = False
    at_most: int | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture as the processor gives it to the model: ``inputs`` of it alone, ``key`` a digest of these."""

    key: bytes
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row as the model reads it: ids with every picture's placeholders, and the pictures in their order.

    ``marks`` are the model's further inputs that go along the ids, [1, tokens] each (token types, say).
    """

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...] = ()
    marks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt of a tenant for an adapter: a reference of the library or an alias, None for the bare base.

    ``deadline`` is a time of ``time.monotonic()`` after which nobody waits for it. ``weight`` is the tenant's share
    against others'.
    """

    id: str
    prompt: Prompt
    adapter: str | None = None
    sampling: Sampling = Sampling()
    tenant: str = ""
    weight: float = 1.0
    deadline: float = float("inf")


Kind = Literal["started", "text", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a request: see ``serve.wire`` for what ``data`` holds by ``kind``."""

    id: str
    kind: Kind
    data: Mapping[str, Any]


Events = Sequence[Event]
