"""A version of the library where the command line takes an adapter's folder: library:REFERENCE."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tarsia.core.errors import AdapterError, LibraryError

PREFIX: Final = "library:"
FORMS: Final = "or library:REFERENCE, a version of the library (library:signs@stable)"
"""What the help of every such argument says."""


def folder(given: Path | str) -> Path:
    """The folder that was given; of a reference the library's own, every byte of which was hashed for this.

    Raises LibraryError where there is no such version, or its files are not what was published; AdapterError where
    there is no such folder, and a reference without its prefix seems to be meant.
    """
    text = str(given)
    if not text.startswith(PREFIX):
        if not Path(given).exists() and _meant(text):
            do = f"write {PREFIX}{text}, if a version of the library is meant"
            raise AdapterError("There is no such adapter.", given=text, do=do)
        return Path(given)
    from tarsia.library import Library, default_root

    return Library.open(default_root()).whole(text.removeprefix(PREFIX))[1]


def _meant(text: str) -> bool:
    """Whether what is no folder looks like a version's reference, or is the name of one that is there."""
    from tarsia.library import Library, Reference, default_root

    try:
        asked = Reference.parse(text)
        if str(asked) == asked.name:
            Library.open(default_root()).version(asked)
    except LibraryError:  # the folder that was given is what is told of then
        return False
    return True


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
