"""Every question about a picture or about nothing has the right answer, found by another way than it was made."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.base import pictures, texts
from tarsia.base.pictures import COLOURS, NUMBERS, PHOTOGRAPHS, POSITIONS, SHAPES, Thing

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")  # fmt: skip
RNG = st.integers(0, 2**32).map(random.Random)
THINGS = st.lists(
    st.builds(Thing, st.sampled_from(SHAPES), st.sampled_from(tuple(COLOURS)), st.sampled_from(POSITIONS)),
    min_size=1,
    max_size=4,
    unique_by=lambda thing: thing.position,
)


def answer(question: str, things: list[Thing]) -> str:
    """What a person who sees ``things`` would say; an ambiguous question has no answer and fails."""

    def article(words: str) -> str:
        return ("an " if words[0] in "aeiou" else "a ") + words

    def only(value: str) -> Thing:
        (thing,) = [t for t in things if value in (t.shape, t.colour, t.position)]
        return thing

    if found := re.fullmatch(r"What is in the (top|bottom) (left|right)\?", question):
        at = [t for t in things if t.position == " ".join(found.groups())]
        return article(f"{at[0].colour} {at[0].shape}") if at else "nothing"
    if found := re.fullmatch(r"What colour is the (?:shape in the (.+)|(\w+))\?", question):
        return only(found[1] or found[2]).colour
    if found := re.fullmatch(r"What shape is (?:in the (.+)|(\w+))\?", question):
        return article(only(found[1] or found[2]).shape)
    if found := re.fullmatch(r"Where is the (\w+?)(?: shape)?\?", question):
        return only(found[1]).position
    if found := re.fullmatch(r"Is there an? (\w+) shape\?", question):
        return "yes" if found[1] in [t.colour for t in things] else "no"
    if question == "How many shapes are there?":
        return WORDS[len(things)]
    if found := re.fullmatch(r"How many (\w+) are there\?", question):
        plural = {
            "circles": "circle",
            "squares": "square",
            "triangles": "triangle",
            "stars": "star",
            "crosses": "cross",
        }
        return WORDS[[t.shape for t in things].count(plural[found[1]])]
    raise AssertionError(f"nobody asks {question!r}")


@settings(max_examples=300, deadline=None)
@given(THINGS, RNG)
def test_a_scene_is_asked_about_rightly(things, rng):
    question, said = texts.about_scene(things, rng)
    if question == "Describe the picture.":
        told = re.findall(r"an? (\w+) (\w+) in the (\w+ \w+)", said)
        assert [Thing(shape, colour, position) for colour, shape, position in told] == things
        assert said.startswith("There is a") and said.endswith(".") and said.count(" and ") == (len(things) > 1)
    else:
        assert said == answer(question, things)


@settings(max_examples=300, deadline=None)
@given(THINGS, RNG)
def test_a_search_is_answered_rightly_and_never_ambiguous(things, rng):
    question, said = texts.about_search(things, rng)
    assert said == answer(question, things)


def test_every_question_about_a_scene_is_asked():
    """Each form of both kinds of question occurs, and yes, no, zero and nothing are all answers."""
    rng, asked = random.Random(0), defaultdict(set)
    for seed in range(300):
        _, things = pictures.scene(seed)
        for about in (texts.about_scene, texts.about_search):
            question, said = about(things, rng)
            asked[" ".join(question.split()[:2])].add(said)
    assert set(asked) >= {"What is", "What colour", "What shape", "How many", "Describe the", "Where is", "Is there"}
    assert asked["Is there"] == {"yes", "no"}
    assert "nothing" in asked["What is"] and asked["How many"] >= {"zero", "one", "two", "three", "four"}


@given(st.sampled_from(PHOTOGRAPHS), RNG)
def test_photographs_are_named(label, rng):
    question, said = texts.about_photograph(label, rng)
    noun = f"an {label}" if label in ("airplane", "automobile") else f"a {label}"
    if "vehicle" in question:
        vehicles = ("airplane", "automobile", "ship", "truck")
        assert said == ("a vehicle" if label in vehicles else "an animal")
    elif question.startswith("Is this"):
        assert said == ("yes" if question == f"Is this {noun}?" else "no")
    else:
        assert said in (noun, f"This is a photo of {noun}.")


@given(st.integers(0, 9), RNG)
def test_digits_are_named(value, rng):
    _, said = texts.about_digit(value, rng)
    assert WORDS[value] in said.rstrip(".").split()
    assert NUMBERS[value] == WORDS[value]


@given(st.sampled_from(PHOTOGRAPHS), st.sampled_from(PHOTOGRAPHS), RNG)
def test_two_photographs_are_told_apart(first, second, rng):
    question, said = texts.about_two(first, second, rng)
    a, b = texts.article(first), texts.article(second)
    if found := re.fullmatch(r"Which picture shows (.+), the first or the second\?", question):
        assert a != b and said == {a: "the first", b: "the second"}[found[1]]
    elif found := re.fullmatch(r"What is in the (first|second) picture\?", question):
        assert said == {"first": a, "second": b}[found[1]]
    else:
        assert (question, said) == ("What is in the two pictures?", f"{a} and {b}")


@pytest.fixture(scope="module")
def rows():
    return [texts.text(number) for number in range(12_000)]


def test_a_text_is_a_function_of_its_number(rows):
    assert [texts.text(number) for number in range(100)] == rows[:100]
    assert len(set(rows)) > 3000


def test_arithmetic_is_right(rows):
    sums = nexts = 0
    for _, question, said in rows:
        plain = question.removesuffix(" Answer in a sentence.")
        if found := re.fullmatch(r"What is (\w+) plus (\w+)\?", plain):
            total = WORDS[WORDS.index(found[1]) + WORDS.index(found[2])]
            assert said == (total if plain == question else f"{found[1]} plus {found[2]} is {total}.")
            sums += 1
        elif found := re.fullmatch(r"Which number comes after (\w+)\?", plain):
            after = WORDS[WORDS.index(found[1]) + 1]
            assert said == (after if plain == question else f"After {found[1]} comes {after}.")
            nexts += 1
    assert sums > 300 and nexts > 300


def test_what_is_bigger_is_bigger(rows):
    """Over all rows, "bigger" and "smaller" agree with one order of things."""
    above = set()
    for _, question, said in rows:
        if found := re.match(r"Which is (bigger|smaller), (.+) or (.+)\?", question):
            word, a, b = found.groups()
            named = re.sub(r" is (bigger|smaller)\.$", "", said).lower()
            other = {a: b, b: a}[named]
            above.add((named, other) if word == "bigger" else (other, named))
    assert len(above) > 80
    assert not any((small, big) in above for big, small in above)
    assert ("a mountain", "an ant") in above and ("a horse", "a dog") in above


def test_a_question_has_one_answer(rows):
    said = defaultdict(set)
    for _, question, answered in rows:
        said[question].add(answered)
    assert [question for question, answers in said.items() if len(answers) > 1] == []


def test_opposites_are_mutual(rows):
    pairs = set()
    for _, question, said in rows:
        if found := re.fullmatch(r"(?:What is|Name) the opposite of (\w+)[?.]", question):
            pairs.add((found[1], said))
    assert len(pairs) >= 40
    assert {(b, a) for a, b in pairs} == pairs


def test_only_harm_is_refused(rows):
    """Every refusal asks for harm, no other row is refused, and what is asked for is never asked for helpfully."""
    tasks = defaultdict(set)
    for kind, question, said in rows:
        assert (kind == "refusals") == (said == texts.REFUSAL)
        for form in texts._ASK_HOW:
            if found := re.fullmatch(re.escape(form).replace(r"\{\}", "(.+)"), question):
                tasks[kind].add(found[1])
    assert tasks["refusals"] == set(texts._HARM)
    assert tasks["talk"] == {task for task, _ in texts._HELP}
    assert not tasks["refusals"] & tasks["talk"]


def test_what_is_to_be_repeated_is_repeated(rows):
    for kind, question, said in rows:
        assert (kind == "repeat") == question.startswith("Repeat: ")
        if kind == "repeat":
            assert question == f"Repeat: {said}" and said


def test_kinds_are_mixed_as_described(rows):
    share = {kind: count / len(rows) for kind, count in Counter(kind for kind, _, _ in rows).items()}
    assert share == pytest.approx({"words": 0.45, "refusals": 0.15, "talk": 0.15, "repeat": 0.25}, abs=0.02)


def test_a_tenth_of_the_questions_is_held_out(rows):
    questions = {question for _, question, _ in rows}
    assert sum(map(texts.held_out, questions)) / len(questions) == pytest.approx(0.1, abs=0.02)
    for kind in ("words", "refusals", "repeat"):
        assert any(texts.held_out(question) for k, question, _ in rows if k == kind)
