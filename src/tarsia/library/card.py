"""The card of a version: recipe, data, results, forgetting and base, as its tarsia.json holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tarsia.core.errors import LibraryError
from tarsia.library import content, index, record
from tarsia.library.places import Reference
from tarsia.library.record import Version
from tarsia.library.store import Library, find

_RESULTS: Final = ("loss", "steps", "seconds")
_TOLD: Final = ("recipe", "data", "gate", *_RESULTS)


@dataclass(frozen=True, slots=True)
class Card:
    """What tarsia.json says of an adapter, sorted by what one asks.

    ``recipe``: all that it was trained by. ``data``: each source with the SHA-256 of its rows. ``results``: losses,
    steps, seconds. ``forgetting``: its gate, with points lost on what was known before; empty where it was not
    judged. ``base``: name and fingerprint. ``parts``: method, selection and options of each. ``sites``: method by
    path. ``rest``: the card's other entries.
    """

    parts: tuple[Mapping[str, Any], ...]
    sites: Mapping[str, str]
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    results: Mapping[str, Any]
    forgetting: Mapping[str, Any]
    base: Mapping[str, Any]
    rest: Mapping[str, Any]

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Card:
        """From what tarsia.json holds, which ``content.look`` has found whole."""
        card = described["card"]
        return cls(
            parts=tuple(described["parts"]),
            sites={path: patch["method"] for path, patch in described["patches"].items()},
            recipe=_object(card.get("recipe")),
            data=_object(card.get("data")),
            results={key: card[key] for key in _RESULTS if key in card},
            forgetting=_object(card.get("gate")),
            base={"name": described["base"], **(described["fingerprint"] or {})},
            rest={key: value for key, value in card.items() if key not in _TOLD},
        )


def _object(value: object) -> Mapping[str, Any]:
    """A mapping as it is; nothing as an empty one; what else foreign hands have put there under a name."""
    if isinstance(value, dict):
        return value
    return {} if value is None else {"value": value}


def read(library: Library, reference: Reference | str) -> tuple[Version, Card]:
    """A version and its card. Raises LibraryError where tarsia.json is not the file that was published."""
    asked = Reference.parse(reference) if isinstance(reference, str) else reference
    with index.reading(library.places) as db:
        version = find(db, asked)
        files = record.files_of(db, version.hash)
    path = library.folder(version) / content.OURSELVES
    try:
        sound = content.hashed(path) == files[content.OURSELVES]
    except OSError:
        sound = False
    if not sound:
        raise LibraryError(
            f"The card of {version.reference} is not the one that was published.",
            given=str(path),
            do="tarsia library verify says what else is damaged; add the same adapter again to put it right",
        )
    return version, Card.of(content.read_json(path))


def flat(values: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Nested objects and lists as one level: {"parts.0.rank": 8}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{under}.{key}" if under else str(key)
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, dict) and inner:
            found |= flat({str(k): v for k, v in inner.items()}, name)
        else:
            found[name] = value
    return found
