"""Labels: the assistant's tokens and nothing else, in every family, template and tokenizer.

Two oracles that share nothing with the encoder: conversations spelt by hand, piece by piece, each piece
tokenised alone; and, over generated conversations, that what is labelled reads as what was said.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import transformers
from data import processors
from data.processors import CLOSING, EXPANSION, FAMILIES, OPENING, PARTS, STRIPS, TEMPLATES, made, picture, turns
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from tarsia.core.errors import ConfigError, DataError
from tarsia.data import IGNORED, PICTURE, Batch, Encoder, Message, Picture, Sample

WITH_FIRST = ("llama 3", "gemma", "mistral")  # templates that write the first token themselves


def sample(*turns: tuple[int, str, str], row: int = 0, side: int = 16) -> Sample:
    """A row from (pictures, question, answer) a turn."""
    messages, pictures = [], []
    for count, question, answer in turns:
        messages += [Message("user", (*(PICTURE,) * count, question)), Message("assistant", (answer,))]
        pictures += [Picture(picture(side, len(pictures) + i), f"{i}.png", "cells", row) for i in range(count)]
    return Sample(tuple(messages), tuple(pictures), "cells", row)


MIXED = (
    sample((0, "what is a bird?", "it has wings")),
    sample((1, "what is this?", "a cat"), (0, "and then?", "a dog 4"), row=1),
    sample((2, "how many?", "4 cats"), (1, "and here?", "1 ship and 2 cars"), row=2),
)


# Older transformers refuse, for Mllama, rows without a picture beside rows with one.
OLD_MLLAMA = "at least one image per sample" in inspect.getsource(transformers.MllamaProcessor)


def mixed(family: str) -> tuple[Sample, ...]:
    return MIXED[1:] if family == "mllama" and OLD_MLLAMA else MIXED


def templates_of(family: str) -> tuple[str, ...]:
    return WITH_FIRST if family == "mllama" else tuple(TEMPLATES)


PAIRS = [(family, template) for family in FAMILIES for template in templates_of(family)]


def said(encoder: Encoder, batch: Batch, row: int) -> str:
    kept = batch.labels[row][batch.labels[row] != IGNORED]
    text: str = encoder.processor.tokenizer.decode(kept)
    return text


def answers(row: Sample, template: str) -> str:
    turns = [m.text for m in row.messages if m.role == "assistant"]
    turns = [t.strip() for t in turns] if template in STRIPS else turns
    return "".join(OPENING.get(template, "") + t + CLOSING[template] for t in turns)


@pytest.mark.parametrize("family, template", PAIRS)
def test_what_is_labelled_reads_as_what_was_said(family: str, template: str) -> None:
    encoder = Encoder(made(family, template))
    rows = mixed(family)
    batch = encoder.batch(rows)
    assert [said(encoder, batch, i) for i in range(len(rows))] == [answers(row, template) for row in rows]
    assert batch.n_pictures == (0, 1, 3)[-len(rows) :]
    assert (batch.sources, batch.rows) == (("cells",) * len(rows), (0, 1, 2)[-len(rows) :])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    assert batch.labels.shape == ids.shape
    assert bool((batch.labels[batch.labels != IGNORED] == ids[batch.labels != IGNORED]).all())
    assert bool((batch.labels[~mask] == IGNORED).all())
    assert bool((batch.labels[ids == encoder.processor.image_token_id] == IGNORED).all())
    assert encoder.closes == (template != "vicuna")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_a_batch_is_the_row_alone(family: str, side: Any) -> None:
    encoder = Encoder(made(family, "mistral"), padding_side=side)
    batch = encoder.batch(mixed(family))
    pixels = batch.inputs["pixel_values"]
    at = 0
    for i, row in enumerate(mixed(family)):
        alone = encoder.batch([row])
        mask = batch.inputs["attention_mask"][i].bool()
        assert bool(mask[0 if side == "right" else -1])
        assert torch.equal(batch.inputs["input_ids"][i][mask], alone.inputs["input_ids"][0])
        assert torch.equal(batch.labels[i][mask], alone.labels[0])
        for name in {"token_type_ids", "mm_token_type_ids"} & set(batch.inputs):
            assert torch.equal(batch.inputs[name][i][mask], alone.inputs[name][0])
        if not row.pictures:
            assert "pixel_values" not in alone.inputs
        elif family in ("idefics", "mllama"):  # one row of pictures a row, padded
            own = alone.inputs["pixel_values"][0]
            assert torch.equal(pixels[i][: len(own)], own)
        else:  # pictures of all rows, one after another
            own = alone.inputs["pixel_values"]
            ours = pixels[at : at + len(own)]
            assert torch.equal(ours[:, : own.shape[1]], own)  # OneVision pads tiles to the most in the batch
            at += len(own)
    assert at in (0, len(pixels))


def by_hand(family: str, encoder: Encoder, row: Sample) -> tuple[list[int], list[int]]:
    """Ids and labels of a row in ChatML, each piece tokenised alone."""
    tokenizer = encoder.processor.tokenizer
    ids = [tokenizer.bos_token_id] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    labels = [IGNORED] * len(ids)
    for message in row.messages:
        words = "".join(p if isinstance(p, str) else EXPANSION[family] for p in message.parts)
        learnt = message.role == "assistant"
        head = f"<|im_start|>{message.role}\n"
        start = ((head, False), (words, True)) if learnt else ((head + words, False),)
        for piece, counts in (*start, ("<|im_end|>", learnt), ("\n", False)):
            new = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += new
            labels += new if counts else [IGNORED] * len(new)
    return ids, labels


@pytest.mark.parametrize("family", sorted(set(EXPANSION) - {"mllama"}))
def test_ids_and_labels_are_those_built_by_hand(family: str) -> None:
    encoder = Encoder(made(family, "chatml"))
    for row in MIXED:
        batch = encoder.batch([row])
        ids, labels = by_hand(family, encoder, row)
        assert batch.inputs["input_ids"][0].tolist() == ids
        assert batch.labels[0].tolist() == labels


TOKENIZERS = {
    "bytes": lambda template: made("llava", template),
    "bytes, offsets trimmed": lambda template: made("llava", template, trim=True),
    "pieces": lambda template: made("llava", template, make=processors.pieces_tokenizer),
}
ENCODERS = {
    (kind, template): Encoder(make(template))
    for (kind, make), template in itertools.product(TOKENIZERS.items(), TEMPLATES)
    if kind != "pieces" or template in ("vicuna", "vicuna with end", "mistral", "chatml")
}
WORDS = (
    "ASSISTANT:",
    "USER: ",
    "[/INST]",
    "assistant\n",
    " model",
    "{{ x }}",
    "{% endfor %}",
    "a cat",
    "\n\n",
    " ",
    "é😀",
    "\u200d",
    "▁",
)
TEXT = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=4).map("".join)
TURNS = st.lists(st.tuples(st.integers(0, 2), TEXT, TEXT, st.booleans()), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ENCODERS)), TURNS)
def test_over_all_conversations_only_what_was_said_is_labelled(
    key: tuple[str, str], talk: list[tuple[int, str, str, bool]]
) -> None:
    kind, template = key
    encoder = ENCODERS[key]
    row = sample(*((count, question, question if same else answer) for count, question, answer, same in talk))
    texts = "".join(message.text for message in row.messages)
    assume(not any(control in texts for control in (*processors.CONTROLS, "<image>", "<unk>")))
    if kind == "pieces":  # this toy's normaliser knows no other spaces, and "▁" is its space
        assume("▁" not in texts)
    try:
        batch = encoder.batch([row])
    except DataError as error:
        if "a token holds both" not in error.what:
            raise
        # Where the template's newline runs into the answer's own white space; the toy of pieces joins across words.
        event("refused")
        leads = any(m.text[:1].isspace() for m in row.messages if m.role == "assistant")
        if leads or kind == "pieces":
            return
        raise
    got, wanted = said(encoder, batch, 0), answers(row, template)
    edges = any(m.text != m.text.strip() for m in row.messages if m.role == "assistant")
    if edges or template == "vicuna" or kind == "pieces":
        # White space at a turn's edge may stand in a token with the template's.
        assert "".join(got.split()) == "".join(wanted.split())
    else:
        event("exact")
        assert got == wanted
    users = torch.tensor([label != IGNORED for label in batch.labels[0].tolist()])
    assert int(users.sum()) < len(users)


def test_the_space_of_an_answer_is_its_own_where_tokens_allow() -> None:
    """In the generated test white space may be missing; here nothing is."""
    for template in TEMPLATES:
        encoder = Encoder(made("llava", template, trim=True))
        row = sample((0, "a  b ", "  two  spaces\n\nand lines"), (0, " ", "x"))
        if template in STRIPS or template in OPENING:
            assert said(encoder, encoder.batch([row]), 0) == answers(row, template)


_BY_ROLE = "{% if m['role'] == 'assistant' %}"
_HEAD, _PROMPT = "{{ m['role'] + ':' }}", "assistant:"
_LATEST = "c['text'] if m is sameas messages[-1] or m['role'] == 'user' else c['text'].split('/')[-1]"
REFUSED = {
    # Qwen3 drops what was thought in earlier turns.
    "forgets": turns(_HEAD, "</s>", _PROMPT, PARTS.replace("c['text']", _LATEST)),
    "reverses": turns(_HEAD, "</s>", _PROMPT, over="messages | reverse"),
    "counts": "{{ messages | length }}" + turns(_HEAD, "</s>", _PROMPT),
    "prompts otherwise": turns(_HEAD, "</s>", _PROMPT + "<think>"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_rewrites_the_past_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="writes the beginning of a conversation otherwise") as error:
        Encoder(made("llava", REFUSED[name])).batch([sample((0, "q", "thought/a"), (0, "q", "thought/b"), row=5)])
    assert "Row 5 of cells" in str(error.value) and "became" in str(error.value)


def without_prompt(template: str) -> str:
    return TEMPLATES[template].replace("add_generation_prompt", "false")


@pytest.mark.parametrize(
    "template, says",
    [
        ("", "no chat template"),
        (TEMPLATES["chatml"] + "{{ strftime_now('%d') }}", "reads the clock"),
        (TEMPLATES["chatml"].replace("MARK", "<picture>"), "does not write the image token"),
        (TEMPLATES["chatml"].replace("MARK", "MARKMARK"), "does not write the image token"),
        (without_prompt("chatml"), "no generation prompt"),
        (without_prompt("vicuna"), "no generation prompt"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not write what the user says"),
        ("{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}", "shows no pictures"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ messages[7]['role'] }}", "refuses it"),
    ],
)
def test_a_template_is_tried_before_it_is_trusted(template: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        Encoder(made("llava", template))


def test_what_is_asked_is_how_the_answered_row_begins() -> None:
    template = Encoder(made("llava", "default system")).template
    rendered = template.render(MIXED[1])
    assert template.write(MIXED[1].messages[:1], prompt=True) == rendered.text[: rendered.spans[0][0]]
    assert template.write(MIXED[1].messages, prompt=False) == rendered.text


def test_a_date_makes_a_clock_harmless() -> None:
    clock = "{% if not date is defined %}{% set date = strftime_now('%d') %}{% endif %}{{ date }}" + TEMPLATES["chatml"]
    encoder = Encoder(made("llava", clock), variables={"date": "26 Jul 2024"})
    assert "26 Jul 2024" in encoder.processor.tokenizer.decode(encoder.batch([MIXED[0]]).inputs["input_ids"][0])


def test_a_prompt_that_runs_into_the_answer_is_refused() -> None:
    """At inference the prompt's last space would be a token of its own, and " a" never come."""
    template = TEMPLATES["vicuna with end"].replace("ASSISTANT:{%", "{{ 'ASSISTANT: ' }}{%")
    with pytest.raises(DataError, match="holds both the assistant's text and the template's") as error:
        Encoder(made("llava", template)).batch([sample((0, "q", "a cat"), row=4)])
    assert "Row 4 of cells" in str(error.value) and "' a'" in str(error.value)


def test_an_answer_that_runs_into_the_next_turn_is_refused() -> None:
    """The answer ends in "USE" and the template goes on with "R:": one token is "USER"."""
    template = turns(_BY_ROLE + "A:{% else %}R:{% endif %}", "", "A:")
    with pytest.raises(DataError, match="holds both") as error:
        Encoder(made("llava", template)).batch([sample((0, "q", "what USE"), (0, "q", "a"))])
    assert "' USER'" in str(error.value) or "'USER'" in str(error.value)


def test_white_space_in_a_token_with_the_prompts_is_not_learnt() -> None:
    encoder = Encoder(made("llava", "chatml"))
    batch = encoder.batch([sample((0, "q", "\n cat"))])
    assert "\n\n" in [encoder.processor.tokenizer.decode([i]) for i in batch.inputs["input_ids"][0]]
    assert said(encoder, batch, 0) == " cat<|im_end|>"


@pytest.mark.parametrize("first", [(0, "what?", "a cat"), (1, "what is this?", "a cat")])
def test_a_first_token_put_in_by_the_processor_moves_the_spans(first: tuple[int, str, str]) -> None:
    """Mllama writes it before the text, or after the pictures that the text begins with."""
    for template in ("vicuna with end", turns("", _BY_ROLE + "</s>{% else %}A:{% endif %}", "")):
        encoder = Encoder(made("mllama", template, bos=False))
        row = sample(first, (2, "and?", "two dogs"))
        batch = encoder.batch([row])
        assert int((batch.inputs["input_ids"] == encoder.processor.tokenizer.bos_token_id).sum()) == 1
        opening = " " if template == "vicuna with end" else ""
        assert said(encoder, batch, 0) == f"{opening}a cat</s>{opening}two dogs</s>"


def test_a_template_that_forgets_a_picture_is_seen() -> None:
    template = TEMPLATES["chatml"].replace(
        "{% if c['type'] == 'image' %}MARK", "{% if c['type'] == 'image' %}{{ 'MARK' if m is sameas messages[0] }}"
    )
    with pytest.raises(DataError, match="differ in pictures") as error:
        Encoder(made("llava", template)).batch([MIXED[2]])
    assert "2 markers '<image>', 3 pictures" in str(error.value)


def test_a_turn_that_only_takes_strings_is_given_one() -> None:
    system = "{{ messages[0]['content'] + '\n' }}{% set messages = messages[1:] %}"
    template = "{% if messages[0]['role'] == 'system' %}" + system + "{% endif %}"
    encoder = Encoder(made("llava", template + TEMPLATES["chatml"]))
    row = Sample((Message("system", ("be ", "kind")), *MIXED[1].messages), MIXED[1].pictures, "cells", 1)
    text = encoder.processor.tokenizer.decode(encoder.batch([row]).inputs["input_ids"][0])
    assert "be kind\n<|im_start|>user\n" in text
    with pytest.raises(DataError, match="no pictures in a turn of the system"):
        encoder.batch([Sample((Message("system", (PICTURE,)), *MIXED[0].messages), MIXED[1].pictures, "cells", 1)])


def test_texts_with_control_tokens_are_refused() -> None:
    encoder = Encoder(made("llava"))
    for word in ("<image>", "<|im_end|>", "</s>", "<pad>"):
        for row in (sample((0, f"a{word}b", "x"), row=3), sample((0, "q", f"x {word}"), row=3)):
            with pytest.raises(DataError, match="control token") as error:
                encoder.batch([row])
            assert word in str(error.value) and "Row 3 of cells" in str(error.value)


def test_rows_without_an_answer_or_with_a_strange_one_are_refused() -> None:
    encoder = Encoder(made("llava"))
    user, says = MIXED[0].messages
    for messages, words in (
        ((user,), "the assistant says nothing that can be learnt"),
        ((says, user), "starts the row"),
        ((user, Message("assistant", (PICTURE,))), "holds a picture"),
    ):
        pictures = (Picture(picture(), "x", "cells", 3),) * sum(m.n_pictures for m in messages)
        with pytest.raises(DataError, match=words) as error:
            encoder.batch([Sample(messages, pictures, "cells", 3)])
        assert "Row 3 of cells" in str(error.value)


def test_an_answer_that_the_template_leaves_out_is_seen() -> None:
    template = TEMPLATES["chatml"].replace("{{ c['text'] }}", "{{ c['text'].replace('cat', '') }}")
    with pytest.raises(DataError, match="does not write what message 1 says"):
        Encoder(made("llava", template)).batch([sample((0, "q", "a cat"))])


def test_an_empty_answer_teaches_to_stop() -> None:
    encoder = Encoder(made("llava"))
    assert said(encoder, encoder.batch([sample((0, "q", ""))]), 0) == "<|im_end|>"


def test_padding_that_looks_like_the_end_is_not_learnt_and_the_end_is() -> None:
    processor = made("llava", "vicuna with end")
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    encoder = Encoder(processor)
    batch = encoder.batch(MIXED)
    assert [said(encoder, batch, i) for i in range(3)] == [answers(row, "vicuna with end") for row in MIXED]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_takes_text_never_a_picture(family: str) -> None:
    processor = made(family, "mistral")
    row = sample((1, "what is this?", "a cat and a dog and a bird"), (0, "q" * 30, "yes"), row=6)
    whole = Encoder(processor).batch([row])
    ids, labels = whole.inputs["input_ids"][0], whole.labels[0]
    length, first = len(ids), int((labels != IGNORED).nonzero()[0])
    last = int((ids == processor.image_token_id).nonzero()[-1])
    for cut in (length + 5, length, first + 3, first + 1):
        batch = Encoder(processor, max_length=cut).batch([row])
        assert torch.equal(batch.inputs["input_ids"][0], ids[:cut])
        assert torch.equal(batch.labels[0], labels[:cut])
        assert {
            v.shape[1]
            for k, v in batch.inputs.items()
            if k in ("attention_mask", "token_type_ids", "cross_attention_mask")
        } == {min(cut, length)}
    with pytest.raises(DataError, match="nothing that the assistant says is left") as error:
        Encoder(processor, max_length=first).batch([row])
    assert f"max_length {first}" in str(error.value) and "Row 6 of cells" in str(error.value)
    for cut in (last, 3):
        with pytest.raises(DataError, match="would cut a picture") as error:
            Encoder(processor, max_length=cut).batch([mixed(family)[0], row])
        assert "Row 6 of cells" in str(error.value)


def test_what_can_not_be_exact_is_refused_at_once() -> None:
    for attribute, value, says in (("is_fast", False, "no offsets"), ("pad_token_id", None, "no padding token")):
        processor = made("llava")
        kind = type(processor.tokenizer)
        processor.tokenizer.__class__ = type(kind.__name__, (kind,), {attribute: value})
        with pytest.raises(DataError, match=says):
            Encoder(processor)
    with pytest.raises(ConfigError, match="max_length"):
        Encoder(made("llava"), max_length=0)
    processor = made("llava")
    processor.image_token = None
    with pytest.raises(DataError, match="no image token"):
        Encoder(processor)


def test_two_first_tokens_are_seen() -> None:
    template = "{{ ' ' }}" + TEMPLATES["mistral"].replace("{{ bos_token }}", "")
    assert Encoder(made("mllama", "mistral")).batch(mixed("mllama"))
    with pytest.raises(DataError, match="two first tokens"):
        Encoder(made("mllama", template)).batch([MIXED[0]])


def test_a_processor_that_writes_on_after_the_template_is_refused() -> None:
    processor = processors.paligemma()
    processor.chat_template = TEMPLATES["vicuna with end"].replace("MARK", "<image>")
    with pytest.raises(DataError, match="in a way that can not be followed"):
        Encoder(processor).batch([MIXED[1]])


def broken(family: str, **methods: Any) -> Encoder:
    processor = made(family)
    processor.__class__ = type(type(processor).__name__, (type(processor),), methods)
    return Encoder(processor)


def test_a_picture_without_tokens_or_tokens_without_a_picture_are_seen() -> None:
    nothing = broken("llava", replace_image_token=lambda self, inputs, image_idx, **rest: "picture")
    with pytest.raises(DataError, match="image tokens and pictures do not match"):
        nothing.batch([MIXED[1]])


def test_a_processor_that_tokenises_another_text_is_seen() -> None:
    def call(self: Any, text: list[str], **rest: Any) -> Any:
        made = type(self).__mro__[1].__call__(self, text=text, **rest)
        made["input_ids"][0, -1] += 1
        return made

    with pytest.raises(DataError, match="are not those of its text"):
        broken("llava", __call__=call).batch([MIXED[1]])


def test_a_refusal_of_the_processor_names_the_rows() -> None:
    def call(self: Any, **rest: Any) -> Any:
        raise ValueError("not these")

    with pytest.raises(DataError, match="refuses row 0 of cells, row 1 of cells: not these"):
        broken("llava", __call__=call).batch(MIXED[:2])


def test_the_processor_is_left_as_it_was() -> None:
    processor = made("llava")
    before = dict(vars(processor))
    Encoder(processor).batch(MIXED)
    assert vars(processor) == before
