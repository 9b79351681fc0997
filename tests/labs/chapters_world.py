"""A chapter small enough to fail in every way."""

from __future__ import annotations

from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found

ROWS = {"sum: one and one": {"is": 2.0, "said": "two"}, "sum: two and two": {"is": 4}}

TEXT = """
{{ table("sum") }}
So {{ value("sum: one and one", "is", ".2f") }}, {{ value("sum: one and one", "said") }}
{%- if "data" in lacking %} without data{% endif %}.
"""


def toy(rows=ROWS, **changed):
    """A chapter that claims that one and one is two, and that four is at least three where there is data."""

    def measure(desk: Desk) -> Found:
        desk.show(0.5, "counting")
        return Found(rows, {"x": [0.0, 1.0, 1 / 3]}, {"mini-1": "files:abcdef0123456789"})

    def draw(found, figure):
        figure.subplots().plot(found.series["x"])

    fields = {
        "name": "toy",
        "title": "A toy",
        "question": "What is one and one?",
        "claim": "One and one is 2.",
        "bounds": (
            Bound("one and one", "sum: one and one", "is", 2, 2),
            Bound("two and two", "sum: two and two", "is", 3, uses="data"),
        ),
        "measure": measure,
        "draw": draw,
        "picture": "a line",
        "text": TEXT,
        "order": 1,
        "minutes": 0.1,
        "uses": ("data",),
    }
    return Chapter(**{**fields, **changed})
