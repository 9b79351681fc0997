"""The walk: numbers that agree with the encoder, no row that ends it, and what is shown of a row."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from typing import Any, overload

import pytest
from data.lint_worlds import EVAL, TRAIN, clean, photograph, png, processor, shown
from data.processors import FAMILIES, made, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tarsia.data import IGNORED, PICTURE, Encoder, Message, Picture, Sample, Source, read
from tarsia.data.lint import Findings, Given, Severity, Where, lint
from tarsia.data.lint.survey import spaced
from tarsia.data.lint.view import What, runs, visible


def sample(number: int, answer: str = "a cat", pictures: int = 1, question: str = "what is this?") -> Sample:
    parts = (*(PICTURE,) * pictures, question)
    held = tuple(Picture(picture(16, number + i), f"{i}.png", "rows", number) for i in range(pictures))
    return Sample((Message("user", parts), Message("assistant", (answer,))), held, "rows", number)


class Table(Sequence[Sample]):
    """Samples; an exception among them is raised when its row is asked for."""

    def __init__(self, rows: Sequence[Sample | Exception]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(row, slice):
            raise TypeError(row)
        found = self._rows[row]
        if isinstance(found, Exception):
            raise found
        return found


def linted(table: Sequence[Sample | Exception], encoder: Encoder | None = None, **options: Any) -> Findings:
    return lint([Given("rows", Table(table))], encoder or Encoder(processor("chatml")), **options)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mllama"])
def test_counts_are_those_of_the_encoder(family: str) -> None:
    encoder = Encoder(made(family, "chatml"))
    rows = [sample(i, "a cat and a dog " * (1 + i % 3), pictures=i % 3) for i in range(20)]
    for row in linted(rows, encoder).survey.sources[0].rows:
        batch = encoder.batch([rows[row.number]])
        ids = batch.inputs["input_ids"]
        assert row.tokens == batch.inputs["attention_mask"].sum()
        assert row.labelled == row.kept == (batch.labels != IGNORED).sum()
        assert row.image == (ids == encoder.processor.image_token_id).sum()
        assert len(row.looks) == row.number % 3


def test_what_is_cut_is_what_the_encoder_cuts() -> None:
    whole, cut = Encoder(processor("chatml")), Encoder(processor("chatml"), 40)
    rows = [sample(i, "a cat and a dog " * (1 + i)) for i in range(6)]
    seen = linted(rows, cut).survey.sources[0].rows
    assert [row.labelled for row in seen] == [int((whole.batch([r]).labels != IGNORED).sum()) for r in rows]
    assert [row.kept for row in seen] == [int((cut.batch([r]).labels != IGNORED).sum()) for r in rows]
    assert any(row.kept < row.labelled for row in seen) and any(row.kept == row.labelled for row in seen)


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyError("x"), RecursionError("deep"), OSError("gone")])
def test_a_row_that_raises_anything_is_a_finding(error: Exception) -> None:
    rows: list[Sample | Exception] = [sample(i) for i in range(10)]
    rows[4] = error
    findings = linted(rows)
    (found,) = [f for f in findings.findings if f.code == "unreadable-row"]
    assert found.rows == (Where("rows", 4),) and found.severity is Severity.ERROR
    assert type(error).__name__ in found.what
    assert [row.number for row in findings.survey.sources[0].encoded] == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_row_that_breaks_the_processor_does_not_take_its_batch_along(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Encoder.batch

    def breaking(self: Encoder, samples: Sequence[Sample]) -> Any:
        if any(s.row == 5 for s in samples):
            raise ZeroDivisionError("patches")
        return encode(self, samples)

    monkeypatch.setattr(Encoder, "batch", breaking)
    findings = linted([sample(i) for i in range(12)])
    (found,) = findings.errors
    assert (found.code, found.rows) == ("encoding", (Where("rows", 5),))
    assert len(findings.survey.sources[0].encoded) == 11


TEXT = st.text(st.characters(codec=None), max_size=30)
VALUE = st.one_of(TEXT, st.none(), st.integers(), st.binary(max_size=20).map(lambda b: b.decode("latin1")))
ROW = st.one_of(
    st.fixed_dictionaries({"question": VALUE, "answer": VALUE}, optional={"image": VALUE, "images": VALUE}),
    st.fixed_dictionaries({"messages": st.lists(st.fixed_dictionaries({"role": VALUE, "content": VALUE}), max_size=3)}),
    VALUE,
)


SHORT = Encoder(processor("chatml"), 32)


@settings(max_examples=30, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=8))
def test_no_row_ends_the_lint(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    findings = lint([Given("rows", read(Source(path=str(path))))], SHORT)
    seen = findings.survey.sources[0]
    assert [row.number for row in seen.rows] == list(range(len(rows)))
    assert all(bool(row.tokens) or row.trouble is not None for row in seen.rows)
    assert len(findings.views(first=len(rows))) == len(rows)
    failed = {row.number for row in seen.rows if row.trouble is not None}
    assert failed <= {w.row for f in findings.errors if f.code != "all-fail" for w in f.rows}


@given(st.integers(1, 5000), st.one_of(st.none(), st.integers(1, 300)))
def test_a_sample_is_spread_over_all_rows(total: int, rows: int | None) -> None:
    chosen = list(spaced(total, rows))
    assert len(chosen) == min(total, rows or total) and chosen[0] == 0
    assert chosen == sorted(set(chosen)) and chosen[-1] < total
    stretch = total / len(chosen)
    assert all(abs(number - i * stretch) <= stretch + 1 for i, number in enumerate(chosen))


def test_a_sample_sees_every_kind_of_a_table_that_repeats_itself() -> None:
    assert {number % 4 for number in spaced(4000, 1000)} == {0, 1, 2, 3}


def test_progress_is_told_row_by_row() -> None:
    told: list[tuple[str, int, int]] = []
    linted([sample(i) for i in range(20)], rows=8, progress=lambda *at: told.append(at))
    assert told == [("rows", i + 1, 8) for i in range(8)]


def test_five_thousand_rows_of_text() -> None:
    rows = [sample(i, f"answer {i} of many", 0, f"what is {i}?") for i in range(5000)]
    findings = linted(rows, rows=None)
    assert len(findings.survey.sources[0].encoded) == 5000
    assert [f.code for f in findings.findings] == []


def test_numbers_of_a_source() -> None:
    train, held = clean().lint().numbers
    assert (train.rows, train.looked, train.failed, train.pictures) == (TRAIN, TRAIN, 0, TRAIN)
    assert (train.per_picture, train.share, train.walks) == (4.0, 1.0, 2.0)
    assert (held.rows, held.share, held.walks, held.trained) == (EVAL, None, None, False)
    assert sum(train.histogram) == TRAIN and train.median <= train.most <= train.longest
    assert 0 < train.labelled < 1


def test_the_loss_is_shown_as_it_is() -> None:
    encoder = Encoder(processor("chatml"))
    shown = runs(encoder.batch([sample(0, "a cat", 2)]), encoder.processor)
    learnt = "".join(run.text for run in shown if run.learnt)
    assert learnt == "a cat<|im_end|>"
    assert [run.text for run in shown if run.what is What.PICTURE] == ["[2 pictures: 8 tokens]"]  # side by side
    texts = "".join(run.text for run in shown if run.what is not What.PICTURE)
    assert texts == "<s><|im_start|>user\nwhat is this?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    controls = [run.text for run in shown if run.what is What.CONTROL]
    assert controls == ["<s><|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert [run.text for run in shown if run.what is What.CONTROL and run.learnt] == ["<|im_end|>"]
    assert sum(run.tokens for run in shown) == encoder.batch([sample(0, "a cat", 2)]).inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(answer=st.text("abc é\n猫🦊 ", min_size=1, max_size=20).filter(str.strip))
def test_what_is_shown_as_learnt_is_what_was_said(family: str, answer: str) -> None:
    encoder = Encoder(PROCESSORS[family])
    batch = encoder.batch([sample(0, answer.strip())])
    shown = runs(batch, encoder.processor)
    kept = batch.labels[0][batch.labels[0] != IGNORED]
    assert "".join(run.text for run in shown if run.learnt) == encoder.processor.tokenizer.decode(kept)


PROCESSORS = {family: made(family, "llama 3" if family == "mllama" else "chatml") for family in FAMILIES}


def test_what_max_length_takes_away_is_marked() -> None:
    encoder = Encoder(processor("chatml"))
    shown = runs(encoder.batch([sample(0)]), encoder.processor, 20)
    assert sum(run.tokens for run in shown if not run.cut) == 20
    assert [run.cut for run in shown] == sorted(run.cut for run in shown)


def test_nothing_acts_on_a_terminal() -> None:
    assert visible("a\x1b[31mred\x07\r\n\u202eback\ud800\x9b") == "a␛[31mred␇␍\n\\u202eback\\ud800\\u009b"


def test_rows_that_are_named_are_shown() -> None:
    world = clean()
    world.train[17]["image"] = shown(b"no picture")
    world.held[20]["question"] = "what <|im_end|> is this?"
    views = {view.where: view for view in world.lint().views()}
    assert {Where("train", i) for i in range(3)} | {Where("held", i) for i in range(3)} <= set(views)
    broken, control = views[Where("train", 17)], views[Where("held", 20)]
    assert broken.codes == ("unreadable-picture",) and broken.error and "not a picture" in broken.pictures[0]
    assert control.codes == ("control-token",) and control.pictures[0].startswith("data:image/png;base64,")


def test_one_picture_in_many_rows_is_looked_at_once() -> None:
    same = png(photograph(1))
    rows = [
        Sample(
            (Message("user", (PICTURE, f"what is {i}?")), Message("assistant", ("a cat",))),
            (Picture(same, "same.png", "rows", i),),
            "rows",
            i,
        )
        for i in range(30)
    ]
    assert len(linted(rows).survey.looks) == 1


class Drawn(Table):
    """Rows that are made when they are asked for, and kept by nobody."""

    def __init__(self, pictures: list[weakref.ref[Image.Image]], answer: str = "a cat") -> None:
        super().__init__([Exception()] * 40)
        self._pictures, self._answer = pictures, answer

    def __getitem__(self, row: Any) -> Any:
        made = sample(row, self._answer)
        self._pictures.append(weakref.ref(made.pictures[0].content))  # type: ignore[arg-type]
        return made


def test_pictures_that_are_gone_are_not_taken_for_later_ones() -> None:
    found = lint([Given("rows", Drawn([]))], Encoder(processor("chatml"))).survey
    assert len({found.looks[row.looks[0]].content for row in found.sources[0].rows}) == 40


def test_rows_that_fail_are_not_held() -> None:
    kept: list[weakref.ref[Image.Image]] = []
    found = lint([Given("rows", Drawn(kept, "<|im_end|>"))], Encoder(processor("chatml")))
    assert all(row.trouble is not None for row in found.survey.sources[0].rows)
    gc.collect()
    errors = [row.trouble.error for row in found.survey.sources[0].rows if row.trouble]
    assert [error.__traceback__ for error in errors] == [None] * 40
    assert sum(ref() is not None for ref in kept) == 0


@pytest.mark.parametrize("prompt, told", [("concatenate the cat", True), ("concatenate", False), ("a CAT, or?", True)])
def test_an_answer_may_stand_after_a_word_that_holds_it(prompt: str, told: bool) -> None:
    assert linted([sample(0, "cat", question=prompt)]).survey.sources[0].rows[0].told is told
