"""The parts of a text make the text, whatever the tokens; a stop string is never seen."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from data.processors import bytes_tokenizer, pieces_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import tarsia.base
from tarsia.core.errors import ServeError
from tarsia.serve.words import Spelling, Words

LETTERS = "ab ,.\n\"'éüñ漢字かな한🙂👩\u200d👧🏽\u0301\u0327\ufffd\u00a0▁Ġ"
NAMES = ("mini-1", "bytes", "pieces")


@cache
def tokenizer(name: str) -> Any:
    if name == "mini-1":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(Path(tarsia.base.resolve("mini-1")))
    return {"bytes": bytes_tokenizer, "pieces": pieces_tokenizer}[name](("<image>",))


@cache
def spelling(name: str) -> Spelling:
    return Spelling(tokenizer(name))


def decoded(name: str, ids: list[int]) -> str:
    return str(tokenizer(name).decode(ids, skip_special_tokens=True))


def ids_of(name: str, text: str) -> list[int]:
    return list(tokenizer(name)(text, add_special_tokens=False)["input_ids"])


def told(words: Words, ids: list[int]) -> list[str]:
    return [*(words.add(token) for token in ids), words.flush()]


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Slow: letter by letter, up to the stop string that is first complete."""
    for end in range(len(text) + 1):
        if ends := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, ends))]
    return text


IDS = {
    name: st.lists(
        st.one_of(st.integers(0, len(tokenizer(name)) - 1), st.sampled_from(tokenizer(name).all_special_ids)),
        max_size=40,
    )
    for name in NAMES
}
TEXTS = st.text(LETTERS, max_size=25)
STOPS = st.lists(st.text("ab ,漢🙂\ufffd", min_size=1, max_size=3), max_size=3).map(tuple)


@settings(deadline=None, max_examples=150)
@given(st.data())
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_any_ids_make_what_the_tokenizer_decodes(name: str, data: st.DataObject) -> None:
    ids = data.draw(IDS[name])
    assert "".join(told(Words(spelling(name)), ids)) == decoded(name, ids)


@settings(deadline=None, max_examples=100)
@given(st.data())
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_texts_and_bytes_in_turn(name: str, data: st.DataObject) -> None:
    """Texts with single byte tokens and special tokens thrown between them."""
    byte = st.sampled_from([i for i in range(len(tokenizer(name))) if len(spelling(name).alone(i)[1]) == 1])
    parts = st.one_of(
        TEXTS.map(lambda text: ids_of(name, text)), st.lists(byte, max_size=6), IDS[name].map(lambda x: x[:2])
    )
    ids = [token for part in data.draw(st.lists(parts, max_size=5)) for token in part]
    given_out = told(Words(spelling(name)), ids)
    assert "".join(given_out) == decoded(name, ids)
    assert all(not part.endswith("\ufffd") for part in given_out[:-1])


@settings(deadline=None, max_examples=100)
@given(st.data(), STOPS)
@pytest.mark.parametrize("name", NAMES)
def test_a_text_ends_before_the_first_stop_string(name: str, data: st.DataObject, stop: tuple[str, ...]) -> None:
    ids = data.draw(st.one_of(IDS[name], st.text("ab ,漢🙂", max_size=25).map(lambda text: ids_of(name, text))))
    words = Words(spelling(name), stop)
    parts = told(words, ids)
    whole = decoded(name, ids)
    assert "".join(parts) == cut(whole, stop)
    assert words.stopped is (cut(whole, stop) != whole)
    seen = ""
    for part in parts:  # what was given is never taken back
        seen += part
        assert cut(whole, stop).startswith(seen)


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_string_is_met_as_soon_as_it_is_said(name: str) -> None:
    ids = ids_of(name, "the cat sat.")
    for text, stop in (("the cat sat.", "at s"), ("the cat sat.", "the cat"), ("the cat sat.", "t.")):
        words = Words(spelling(name), (stop,))
        seen, shown = "", []
        for token in ids:
            shown.append(token)
            seen += words.add(token)
            if words.stopped:
                break
        assert words.stopped
        assert seen == text[: text.index(stop)]
        assert stop not in decoded(name, shown[:-1])
        assert words.add(ids[0]) == "" and words.flush() == ""


def test_text_is_given_as_soon_as_it_is_sure() -> None:
    name = "mini-1"
    ids = ids_of(name, "a 🙂!")
    words = Words(spelling(name), ("!!",))
    parts = [words.add(token) for token in ids]
    assert parts[0] == "a"
    smile = next(i for i, part in enumerate(parts) if "🙂" in part)
    assert smile > 2 and all(part == "" for part in parts[2:smile])  # its bytes are told at once, when all are there
    assert parts[-1] == "" and words.flush() == "!"  # "!!" might have come


def test_the_first_stop_string_that_is_complete_counts_and_the_longest_of_those() -> None:
    name = "bytes"
    for stop, left in ((("abc", "b"), "xa"), (("bc", "abc"), "x"), (("c", "abcd"), "xab")):
        words = Words(spelling(name), stop)
        assert "".join(told(words, ids_of(name, "xabcd"))) == left
        assert words.stopped


def test_half_a_letter_at_the_end_is_shown_as_broken() -> None:
    name = "mini-1"
    ids = ids_of(name, "a🙂")[:-1]
    words = Words(spelling(name))
    assert [words.add(token) for token in ids][-1] == ""
    assert words.flush() == decoded(name, ids)[1:] and decoded(name, ids).endswith("\ufffd")


def test_a_stop_string_in_what_is_left_is_met() -> None:
    name = "mini-1"
    ids = ids_of(name, "a🙂")[:-1]
    words = Words(spelling(name), ("\ufffd",))
    assert "".join(told(words, ids)) == "a"
    assert words.stopped


def test_special_tokens_are_not_shown() -> None:
    made = tokenizer("mini-1")
    end, picture = made.convert_tokens_to_ids("<|end|>"), made.convert_tokens_to_ids("<image>")
    ids = ids_of("mini-1", "one two")
    words = Words(spelling("mini-1"), ("<|end|>", "<image>"))
    assert "".join(told(words, [picture, *ids, end])) == "one two"
    assert not words.stopped


@pytest.mark.parametrize("name", NAMES)
def test_what_chat_decodes_but_for_outer_blanks(name: str) -> None:
    """``evaluate.Chat.decode`` takes the ids before the end, decodes and strips."""
    made = tokenizer(name)
    for text in ("  two  words \n", "漢字 🙂", ""):
        ids = ids_of(name, text)
        assert "".join(told(Words(spelling(name)), ids)).strip() == made.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_by_themselves(name: str) -> None:
    """The bytes of a text's tokens, joined, are the text's."""
    for text in ("a cat, 12é漢🙂", "two  blanks\n"):
        raw = b"".join(spelling(name).alone(token)[1] for token in ids_of(name, text))
        assert raw.decode().removeprefix(" " * (name == "pieces")) == text
    made = tokenizer(name)
    assert spelling(name).alone(made.eos_token_id) == (made.eos_token, made.eos_token.encode())
    assert spelling(name).alone(len(made) + 100) == ("", b"")


def test_parts_that_do_not_make_the_text_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that changes its mind about what it had said."""

    def fickle(self: Spelling, ids: Any) -> str:
        return "ab" if len(ids) == 1 else "cd" * len(ids)

    monkeypatch.setattr(Spelling, "decode", fickle)
    words = Words(spelling("bytes"))
    assert words.add(50) == "ab"
    with pytest.raises(ServeError, match="parts") as caught:
        words.add(51)
    assert caught.value.kind == "internal"
    with pytest.raises(ServeError, match="parts"):
        words.flush()


def test_an_empty_stop_string_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="no letters"):
        Words(spelling("bytes"), ("a", ""))
