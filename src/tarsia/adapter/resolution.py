"""How large an adapter was trained to see pictures: most pixels along the longer side, None where as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tarsia.adapter.files import OURSELVES
from tarsia.adapter.reading import AGAIN, read_json
from tarsia.adapter.value import Adapter
from tarsia.core.errors import AdapterError, ConfigError


def resolution_of(source: Adapter | Path | str) -> tuple[int | None, ...]:
    """The resolution of the recipe that an adapter, or that in a folder, was trained by; empty where it has none.

    Raises AdapterError where tarsia.json is not one.
    """
    card: object
    if isinstance(source, Adapter):
        place, card = f"an adapter of {source.base}", source.card
    else:
        path = Path(source) / OURSELVES
        place, card = str(path), read_json(path).get("card") if path.is_file() else None
    recipe = card.get("recipe") if isinstance(card, Mapping) else None
    if not isinstance(recipe, Mapping):
        return ()
    found = recipe.get("resolution")
    if found is not None and not (type(found) is int and found > 0):
        given = f"{place}: card.recipe.resolution {found!r}"
        raise AdapterError("tarsia.json is incomplete, or was edited.", given=given, do=AGAIN)
    return (found,)


def one_resolution(sources: Mapping[str, Adapter | Path | str], do: str) -> tuple[int | None, ...]:
    """The resolution of all adapters, by name, that have one; empty where none has.

    Raises ConfigError, advising ``do``, where they were trained at different ones.
    """
    trained = {name: found for name, source in sources.items() for found in resolution_of(source)}
    if len(set(trained.values())) > 1:
        raise ConfigError(
            "The adapters were trained on pictures of different sizes.",
            given="; ".join(f"{name}: resolution {found or 'none'}" for name, found in trained.items()),
            do=do,
        )
    return tuple(set(trained.values()))
