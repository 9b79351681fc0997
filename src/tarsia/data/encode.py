"""Rows as a model's inputs, with labels on the assistant's tokens only."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from tarsia.core.errors import ConfigError, DataError
from tarsia.data.chat import Rendered, Span, Template
from tarsia.data.samples import Sample

IGNORED: Final = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that a model can be called with.

    ``inputs`` is what the processor made, pictures in its own layout; ``labels`` is int64 [rows,
    length] like ``inputs["input_ids"]``, IGNORED off the assistant's tokens. The rest is one entry a row,
    but for ``owners``, int64 like the labels: the row that each position belongs to, -1 for none, where rows
    lie end to end (``tarsia.data.pack``); None where line i is row i.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    n_pictures: tuple[int, ...]
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    owners: Tensor | None = None

    def owners_of(self, chosen: Tensor) -> list[int]:
        """The row of each position that ``chosen``, bool like the labels, names; line by line."""
        if self.owners is None:
            return [line for line, _ in chosen.nonzero().tolist()]
        return self.owners[chosen.to(self.owners.device)].tolist()


class _Listener:
    """Stands in for a processor's tokenizer for one call: ``hear`` gets the texts before it does."""

    def __init__(self, tokenizer: Any, hear: Callable[[list[str]], None]) -> None:
        self._tokenizer, self._hear = tokenizer, hear

    def __call__(self, text: list[str], **kwargs: object) -> Any:
        self._hear(list(text))
        return self._tokenizer(text, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@dataclass(frozen=True, slots=True)
class _Expanded:
    """A row's text as the tokenizer got it; ``before`` and ``after`` are its markers' and their expansions' spans."""

    text: str
    shift: int
    before: tuple[Span, ...]
    after: tuple[Span, ...]
    encoding: Encoding

    def place(self, at: int) -> int:
        """Where character ``at`` of the rendered text stands, for one that is in no marker."""
        at += self.shift
        gained = [new[1] - old[1] for old, new in zip(self.before, self.after, strict=True) if old[1] <= at]
        return at + (gained[-1] if gained else 0)


class Encoder:
    """Makes batches of samples with a processor.

    The processor is called once a batch and lays out pictures as its family does. Which tokens the
    assistant said follows from the template (see ``Template.render``), carried over to the very text
    that the tokenizer is given, and from there by the tokenizer's own offsets.

    ``max_length`` (tokens a row) cuts text at a row's end, never a picture. ``variables`` are the
    template's. Pictures of more than ``resolution`` pixels along the longer side are shrunk to that before
    the processor gets them. Raises DataError for a processor with which labels can not be exact: no chat
    template, a tokenizer without offsets or without a padding token.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        *,
        padding_side: Literal["left", "right"] = "right",
        variables: Mapping[str, object] | None = None,
        resolution: int | None = None,
    ) -> None:
        for name, limit in (("max_length", max_length), ("resolution", resolution)):
            if limit is not None and limit < 1:
                raise ConfigError(f"`{name}` must be at least 1.", given=limit)
        tokenizer: Any = getattr(processor, "tokenizer", None)
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "The processor's tokenizer gives no offsets, so labels can not be told exactly.",
                given=type(tokenizer).__name__,
                do="use the fast tokenizer of this model",
            )
        if tokenizer.pad_token_id is None:
            raise DataError("The tokenizer has no padding token.", do="set tokenizer.pad_token")
        self.processor, self.max_length, self.padding_side = processor, max_length, padding_side
        self.resolution = resolution
        self.template = Template(processor, variables)
        self._offsets = _measuring(tokenizer.backend_tokenizer)
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(i for i, token in added.items() if token.special)
        controls = {self.template.marker, *(added[i].content for i in self._special)}
        self._controls = re.compile("|".join(re.escape(c) for c in sorted(controls, key=len, reverse=True)))

    @property
    def closes(self) -> bool:
        """Whether answers end with a control token, so that a model can learn from them when to stop."""
        return bool(self._controls.search(self.template.closing))

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Encode ``samples`` as one padded batch.

        Raises DataError, naming the row, where a picture can not be loaded, a text holds a control
        token, labels can not be exact or are none, the placeholders do not match the pictures, or
        ``max_length`` would cut a picture.
        """
        for sample in samples:
            if (control := self.control(sample)) is not None:
                raise DataError(
                    f"Row {sample.row} of {sample.source}: a text holds a control token of this model.",
                    given=control,
                    do="take it out or spell it otherwise; a picture's place is a part, not a token",
                )
        rendered = [self.template.render(sample) for sample in samples]
        inputs, heard = self._process(samples, rendered)
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        labels = torch.full_like(ids, IGNORED)
        for i, (sample, told, text) in enumerate(zip(samples, rendered, heard, strict=True)):
            got = ids[i][mask[i]]
            full = text.encoding.ids
            if got.tolist() != full[: self.max_length]:
                raise _error(sample, "the processor's tokens are not those of its text.", f"{len(got)} tokens")
            self._check_first(sample, full)
            spoken = [t for span in told.spans for t in self._said(sample, text, span)]
            said = [t for t in spoken if t < len(got)]
            if not said:
                raise self._silent(sample, len(full), min(spoken, default=None))
            marked = torch.full_like(got, IGNORED)
            marked[said] = got[said]
            labels[i][mask[i]] = marked
        return Batch(
            inputs,
            labels,
            tuple(len(sample.pictures) for sample in samples),
            tuple(sample.source for sample in samples),
            tuple(sample.row for sample in samples),
        )

    def _adds_special(self, rendered: Rendered) -> bool:
        # As transformers does: a template that writes the first token itself wants no second one.
        bos = self.processor.tokenizer.bos_token
        return not (bos and rendered.text.startswith(bos))

    def _check_first(self, sample: Sample, ids: Sequence[int]) -> None:
        bos = self.processor.tokenizer.bos_token_id
        if bos is not None and [i for i in ids if i != self.processor.image_token_id][:2] == [bos, bos]:
            raise DataError(
                f"Row {sample.row} of {sample.source} begins with two first tokens.",
                given=self.processor.tokenizer.bos_token,
                do="let the chat template write it: then neither the processor nor the tokenizer adds another",
            )

    def _silent(self, sample: Sample, tokens: int, first: int | None) -> DataError:
        """Of ``tokens`` tokens the ``first`` that is learnt (None: there is none) is cut off."""
        if first is None:
            return _error(sample, "the assistant says nothing that can be learnt.", f"{tokens} tokens")
        return DataError(
            f"Row {sample.row} of {sample.source}: nothing that the assistant says is left to be learnt.",
            given=f"{tokens} tokens, max_length {self.max_length}",
            do=f"raise max_length above {first}, shorten the question, or take the row out",
        )

    def control(self, sample: Sample) -> str | None:
        """A control token of this model that a text of the row holds: the first one met, or None."""
        texts = [part for message in sample.messages for part in message.parts if isinstance(part, str)]
        texts += [text for message in sample.messages for text in (message.thought, message.answers, message.name)]
        texts += [text for message in sample.messages for call in message.calls for text in (call.name, call.arguments)]
        return next((found[0] for found in map(self._controls.search, (*texts, *sample.tools)) if found), None)

    def _process(
        self, samples: Sequence[Sample], rendered: Sequence[Rendered]
    ) -> tuple[dict[str, Tensor], tuple[_Expanded, ...]]:
        pictures = [[picture.load(self.resolution) for picture in sample.pictures] for sample in samples]
        special = {self._adds_special(r) for r in rendered}
        if len(special) != 1:
            raise DataError("Only some rows of a batch begin with the first token.", do="mend the chat template")
        processor = copy.copy(self.processor)
        before: list[str] = []
        places: list[Sequence[Mapping[str, Any]]] = []
        heard: list[_Expanded] = []

        def expand(text: list[str], *args: object, **kwargs: object) -> object:
            before.extend(text)
            result = type(processor).get_text_with_replacements(processor, text, *args, **kwargs)
            places.extend(result[1])
            return result

        def hear(texts: list[str]) -> None:
            rows = zip(samples, rendered, texts, before or texts, places or [()] * len(texts), strict=True)
            heard.extend(self._expanded(*row) for row in rows)

        processor.get_text_with_replacements = expand
        processor.tokenizer = _Listener(self.processor.tokenizer, hear)
        try:
            inputs = processor(
                text=[r.text for r in rendered],
                images=pictures if any(pictures) else None,
                padding=True,
                padding_side=self.padding_side,
                add_special_tokens=special.pop(),
                return_tensors="pt",
                **({} if self.max_length is None else {"truncation": True, "max_length": self.max_length}),
            )
        except ValueError as error:
            where = ", ".join(f"row {s.row} of {s.source}" for s in samples[:4])
            raise DataError(f"The processor refuses {where}: {error}") from None
        return dict(inputs), tuple(heard)

    def _expanded(
        self, sample: Sample, rendered: Rendered, text: str, before: str, places: Sequence[Mapping[str, Any]]
    ) -> _Expanded:
        """Prove that ``text`` is the rendered text with something put before it and its markers expanded."""
        first = min((start for start, _ in rendered.spans), default=0)
        shift = len(before) - len(rendered.text)
        again, at = "", 0
        for place in places:
            again += before[at : place["span"][0]] + place["replacement"]
            at = place["span"][1]
        exact = shift >= 0 and before[first + shift :] == rendered.text[first:] and again + before[at:] == text
        if not exact or before.count(self.template.marker) != len(sample.pictures):
            raise _error(sample, "the processor changes the text in a way that can not be followed.", text[:120])
        marks = tuple(m.span() for m in re.finditer(re.escape(self.template.marker), before))
        old = tuple(tuple(p["span"]) for p in places) or marks
        new = tuple(tuple(p["new_span"]) for p in places) or marks
        encoding = self._offsets.encode(text, add_special_tokens=self._adds_special(rendered))
        self._check_pictures(sample, new, encoding)
        return _Expanded(text, shift, old, new, encoding)

    def _check_pictures(self, sample: Sample, places: Sequence[Span], encoding: Encoding) -> None:
        """Every image token stands in a picture's place, every picture has one, and none is cut."""
        owners = [
            next((k for k, (a, b) in enumerate(places) if a <= start < end <= b), None)
            for start, end in encoding.offsets
        ]
        inside = {k for k, i in zip(owners, encoding.ids, strict=True) if i == self.processor.image_token_id}
        if inside != set(range(len(sample.pictures))):
            raise _error(sample, "image tokens and pictures do not match.", f"{len(sample.pictures)} pictures")
        end = 1 + max((t for t, k in enumerate(owners) if k is not None), default=-1)
        if self.max_length is not None and end > self.max_length:
            raise DataError(
                f"Row {sample.row} of {sample.source}: `max_length` would cut a picture.",
                given=f"max_length {self.max_length}, the last picture ends at token {end} of {len(owners)}",
                do=f"set max_length to more than {end} so that an answer is left, set a resolution to show smaller "
                "pictures, or take the row out",
            )

    def _said(self, sample: Sample, text: _Expanded, span: Span) -> list[int]:
        """The tokens of one assistant's turn: what it says and what closes it."""
        (start, end), encoding = map(text.place, span), text.encoding
        said = []
        for t, (a, b) in enumerate(encoding.offsets):
            inside = text.text[max(a, start) : min(b, end)]
            if not inside or (inside.isspace() and not (start <= a and b <= end)):
                continue  # a shared token with nothing but white space of this turn is not the turn's
            if a < start or (b > end and text.text[end:b].strip()):
                raise DataError(
                    f"Row {sample.row} of {sample.source}: a token holds both the assistant's text and the template's.",
                    given=repr(text.text[a:b]),
                    do="let the template's generation prompt end without white space, or strip the answer",
                )
            said.append(t)
        closing = max((k for k, t in enumerate(said) if encoding.ids[t] in self._special), default=None)
        # What only parts this turn from the next (the newline after ChatML's end token) is nobody's.
        rest = [] if closing is None else said[closing + 1 :]
        if any(text.text[slice(*encoding.offsets[t])].strip() for t in rest):
            return said
        return said[: len(said) - len(rest)]


def _measuring(tokenizer: Tokenizer) -> Tokenizer:
    """A copy whose offsets cover all text: post-processors may trim white space off them."""

    def untrimmed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: False if k == "trim_offsets" else untrimmed(v) for k, v in value.items()}
        return value

    state = json.loads(tokenizer.to_str())
    processor = state["post_processor"]
    if processor and processor["type"] == "Sequence":
        processor = {**processor, "processors": [untrimmed(p) for p in processor["processors"]]}
    state |= {"post_processor": untrimmed(processor), "padding": None, "truncation": None}
    return Tokenizer.from_str(json.dumps(state))


def _error(sample: Sample, what: str, given: object) -> DataError:
    return DataError(f"Row {sample.row} of {sample.source}: {what}", given=given)
