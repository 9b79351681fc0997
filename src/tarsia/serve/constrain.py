"""Answers that are instances of a JSON schema: after every token, which may come next."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import Any, Final

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from tarsia.core.errors import ServeError

LONGEST: Final = 64 * 1024
"""Bytes of a schema."""
DEEPEST: Final = 64
"""Brackets within brackets in a schema."""
_KEPT: Final = 256  # grammars
# What bounds the work for a schema, and for one token under it: llguidance counts, so that it is the same on any
# machine. Its own comments give 50 (building) and 14 (stepping) thousand units of fuel a millisecond.
_LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Blanks are bounded: a model that falls for them would never come back. Nothing that a request could write into its
# schema changes any of these, or lets a keyword pass that is not held to.
_RULES: Final[dict[str, Any]] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"[\x20\x0A\x09]{0,40}",
    "coerce_one_of": False,
    "lenient": False,
}
_OPTIONS: Final = "x-guidance"
_PROBE: Final = '{"a": [1, -2.5e3, "é 漢字 🙂 \\n"], "b": null}'


class Constraint:
    """What one answer may say next. Made by ``Grammar.constraint``."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def mask(self) -> Tensor:
        """Which tokens may come next, bool [vocabulary]; ends of turn where the answer may end.

        Raises ServeError (invalid) where telling would take too much work.
        """
        packed = self._matcher.compute_bitmask()
        self._sound("The schema asks for more work at a token than is allowed.")
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little", count=self._vocabulary)
        return torch.from_numpy(bits).view(torch.bool)

    def accept(self, token: int) -> None:
        """The answer goes on with ``token``. Raises ServeError (internal) where ``mask`` did not allow it."""
        if not self._matcher.consume_token(token):
            raise ServeError(
                "internal", "A token was drawn that the schema forbids.", given=f"{token}: {self._matcher.get_error()}"
            )

    @property
    def complete(self) -> bool:
        """Whether the answer may end here: what was said is an instance of the schema."""
        return bool(self._matcher.is_accepting())

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end: the answer is complete without it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def _sound(self, what: str) -> None:
        if self._matcher.is_error():
            raise ServeError("invalid", what, given=_first(self._matcher.get_error()), do="give a simpler schema")


class Grammar:
    """A schema, ready for any number of answers at once."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def constraint(self) -> Constraint:
        """For one answer, at its beginning."""
        return Constraint(self._matcher.deep_copy(), self._vocabulary)


class Compiler:
    """Schemas in the tokens of one base.

    ``ends`` are the ids that end a turn, ``vocabulary`` how many logits the model gives. May be used from several
    threads. Raises ServeError (invalid) for a tokenizer whose tokens can not be spelt out in bytes, and proves on a
    text that those bytes are what the tokenizer decodes.
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = Lock()
        try:
            self._tokens: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(ends))
        except ValueError as error:
            raise _untold(str(error)) from None
        spelt = self._tokens.tokenize_str(_PROBE)
        if tokenizer.decode(spelt).strip() != _PROBE:
            raise _untold(repr(tokenizer.decode(spelt)))

    def compile(self, schema: str) -> Grammar:
        """The grammar of a JSON schema's text; that of "{}" is any JSON value. Those used last are kept.

        Raises ServeError (invalid) for what is no JSON schema, for one that is too large, too deep or too much work,
        and for keywords that can not be held to: none is passed over.
        """
        with self._lock:
            if schema in self._kept:
                self._kept.move_to_end(schema)
                return self._kept[schema]
        made = Grammar(self._matcher(read(schema)), self.vocabulary)
        with self._lock:
            self._kept[schema] = made
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made

    def _matcher(self, schema: str) -> LLMatcher:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_RULES)
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # where a schema is too much work at its first token, say so now
        if matcher.is_error():
            raise ServeError(
                "invalid",
                "The JSON schema can not be followed.",
                given=_first(matcher.get_error()),
                do="correct it, or take out what it says",
            )
        return matcher


def read(schema: str) -> str:
    """The schema's text, once it is known to be JSON, within bounds, and a schema's outer form."""
    size = len(schema.encode("utf-8", "surrogatepass"))
    if size > LONGEST:
        raise ServeError("invalid", "The JSON schema is too large.", given=f"{size} bytes", allowed=f"{LONGEST} bytes")
    if (deepest := _depth(schema)) > DEEPEST:
        raise ServeError(
            "invalid", "The JSON schema is too deep.", given=f"{deepest} brackets within each other", allowed=DEEPEST
        )
    try:
        tree = json.loads(schema, parse_constant=_no_number)
        schema.encode()
    except ValueError as error:
        raise ServeError("invalid", "The schema is not JSON.", given=str(error)) from None
    if tree is True:
        return "{}"
    if not isinstance(tree, dict):
        raise ServeError(
            "invalid", "A JSON schema is an object that something can be an instance of.", given=schema[:80]
        )
    if _OPTIONS in tree:
        raise ServeError("invalid", "A schema can not change how it is followed.", given=_OPTIONS, do="take it out")
    return schema


def _depth(text: str) -> int:
    """The most brackets within each other, those in strings too: never less than there are."""
    deepest = depth = 0
    for letter in text:
        if letter in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in "]}":
            depth -= 1
    return deepest


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _first(text: str) -> str:
    """An error's beginning: the rest is the grammar."""
    return text.strip()[:500]


def _untold(given: str) -> ServeError:
    return ServeError(
        "invalid",
        "This base's tokens can not be spelt out, so no schema can be followed.",
        given=given,
        do="ask without a schema",
    )
