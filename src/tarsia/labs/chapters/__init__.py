"""The lab's chapters, one file each, with a CHAPTER in it. A file that is put here is found."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from tarsia.labs.frame.chapter import Chapter


def _find() -> dict[str, Chapter]:
    found: list[Chapter] = []
    for module in iter_modules(__path__):
        chapter: Chapter = import_module(f"{__name__}.{module.name}").CHAPTER
        if chapter.name.replace("-", "_") != module.name:
            raise ValueError(f"The chapter {chapter.name} lies in {module.name}.py.")
        found.append(chapter)
    return {chapter.name: chapter for chapter in sorted(found, key=lambda c: (c.order, c.name))}


CHAPTERS: Mapping[str, Chapter] = MappingProxyType(_find())
"""By name, in the order of reading."""
