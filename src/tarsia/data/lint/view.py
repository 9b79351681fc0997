"""A row as the loss sees it: runs of tokens that are learnt, read, control tokens or pictures."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import Any

from tarsia.data.encode import IGNORED, Batch


class What(StrEnum):
    """What a run of tokens is."""

    TEXT = "text"
    CONTROL = "control"
    PICTURE = "picture"


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens in a row that are alike. ``cut``: `max_length` takes them away."""

    what: What
    learnt: bool
    text: str
    tokens: int
    cut: bool = False


def runs(batch: Batch, processor: Any, max_length: int | None = None) -> tuple[Run, ...]:
    """The first row of ``batch`` as runs; image tokens collapse to "[picture 1: 64 tokens]".

    Pictures have numbers where runs of image tokens and pictures are equally many: side by side they may be
    one run, and some families lay one picture out in several.
    """
    mask = batch.inputs["attention_mask"][0].bool()
    ids, labels = batch.inputs["input_ids"][0][mask].tolist(), batch.labels[0][mask].tolist()
    kinds = [
        (what(i, processor), label != IGNORED, max_length is not None and t >= max_length)
        for t, (i, label) in enumerate(zip(ids, labels, strict=True))
    ]
    grouped = [(kind, [t for t, _ in members]) for kind, members in groupby(enumerate(kinds), key=lambda pair: pair[1])]
    laid, count = sum(kind is What.PICTURE for (kind, _, _), _ in grouped), batch.n_pictures[0]
    shown: list[Run] = []
    pictures = 0
    for (kind, learnt, cut), places in grouped:
        if kind is What.PICTURE:
            pictures += 1
            name = f"picture {pictures}" if laid == count else f"{count} pictures" if laid == 1 else "picture"
            text = f"[{name}: {len(places)} tokens]"
        else:
            text = _text(processor.tokenizer, ids, places[0], places[-1] + 1)
        shown.append(Run(kind, learnt, text, len(places), cut))
    return tuple(shown)


def ends(shown: Sequence[Run], most: int) -> tuple[tuple[Run, ...], int, tuple[Run, ...]]:
    """The beginning and the end of a row, ``most`` tokens together, and how many tokens between them are left out.

    A picture counts as one token. A run that is cut keeps its share of characters, so to a token or so.
    """
    if sum(map(_cost, shown)) <= most:
        return tuple(shown), 0, ()
    head, tail = _first(shown, most // 2, back=False), _first(reversed(shown), most // 2, back=True)
    left = sum(run.tokens for run in shown) - sum(run.tokens for run in (*head, *tail))
    return head, left, tail[::-1]


def _cost(run: Run) -> int:
    return 1 if run.what is What.PICTURE else run.tokens


def _first(shown: Iterable[Run], most: int, *, back: bool) -> tuple[Run, ...]:
    taken: list[Run] = []
    for run in shown:
        if most < 1:
            break
        if _cost(run) > most:
            size = max(1, len(run.text) * most // run.tokens)
            run = replace(run, text=run.text[-size:] if back else run.text[:size], tokens=most)
        taken.append(run)
        most -= _cost(run)
    return tuple(taken)


def what(token: int, processor: Any) -> What:
    """What one token is to this processor."""
    if token == processor.image_token_id:
        return What.PICTURE
    added = processor.tokenizer.added_tokens_decoder.get(token)
    return What.CONTROL if added is not None and added.special else What.TEXT


def _text(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """The characters of ids[start:end]; some decoders drop a space that begins a text, so decode what is before too."""

    def decode(some: Sequence[int]) -> str:
        text: str = tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    before, whole = decode(ids[max(0, start - 16) : start]), decode(ids[max(0, start - 16) : end])
    return whole[len(before) :] if whole.startswith(before) else decode(ids[start:end])


def visible(text: str) -> str:
    """``text`` with control and direction characters made visible: none of them may act on a terminal or a page."""
    shown = (_sign(c) if _acts(c) else c for c in text)
    return "".join(shown).encode("utf-8", "backslashreplace").decode()


def _acts(c: str) -> bool:
    return c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")


def _sign(c: str) -> str:
    return chr(0x2400 + ord(c)) if ord(c) < 0x20 else f"\\u{ord(c):04x}"
