"""A version of the library where the command line takes an adapter's folder: library:REFERENCE."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PREFIX: Final = "library:"
FORMS: Final = "or library:REFERENCE, a version of the library (library:signs@stable)"
"""What the help of every such argument says."""


def folder(given: Path | str) -> Path:
    """The folder that was given; of a reference the library's own, every byte of which was hashed for this.

    Raises LibraryError where there is no such version, or its files are not what was published.
    """
    text = str(given)
    if not text.startswith(PREFIX):
        return Path(given)
    from tarsia.library import Library, default_root

    return Library.open(default_root()).whole(text.removeprefix(PREFIX))[1]


def names(given: str) -> list[str] | None:
    """What a reference's adapter may be called, the shortest first: its name, then with what it was chosen by.

    None where this is no reference. Raises LibraryError where it is a broken one.
    """
    if not given.startswith(PREFIX):
        return None
    from tarsia.library import Reference

    reference = given.removeprefix(PREFIX)
    name = Reference.parse(reference).name
    return [name, *([reference] if reference != name else []), f"library-{reference}"]
