"""Rows of one question and one answer."""

from __future__ import annotations

from tarsia.data.formats.parts import read_pictures, read_text, split_markers
from tarsia.data.formats.registry import Place, Row, row_format
from tarsia.data.samples import PICTURE, Message, Sample


@row_format("question and answer", required=("question", "answer"), optional=("image", "images"))
def read_pair(row: Row, place: Place) -> Sample:
    """``question`` and ``answer``; pictures where <image> stands in the question, or before it."""
    pictures = read_pictures(row, place)
    question, answer = (read_text(row[key], f"`{key}`", place) for key in ("question", "answer"))
    parts = split_markers(question)
    if PICTURE not in parts:
        parts = (*(PICTURE for _ in pictures), *parts)
    messages = (Message("user", parts), Message("assistant", (answer,)))
    return Sample(messages, pictures, place.source, place.row)
