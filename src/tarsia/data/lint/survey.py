"""One walk over the rows: everything that rules judge by, and nothing that they judge."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Final, Literal

from PIL import Image

from tarsia.core.attach import Part
from tarsia.core.errors import DataError
from tarsia.core.site import Site
from tarsia.data.encode import IGNORED, Encoder
from tarsia.data.lint.finding import Where
from tarsia.data.lint.kin import Kin, kin
from tarsia.data.lint.looks import Look, key, look
from tarsia.data.samples import PICTURE, Message, Picture, Sample

ROWS: Final = 5000
"""Rows of a source that are looked at unless it is said otherwise, spread over all of it."""

_BATCH: Final = 16
Stage = Literal["read", "picture", "control", "template", "label", "encode", "cut"]
Progress = Callable[[str, int, int], None]
"""Told a source's name, how many of its rows are done, and how many there are to do."""


@dataclass(frozen=True)
class Given:
    """A source to look at. ``weight`` is its share in any unit, ``drawn`` the rows that the run will draw from it."""

    name: str
    rows: Sequence[Sample]
    trained: bool = True
    weight: float = 1.0
    drawn: float | None = None


@dataclass(frozen=True)
class Aim:
    """What is to be trained: the model's sites and the recipe's parts."""

    sites: tuple[Site, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a row can not be trained on, and where that showed.

    The error's traceback is dropped: its frames would hold the row's decoded pictures as long as the survey lives.
    """

    stage: Stage
    error: Exception

    def __post_init__(self) -> None:
        told: BaseException | None = self.error
        while told is not None:
            told.__traceback__ = None
            told = told.__cause__ or told.__context__


@dataclass(frozen=True, slots=True)
class Row:
    """A row's facts; what could not be told is empty.

    ``content`` digests all of it, ``question`` all but what the assistant says, both with pictures by their
    pixels; ``prompt`` digests the question without them. ``answers`` is what the assistant says in the turns
    that are learnt, ``told`` whether the prompt says one of them. ``looks`` are places in ``Survey.looks``.
    ``tokens`` counts the whole row, ``labelled`` and ``image`` those of its tokens that are learnt or a
    picture's, ``kept`` the labelled ones that `max_length` leaves.
    """

    number: int
    trouble: Trouble | None = None
    content: bytes = b""
    question: bytes = b""
    prompt: bytes = b""
    answers: tuple[str, ...] = ()
    told: bool = False
    looks: tuple[int, ...] = ()
    tokens: int = 0
    labelled: int = 0
    image: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Surveyed:
    """A source after the walk: ``rows`` are those looked at of ``total``."""

    given: Given
    total: int
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        return self.given.name

    @property
    def live(self) -> bool:
        """Whether training draws rows from it."""
        return self.given.trained and self.given.weight > 0

    @property
    def encoded(self) -> tuple[Row, ...]:
        """The rows whose tokens are known."""
        return tuple(row for row in self.rows if row.tokens)

    def some(self, rows: Sized) -> str:
        """How many these are: "3 of 40 rows (7.5%)"."""
        return f"{len(rows):,} of {len(self.rows):,} rows ({len(rows) / max(1, len(self.rows)):.1%})"

    def where(self, rows: Sequence[Row]) -> tuple[Where, ...]:
        """The rows by name."""
        return tuple(Where(self.name, row.number) for row in rows)


@dataclass(frozen=True)
class Survey:
    """All that rules are given. ``context`` is how many tokens the model has places for, ``aim`` what is trained."""

    sources: tuple[Surveyed, ...]
    looks: tuple[Look, ...]
    encoder: Encoder
    context: int | None = None
    aim: Aim | None = None

    @cached_property
    def kin(self) -> Kin:
        """Which pictures are the same or nearly so."""
        return kin(self.looks)

    @property
    def max_length(self) -> int | None:
        return self.encoder.max_length

    @property
    def trained(self) -> tuple[Surveyed, ...]:
        """The sources that training draws from."""
        return tuple(source for source in self.sources if source.live)

    @property
    def evaluated(self) -> tuple[Surveyed, ...]:
        """The sources that the recipe evaluates on."""
        return tuple(source for source in self.sources if not source.given.trained)

    @property
    def needs(self) -> frozenset[str]:
        """What is here for rules to need: "context", "max_length", "aim", "evaluation", "plan"."""
        here = {
            "context": self.context is not None,
            "max_length": self.max_length is not None,
            "aim": self.aim is not None,
            "evaluation": bool(self.evaluated),
            "plan": any(source.given.drawn is not None for source in self.sources),
        }
        return frozenset(name for name, present in here.items() if present)


@dataclass
class _Gallery:
    """Pictures that were looked at, each once, at the encoder's resolution."""

    resolution: int | None
    looks: list[Look] = field(default_factory=list)
    places: dict[object, int] = field(default_factory=dict)

    def __call__(self, sample: Sample) -> tuple[tuple[int, ...], Sample | DataError]:
        """Places of the row's pictures, and the row with decoded pictures, or why one can not be had."""
        places, shown = [], []
        bad: DataError | None = None
        for picture in sample.pictures:
            name = key(picture)
            pixels = _load(picture, self.resolution) if name in self.places else None
            if pixels is None:
                seen, pixels = look(picture, self.resolution)
                self.places[name] = len(self.looks)
                self.looks.append(seen)
            places.append(self.places[name])
            if isinstance(pixels, DataError):
                bad = bad or pixels
            else:
                shown.append(replace(picture, content=pixels))
        return tuple(places), replace(sample, pictures=tuple(shown)) if bad is None else bad


@dataclass
class _Walk:
    """The walk over one source."""

    encoder: Encoder
    gallery: _Gallery
    given: Given
    waiting: list[tuple[Row, Sample]] = field(default_factory=list)
    done: dict[int, Row] = field(default_factory=dict)

    def read(self, number: int, sample: Sample | Exception) -> None:
        """Take note of a row; its tokens are told later."""
        if isinstance(sample, Exception):
            self.done[number] = Row(number, Trouble("read", sample))
            return
        places, whole = self.gallery(sample)
        row = _row(number, sample, places, [self.gallery.looks[i] for i in places])
        if isinstance(whole, DataError):
            # what two rows show that can not be seen is not known to be the same
            self.done[number] = replace(row, content=b"", question=b"", trouble=Trouble("picture", whole))
            return
        self.waiting.append((row, whole))
        if len(self.waiting) == _BATCH:
            self.flush()

    def flush(self) -> None:
        """Encode what waits: together, and where that fails one by one."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        entire = copy.copy(self.encoder)
        entire.max_length = None
        try:
            counted = _counted(entire, waiting, self.encoder.max_length)
        except Exception as error:  # noqa: BLE001 (whatever a row makes a library raise is what is wrong with it)
            if len(waiting) > 1:
                for one in waiting:
                    self.waiting = [one]
                    self.flush()
                return
            row, sample = waiting[0]
            counted = [replace(row, trouble=Trouble(_stage(self.encoder, sample), error))]
        for row, (_, sample) in zip(counted, waiting, strict=True):
            self.done[row.number] = self._cut(row, sample)

    def _cut(self, row: Row, sample: Sample) -> Row:
        """Whether a row of training that is too long can still be trained on."""
        limit = self.encoder.max_length
        if limit is None or row.tokens <= limit or not self.given.trained:
            return row
        try:
            self.encoder.batch([sample])
        except DataError as error:
            return replace(row, trouble=Trouble("cut" if row.kept else "label", error))
        return row


def survey(
    given: Sequence[Given],
    encoder: Encoder,
    *,
    rows: int | None = ROWS,
    context: int | None = None,
    aim: Aim | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Look at up to ``rows`` rows of every source (None: all of them). A row that fails is a fact, never the end."""
    gallery = _Gallery(encoder.resolution)
    surveyed = []
    for source in given:
        walk = _Walk(encoder, gallery, source)
        total = len(source.rows)
        chosen = spaced(total, rows)
        for done, (number, sample) in enumerate(_samples(source.rows, chosen)):
            walk.read(number, sample)
            if progress is not None:
                progress(source.name, done + 1, len(chosen))
        walk.flush()
        surveyed.append(Surveyed(source, total, tuple(walk.done[number] for number in sorted(walk.done))))
    return Survey(tuple(surveyed), tuple(gallery.looks), encoder, context, aim)


def spaced(total: int, rows: int | None) -> Sequence[int]:
    """At most ``rows`` of the numbers below ``total``: one of each of as many equal stretches, the first among them.

    Where in its stretch a row lies jumps about, or a table that repeats itself would be seen from one side only.
    """
    if rows is None or total <= rows:
        return range(total)
    edges = [i * total // rows for i in range(rows + 1)]
    return [a + (i * 0x9E3779B1 & 0xFFFFFFFF) * (b - a) // 2**32 for i, (a, b) in enumerate(pairwise(edges))]


def _load(picture: Picture, resolution: int | None) -> Image.Image | DataError:
    try:
        return picture.load(resolution)
    except DataError as error:
        return error


def _samples(rows: Sequence[Sample], numbers: Sequence[int]) -> Iterator[tuple[int, Sample | Exception]]:
    for number in numbers:
        try:
            yield number, rows[number]
        except Exception as error:  # noqa: BLE001 (as above: it is reported, with its row)
            yield number, error


def _row(number: int, sample: Sample, places: tuple[int, ...], looks: Sequence[Look]) -> Row:
    taught = [message.role == "assistant" and message.learnt for message in sample.messages]
    said = tuple(_said(message) for message, own in zip(sample.messages, taught, strict=True) if own)
    asked = "\n".join(_asked(message.parts) for message in sample.messages if message.role != "assistant")
    turns = [
        None if own else (m.role, m.name, _asked(m.parts), _said(m))
        for m, own in zip(sample.messages, taught, strict=True)
    ]
    shown = [look.content for look in looks]
    return Row(
        number,
        content=_digest(turns, sample.tools, said, shown),
        question=_digest(turns, sample.tools, shown),
        prompt=_digest(turns, sample.tools),
        answers=said,
        told=any(_within(answer, asked) for answer in said),
        looks=places,
    )


def _said(message: Message) -> str:
    """Everything that an assistant's turn says: its thought, its text, and its calls of tools."""
    calls = [f"{call.name}({call.arguments})" for call in message.calls]
    return "\n".join(text for text in (message.thought, message.text, *calls) if text)


def _asked(parts: Sequence[object]) -> str:
    return "".join("\0" if part is PICTURE else str(part) for part in parts)


def _within(answer: str, prompt: str) -> bool:
    """Whether the prompt says the answer, as words of its own."""
    bare = answer.strip().rstrip(".").lower()
    return len(bare) > 2 and re.search(rf"(?<![^\W_]){re.escape(bare)}(?![^\W_])", prompt.lower()) is not None


def _digest(*values: object) -> bytes:
    return hashlib.blake2b(repr(values).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _counted(encoder: Encoder, waiting: Sequence[tuple[Row, Sample]], limit: int | None) -> list[Row]:
    batch = encoder.batch([sample for _, sample in waiting])
    found = []
    for i, (row, _) in enumerate(waiting):
        mask = batch.inputs["attention_mask"][i].bool()
        ids, learnt = batch.inputs["input_ids"][i][mask], batch.labels[i][mask] != IGNORED
        found.append(
            replace(
                row,
                tokens=len(ids),
                labelled=int(learnt.sum()),
                image=int((ids == encoder.processor.image_token_id).sum()),
                kept=int(learnt[:limit].sum()),
            )
        )
    return found


def _stage(encoder: Encoder, sample: Sample) -> Stage:
    """Where a row that can not be encoded fails."""
    if encoder.control(sample) is not None:
        return "control"
    try:
        rendered = encoder.template.render(sample)
    except Exception:  # noqa: BLE001 (the error itself is known already; this only says where it came from)
        return "template"
    return "encode" if any(rendered.text[a:b].strip() for a, b in rendered.spans) else "label"
