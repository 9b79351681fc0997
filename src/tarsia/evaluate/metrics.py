"""How right an answer is: pure functions (answer, reference) -> 0..1, in one registry.

A metric may take one number after a colon, which its entry explains: ``numeric:0.5``.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from tarsia.core.errors import ConfigError, DataError

Metric = Callable[[str, str], float]

METRICS: dict[str, Callable[..., float]] = {}
"""Every registered metric by name, as a function of (answer, reference[, number])."""

_ARTICLES = ("a ", "an ", "the ")
# fmt: off
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)"  # 7  -0.5  1,200.75  3e-4
    rf"|(?<![\w-])(?:{'|'.join(_WORDS)})(?![\w-])",
    re.IGNORECASE,
)


def metric(name: str) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Register a function as the metric ``name``."""

    def register(function: Callable[..., float]) -> Callable[..., float]:
        if name in METRICS:
            raise ValueError(f"two metrics are called {name!r}")
        METRICS[name] = function
        return function

    return register


def find(spec: str) -> Metric:
    """The metric that ``spec`` ("exact", "numeric:0.5") names. Raises ConfigError for an unknown one."""
    name, colon, number = spec.partition(":")
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, 1, 0.3)
        raise ConfigError(
            f"There is no metric {name!r}.",
            given=spec,
            allowed=", ".join(sorted(METRICS)),
            do=f"did you mean {near[0]}?" if near else "choose one of these",
        )
    if not colon:
        return METRICS[name]
    if name != "numeric":
        raise ConfigError(f"The metric {name!r} takes no number.", given=spec, do=f"write {name}")
    try:
        tolerance = float(number)
    except ValueError:
        tolerance = math.nan
    if not 0 <= tolerance < math.inf:
        raise ConfigError("That is no tolerance.", given=spec, allowed="a number of at least 0, as in numeric:0.5")
    return partial(METRICS[name], tolerance=tolerance)


def normal(text: str) -> str:
    """What the metrics compare: case folded; white space trimmed, and runs of it as one blank; full stops
    at the end and articles (a, an, the) at the beginning removed, unless nothing else would be left.
    """
    text = " ".join(text.casefold().split())
    while True:
        shorter = text.rstrip(".").rstrip() if text.endswith(".") else text
        for article in _ARTICLES:
            shorter = shorter.removeprefix(article).lstrip()
        if not shorter or shorter == text:
            return text
        text = shorter


def number(text: str) -> float | None:
    """The first number in ``text``, in digits (1,200.5) or as a word from zero to twenty; None without one."""
    match = _NUMBER.search(text)
    if match is None:
        return None
    found = match[0].lower()
    return float(_WORDS.index(found)) if found in _WORDS else float(found.replace(",", ""))


@metric("exact")
def exact(answer: str, reference: str) -> float:
    """1 where both are equal once ``normal``, else 0."""
    return float(normal(answer) == normal(reference))


@metric("contains")
def contains(answer: str, reference: str) -> float:
    """1 where the reference's words occur in the answer, whole and in this order without a gap, once ``normal``."""
    wanted = normal(reference)
    if not wanted:
        return float(not normal(answer))
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", " ".join(answer.casefold().split())) is not None)


@metric("numeric")
def numeric(answer: str, reference: str, tolerance: float = 0.0) -> float:
    """1 where the first numbers of both differ by at most ``tolerance``, else 0; 0 without a number.

    Raises DataError where the reference has no number.
    """
    wanted = number(reference)
    if wanted is None:
        raise DataError("The metric numeric needs a number in the reference.", given=repr(reference), do="use exact")
    given = number(answer)
    # A rounding error of the decimal spelling is no difference: 0.3 against 0.1 + 0.2.
    return float(given is not None and abs(given - wanted) <= tolerance + 1e-9 * max(1.0, abs(wanted)))


@metric("fields")
def fields(answer: str, reference: str) -> float:
    """Share of the reference's fields that the answer has with the same value, 0..1.

    Both are read as the first JSON object in the text (nested ones by dotted key), or as "key: value" pairs
    that lines, semicolons or commas part. Values are equal as numbers where both are numbers, otherwise once
    ``normal``. Fields that only the answer has are not counted. Raises DataError where the reference has none.
    """
    wanted = parse(reference)
    if not wanted:
        raise DataError(
            "The metric fields needs fields in the reference.",
            given=repr(reference),
            allowed='a JSON object, or "key: value" pairs',
            do="use exact",
        )
    given = parse(answer)
    return sum(key in given and _same(given[key], value) for key, value in wanted.items()) / len(wanted)


def parse(text: str) -> dict[str, str]:
    """Fields of a text, by normal key; see ``fields`` for the forms. A key that comes twice keeps its last value."""
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue  # a brace that opens no JSON; the next one may
        return dict(_flat(found))
    pairs: dict[str, str] = {}
    key = None
    for piece in re.split(r"[\n;]|,(?!\d)", text):
        name, colon, value = piece.partition(":")
        if colon and name.strip():
            key = normal(name)
            pairs[key] = value.strip()
        elif key is not None and piece.strip():
            pairs[key] += f", {piece.strip()}"  # a comma inside a value
    return pairs


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{normal(key)}.")
        else:
            yield f"{prefix}{normal(key)}", inner if isinstance(inner, str) else json.dumps(inner)


def _same(a: str, b: str) -> bool:
    if normal(a) == normal(b):
        return True
    whole = [_NUMBER.fullmatch(value.strip()) for value in (a, b)]
    return all(whole) and numeric(a, b) == 1.0
