"""Whatever the model would say, what it says under a schema is an instance of it."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from data.processors import bytes_tokenizer, pieces_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tarsia.base
from tarsia.core.errors import ServeError
from tarsia.serve import constrain
from tarsia.serve.constrain import Compiler, Constraint
from tarsia.serve.request import Sampling
from tarsia.serve.sample import Drawer, Drawn, draw

jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="the validator that answers are judged by")
SPARE = 5  # logits that no token has


@cache
def tokenizer(name: str) -> Any:
    if name == "mini-1":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(Path(tarsia.base.resolve("mini-1")))
    return {"bytes": bytes_tokenizer, "pieces": pieces_tokenizer}[name](("<image>",))


def ends(name: str) -> frozenset[int]:
    made = tokenizer(name)
    other = "<|user|>" if name == "mini-1" else "<|im_end|>"
    return frozenset({made.eos_token_id, made.convert_tokens_to_ids(other)})


@cache
def compiler(name: str) -> Compiler:
    return Compiler(tokenizer(name), ends(name), len(tokenizer(name)) + SPARE)


def answer(schema: str, seed: int, name: str = "mini-1", longest: int = 300, tidy: float = 0.0) -> str | None:
    """What random logits say under ``schema``; None where they do not come to an end.

    ``tidy`` lifts what may close a text: the end, quotes and brackets.
    """
    made = compiler(name)
    drawer = Drawer(Sampling(schema=schema, seed=seed), made.vocabulary, constraint=made.compile(schema).constraint())
    generator, said, closing = torch.Generator().manual_seed(seed), [], [*ends(name), *_closing(name)]
    for _ in range(longest):
        logits = 4 * torch.randn(1, made.vocabulary, generator=generator)
        logits[0, closing] += tidy
        drawn = draw(logits, [drawer])[0]
        assert isinstance(drawn, Drawn), drawn
        if drawn.token in ends(name):
            assert drawer.finished
            return str(tokenizer(name).decode(said))
        said.append(drawn.token)
        if drawer.finished:
            return str(tokenizer(name).decode(said))
    return None


def parsed(said: str) -> Any:
    """What is said, with numbers beyond float64 as its largest: the validator has none larger."""
    return json.loads(said, parse_float=lambda digits: max(-1.7e308, min(float(digits), 1.7e308)))


@cache
def _closing(name: str) -> tuple[int, ...]:
    vocabulary = tokenizer(name).get_vocab()
    return tuple(vocabulary[letter] for letter in '"}]' if letter in vocabulary)


CLOSED = {"additionalProperties": False}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None, 3, 'é"\\\n漢🙂']},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 3},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "an object": {"type": "object"},
    "a person": PERSON,
    "people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
    "a tree": TREE,
    "a string": {"type": "string"},
    "a short string": {"type": "string", "minLength": 2, "maxLength": 5},
    "a pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{2,4}( .)?$"},
    "escapes": {"const": "a\"b\\c/d\n\t\u0001é漢🙂"},
    "a date": {"type": "string", "format": "date"},
    "a number": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 7},
    "a multiple": {"type": "integer", "multipleOf": 7, "minimum": 1},
    "one of types": {"type": ["integer", "null", "boolean"]},
    "any of": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "a pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"enum": ["x"]}], "items": False, "minItems": 2},
    "names": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    "named by pattern": {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "null"}},
                         "additionalProperties": False},
}  # fmt: skip


@pytest.mark.parametrize("name", ["mini-1", "bytes", "pieces"])
@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_answer_that_ends_is_an_instance(kind: str, name: str) -> None:
    """Random logits, and such that like to close what is open; of these most end."""
    schema = SCHEMAS[kind]
    validator = jsonschema_rs.validator_for(schema)
    ended = 0
    for seed in range(6):
        said = answer(json.dumps(schema), seed, name, tidy=0.0 if seed < 2 else 6.0)
        if said is not None:
            ended += 1
            validator.validate(parsed(said))
    assert ended >= 2


# Schemas as a client may write them: what has no instance, or can not be followed, is refused, never misread.
LEAVES = st.one_of(
    st.sampled_from(({}, {"type": "null"}, {"type": "boolean"}, {"type": "string"}, {"type": "number"})),
    st.builds(
        lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, st.integers(-999, 999), st.integers(0, 99)
    ),
    st.builds(
        lambda a, n: {"type": "string", "minLength": a, "maxLength": a + n}, st.integers(0, 5), st.integers(0, 5)
    ),
    st.lists(
        st.one_of(st.none(), st.booleans(), st.integers(-50, 50), st.text(max_size=5)), min_size=1, max_size=4
    ).map(lambda values: {"enum": values}),
    st.floats(-1e6, 1e6, width=32).map(lambda x: {"type": "number", "exclusiveMinimum": x}),
    st.sampled_from(("uuid", "ipv4", "ipv6")).map(lambda f: {"type": "string", "format": f}),
    st.integers(1, 30).map(lambda n: {"type": "integer", "multipleOf": n}),
    st.just({"type": "array", "uniqueItems": True}),
    st.just({"not": {"type": "string"}}),
)
NAMES = st.text('ab_é"\\ 漢🙂', min_size=0, max_size=4)


def _object(properties: dict[str, Any], needed: int, more: object) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties)[:needed], "additionalProperties": more
    }  # fmt: skip


DRAWN = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            _object, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 3), st.sampled_from((True, False))
        ),
        st.builds(
            lambda i, a, n: {"type": "array", "items": i, "minItems": a, "maxItems": a + n},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"allOf": some}),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"oneOf": some}),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(DRAWN, st.integers(0, 99))
def test_drawn_schemas_are_followed_or_refused(schema: dict[str, Any], seed: int) -> None:
    text = json.dumps(schema)
    try:
        compiler("mini-1").compile(text)
    except ServeError as error:
        if error.kind != "invalid":
            raise
        return
    said = answer(text, seed, longest=120, tidy=5.0)
    if said is not None:
        jsonschema_rs.validator_for(schema, validate_formats=True).validate(parsed(said))


def spoken(constraint: Constraint, text: str) -> bool:
    """Whether ``text`` may be said, and the answer end after it; every token is looked up in the mask."""
    made = tokenizer("mini-1")
    for token in made(text, add_special_tokens=False)["input_ids"]:
        if constraint.finished or not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return constraint.complete


@pytest.mark.parametrize(
    "schema, said, right",
    [
        ("{}", '{"a": [1, 2.5e3, "é\\n"]}', True),
        ("{}", "7", True),
        ("{}", "nul", False),
        ("{}", "{'a': 1}", False),
        ("true", "[]", True),
        ('{"type": "object"}', "[]", False),
        ('{"type": "object"}', "{}", True),
        ('{"type": "object"}', '{"a": 1, "b": {"c": [2, 3]}}', True),
        ('{"type": "object"}', '{\n    "a": 1\n}', False),
        ('{"type": "object"}', '{"a":  1}', False),
        ('{"enum": ["a", "b"]}', '"a"', True),
        ('{"enum": ["a", "b"]}', '"c"', False),
        ('{"type": "string"}', '"two\nlines"', False),
        ('{"type": "string"}', '"a \\"b\\" 漢 🙂"', True),
        ('{"type": "integer"}', "12", True),
        ('{"type": "integer"}', "012", False),
        ('{"type": "integer"}', "1.5", False),
    ],
)
def test_what_may_be_said(schema: str, said: str, right: bool) -> None:
    assert spoken(compiler("mini-1").compile(schema).constraint(), said) is right


def test_a_turn_ends_exactly_where_the_grammar_may() -> None:
    made = tokenizer("mini-1")
    constraint = compiler("mini-1").compile('{"enum": [1, 12, "x"]}').constraint()
    all_ends = list(ends("mini-1"))
    others = sorted(set(range(len(made), len(made) + SPARE)) | set(made.added_tokens_decoder) - set(all_ends))
    assert not constraint.mask()[all_ends].any() and not constraint.mask()[others].any()
    one, two = (made.convert_tokens_to_ids(digit) for digit in "12")
    constraint.accept(one)
    assert constraint.complete and not constraint.finished
    assert constraint.mask()[all_ends].all() and not constraint.mask()[others].any()
    ended = compiler("mini-1").compile('{"enum": [1, 12, "x"]}').constraint()
    ended.accept(one)
    ended.accept(all_ends[0])
    assert ended.finished
    constraint.accept(two)
    assert constraint.finished  # nothing may follow: the answer is complete without an end


def test_answers_of_one_grammar_do_not_know_each_other() -> None:
    made = tokenizer("mini-1")
    grammar = compiler("mini-1").compile('{"type": "string"}')
    first, second = grammar.constraint(), grammar.constraint()
    before = second.mask()
    first.accept(made.convert_tokens_to_ids('"'))
    assert torch.equal(second.mask(), before) and not torch.equal(first.mask(), before)


def test_a_token_that_is_forbidden_breaks_its_answer_alone() -> None:
    grammar = compiler("mini-1").compile('{"type": "integer"}')
    constraint, other = grammar.constraint(), grammar.constraint()
    with pytest.raises(ServeError, match="forbids") as caught:
        constraint.accept(tokenizer("mini-1").convert_tokens_to_ids('"'))
    assert caught.value.kind == "internal"
    assert other.mask().any()


def test_the_likeliest_under_a_schema_and_a_bias_against_all() -> None:
    """The mask is the last word: a bias may not lift what is forbidden."""
    made = compiler("mini-1")
    schema = '{"enum": [true]}'
    quote = tokenizer("mini-1").convert_tokens_to_ids('"')
    asked = Sampling(temperature=0, schema=schema, bias={quote: 100.0})
    drawer = Drawer(asked, made.vocabulary, constraint=made.compile(schema).constraint())
    said = []
    while not drawer.finished:
        found = draw(torch.zeros(1, made.vocabulary), [drawer])[0]
        assert isinstance(found, Drawn)
        said.append(found.token)
    assert tokenizer("mini-1").decode(said) == "true"


@pytest.mark.parametrize("wanted", ["ĠĊĉ", "Ġ", "Ċ"])
def test_a_model_that_wants_nothing_but_blanks_says_json_as_it_is_dumped(wanted: str) -> None:
    made, name = compiler("mini-1"), "mini-1"
    properties = {"bin": {"enum": ["glass"]}, "n": {"const": [1, {"a": None}]}}
    schema = json.dumps({"type": "object", "properties": properties, "required": ["bin", "n"]} | CLOSED)
    asked = Sampling(temperature=0, schema=schema)
    drawer = Drawer(asked, made.vocabulary, constraint=made.compile(schema).constraint())
    logits, said = torch.zeros(1, made.vocabulary), []
    for text, token in tokenizer(name).get_vocab().items():
        logits[0, token] += 50.0 * (set(text) <= set(wanted))
    while not drawer.finished and len(said) < 100:
        found = draw(logits, [drawer])[0]
        assert isinstance(found, Drawn)
        said.append(found.token)
    assert tokenizer(name).decode(said) == json.dumps({"bin": "glass", "n": [1, {"a": None}]})


HOSTILE: dict[str, str] = {
    "not JSON": "{",
    "not a schema": "[1]",
    "nothing": "false",
    "a number": "3",
    "empty": "",
    "NaN": '{"const": NaN}',
    "infinite": '{"minimum": 1e999}',
    "half a pair": '{"enum": ["\\ud800"]}',
    "half a pair, raw": '{"enum": ["\ud800"]}',
    "unknown type": '{"type": "objec"}',
    "unknown keyword": '{"not": {}}',
    "unknown format": '{"type": "string", "format": "x"}',
    "remote": '{"$ref": "http://127.0.0.1:9/x"}',
    "a file": '{"$ref": "file:///etc/passwd"}',
    "dangling": '{"$ref": "#/a"}',
    "itself": '{"$ref": "#"}',
    "each other": '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}',
    "options": '{"x-guidance": {"lenient": true}, "not": {}}',
    "a broken pattern": '{"type": "string", "pattern": "("}',
    "deep": '{"items":' * 5000 + "{}" + "}" * 5000,
    "deep lists": "[" * 100_000,
    "deep pattern": json.dumps({"type": "string", "pattern": "(" * 3000}),
    "large": json.dumps({"enum": [str(i) * 9 for i in range(9000)]}),
    "a long constant": json.dumps({"const": "a" * 20_000}),
    "a long name": json.dumps({"type": "object", "properties": {"a" * 20_000: {}}, "required": ["a" * 20_000]}),
    "multiples": '{"type": "integer", "multipleOf": 1000003}',
    "fine multiples": '{"type": "number", "multipleOf": 0.0000100003}',
    "multiples together": '{"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}',
    "patterns of names": json.dumps(
        {"type": "object", "patternProperties": {f"^(a|b){{{i}}}$": {} for i in range(200)}}
    ),
    "patterns together": json.dumps(
        {"type": "string", "allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(12)]}
    ),
    "no room": '{"type": "array", "minItems": 5, "maxItems": 1}',
    "beyond numbers": '{"type": "integer", "minimum": 1' + "0" * 300 + "}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_can_not_be_followed_is_refused(kind: str) -> None:
    with pytest.raises(ServeError) as caught:
        compiler("mini-1").compile(HOSTILE[kind])
    assert caught.value.kind == "invalid"
    assert len(str(caught.value)) < 2000


def test_too_much_work_at_a_token_is_the_schemas_fault() -> None:
    constraint = compiler("mini-1").compile('{"type": "string", "pattern": "^(a{1000}){1000}$"}').constraint()
    quote = tokenizer("mini-1").convert_tokens_to_ids('"')
    assert constraint.mask()[quote]
    with pytest.raises(ServeError, match="too much work") as caught:
        constraint.accept(quote)
    assert caught.value.kind == "invalid"


def test_multiples_that_are_usual_are_followed() -> None:
    for multiple in (0.01, 0.5, 2.5, 10, 1000):
        assert (
            compiler("mini-1").compile(json.dumps({"type": "number", "multipleOf": multiple})).constraint().mask().any()
        )


def test_grammars_are_kept_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_KEPT", 3)
    made = Compiler(tokenizer("bytes"), ends("bytes"), len(tokenizer("bytes")))
    first = made.compile("{}")
    for n in range(2):
        made.compile(json.dumps({"const": n}))
    assert made.compile("{}") is first
    made.compile('{"const": 2}')  # the oldest of those not asked for goes: const 0
    assert made.compile("{}") is first
    assert list(made._kept) == ['{"const": 1}', '{"const": 2}', "{}"]


def test_tokens_that_can_not_be_spelt_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("only fast tokenizers")

    monkeypatch.setattr(constrain, "from_tokenizer", Wrong())
    with pytest.raises(ServeError, match="can not be spelt out") as caught:
        Compiler(tokenizer("bytes"), ends("bytes"), 400)
    assert caught.value.kind == "invalid" and math.isfinite(len(str(caught.value)))


def test_a_tokenizer_that_reads_otherwise_is_refused() -> None:
    class Other:
        """Decodes something else than its tokens are spelt."""

        def decode(self, ids: Any) -> str:
            return "[]"

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer("bytes"), name)

    with pytest.MonkeyPatch.context() as patch:
        real = constrain.from_tokenizer
        patch.setattr(constrain, "from_tokenizer", lambda _, **named: real(tokenizer("bytes"), **named))
        with pytest.raises(ServeError, match="can not be spelt out"):
            Compiler(Other(), ends("bytes"), 400)
