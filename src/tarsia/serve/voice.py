"""How a base speaks: what its tokens are spelt like, what ends a turn, which answers a schema lets through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tarsia.adapter import Host
from tarsia.evaluate.chat import Chat
from tarsia.serve.constrain import Compiler
from tarsia.serve.request import Sampling
from tarsia.serve.sample import Drawer
from tarsia.serve.words import Spelling, Words


@dataclass(frozen=True, slots=True)
class Told:
    """Text that a token makes sure, and whether the answer is over with it."""

    text: str
    over: bool


class Telling:
    """An answer's text as it grows: over at the end of its turn, at a stop string, or where a schema is fulfilled."""

    def __init__(self, words: Words, drawer: Drawer, ends: frozenset[int]) -> None:
        self._words, self._drawer, self._ends = words, drawer, ends

    def add(self, token: int) -> Told:
        """Go on with ``token``."""
        if token in self._ends:
            return Told(self._words.flush(), True)
        text = self._words.add(token)
        if self._words.stopped:
            return Told(text, True)
        if self._drawer.finished:
            return Told(text + self._words.flush(), True)
        return Told(text, False)

    def flush(self) -> str:
        """What is left where nothing follows though the answer is not over."""
        return self._words.flush()


class Voice:
    """The voice of ``host``. Raises as ``Chat`` does for a base whose template can not be trusted."""

    def __init__(self, host: Host) -> None:
        self.vocabulary = int(host.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        chat = Chat(host)
        self._ends = chat.ends
        self._spelling = Spelling(chat.tokenizer)
        self._compiler = Compiler(chat.tokenizer, chat.ends, self.vocabulary)

    def prepare(self, sampling: Sampling) -> None:
        """Make the grammar of a request's schema: it is kept, and takes its time. Raises ServeError for a bad one."""
        if sampling.schema is not None:
            self._compiler.compile(sampling.schema)

    def drawer(self, sampling: Sampling, choice: int) -> Drawer:
        """What draws the tokens of one answer."""
        schema = sampling.schema
        constraint = None if schema is None else self._compiler.compile(schema).constraint()
        return Drawer(sampling, self.vocabulary, choice=choice, constraint=constraint)

    def telling(self, sampling: Sampling, drawer: Drawer) -> Telling:
        """What makes text of them."""
        ends = frozenset[int]() if sampling.ignore_end else self._ends
        return Telling(Words(self._spelling, sampling.stop), drawer, ends)

    def spell(self, token: int) -> Mapping[str, Any]:
        """A token by itself, as it is told beside its probability."""
        text, raw = self._spelling.alone(token)
        return {"token": text, "bytes": list(raw)}
