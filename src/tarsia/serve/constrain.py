"""Answers that are instances of a JSON schema: after every token, which may come next."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from decimal import Decimal
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from tarsia.core.errors import ServeError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # it exists for type checkers alone

LONGEST: Final = 64 * 1024
"""Bytes of a schema."""
DEEPEST: Final = 64
"""Brackets within brackets in a schema."""
_KEPT: Final = 256  # grammars
# What bounds the work for a schema, and for one token under it: llguidance counts, so that it is the same on any
# machine. Its own comments give 50 (building) and 14 (stepping) thousand units of fuel a millisecond.
_LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 100_000,
    "max_items_in_row": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Nothing that a request could write into its schema changes any of these, or lets a keyword pass that is not held to.
_RULES: Final[JsonCompileOptions] = {
    "item_separator": ", ",  # as json.dumps writes, and no other white space: a model that falls for it never ends
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
_OPTIONS: Final = "x-guidance"
# What its counting misses, measured: multiples of 100,000 take 0.7 s to build, of 1,000,003 5 s and 260 MiB, and
# those that must hold at once are multiplied; 100 patterns for names 0.8 s, 200 2.2 s; a constant of 20,000 letters
# breaks off in its middle.
_MULTIPLES: Final = 20_000
_PATTERNS: Final = 32
_LETTERS: Final = 4096
_PROBE: Final = '{"a": [1, -2.5e3, "é 漢字 🙂 \\n"], "b": null}'


class Constraint:
    """What one answer may say next. Made by ``Grammar.constraint``."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._allowed: Tensor | None = None

    def mask(self) -> Tensor:
        """Which tokens may come next, bool [vocabulary]; ends of turn where the answer may end.

        Raises ServeError (invalid) where telling would take too much work.
        """
        packed = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._laborious()
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little", count=self._vocabulary)
        self._allowed = torch.from_numpy(bits).view(torch.bool)
        return self._allowed

    def accept(self, token: int) -> None:
        """The answer goes on with ``token``.

        Raises ServeError: invalid where it would take too much work, internal where ``mask`` did not allow it.
        """
        if not self._matcher.consume_token(token):
            if self._allowed is not None and self._allowed[token]:
                raise self._laborious()
            raise ServeError("internal", "A token was drawn that the schema forbids.", given=f"token {token}")
        self._allowed = None

    @property
    def complete(self) -> bool:
        """Whether the answer may end here: what was said is an instance of the schema."""
        return bool(self._matcher.is_accepting())

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end: the answer is complete without it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def _laborious(self) -> ServeError:
        return ServeError(
            "invalid",
            "The JSON schema is too much work at one token.",
            given=_first(self._matcher.get_error()),
            do="give a simpler schema",
        )


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
        and for keywords that can not be held to: none is passed over. A ``format`` is held to as a form: a date may
        be a day that no calendar has.
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
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_RULES)
        except ValueError as error:  # half a surrogate pair, say
            raise ServeError("invalid", "The schema is not JSON.", given=_first(str(error))) from None
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
    """The schema's text as JSON alone: known to be within bounds, each name once.

    Raises ServeError (invalid) where it is no JSON object, or asks for what is known to take too long.
    """
    size = len(schema.encode("utf-8", "surrogatepass"))
    if size > LONGEST:
        raise _over("size", f"{size} bytes", f"{LONGEST} bytes")
    if (deepest := _depth(schema)) > DEEPEST:
        raise _over("depth", f"{deepest} brackets within each other", DEEPEST)
    try:
        tree = json.loads(schema)
        told = json.dumps(tree, allow_nan=False)
    except ValueError as error:
        raise ServeError("invalid", "The schema is not JSON.", given=str(error)) from None
    if tree is True:
        return "{}"
    if not isinstance(tree, dict):
        raise ServeError("invalid", "A JSON schema is an object that allows something.", given=schema[:80])
    if _OPTIONS in tree:
        raise ServeError("invalid", "A schema can not change how it is followed.", given=_OPTIONS, do="take it out")
    _bounded(tree)
    return told


def _bounded(tree: dict[str, Any]) -> None:
    multiples, patterns = set(), 0
    for name, value in _members(tree):
        if isinstance(value, str) and len(value) > _LETTERS:
            raise _over("longest string", f"{len(value)} characters", _LETTERS)
        if name == "multipleOf" and isinstance(value, int | float):
            multiples.add(_steps(value))
        if name == "patternProperties" and isinstance(value, dict):
            patterns += len(value)
    if patterns > _PATTERNS:
        raise _over("number of patterns for names", patterns, _PATTERNS)
    if math.prod(multiples) > _MULTIPLES:
        raise _over("product of what numbers are multiples of", math.prod(multiples), _MULTIPLES)


def _members(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a tree with the name under which it stands, "" in lists."""
    yield name, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield "", key
            yield from _members(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _members(inner)


def _steps(multiple: float) -> int:
    """A multiple without its point: the number of states that telling it takes."""
    digits = Decimal(repr(multiple))
    exponent = digits.as_tuple().exponent
    return int(abs(digits.scaleb(-min(int(exponent), 0))))


def _over(what: str, given: object, allowed: object) -> ServeError:
    return ServeError("invalid", f"The JSON schema is too much: its {what}.", given=given, allowed=allowed)


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
