"""Folders that do not come with the package: where a chapter finds them, and what to do without."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tarsia.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """A folder by the name of the environment's ``variable``. It, or one of ``below`` it, holds a file ``holds``."""

    variable: str
    what: str
    do: str
    holds: str
    below: tuple[str, ...] = (".",)


PLACES: Mapping[str, Place] = {
    "smol": Place(
        "TARSIA_SMOL",
        "SmolLM2-135M-Instruct inside a LLaVA",
        "python -m bench.smol small, then name its folder",
        "config.json",
        (".", "small"),
    ),
    "data": Place(
        "TARSIA_DATA",
        "photographs (CIFAR-10) and blood cells (BCCD) as Parquet files",
        "docs/blood-cells.md says where they come from",
        "cifar10-train.parquet",
    ),
}


def find(given: Mapping[str, Path]) -> dict[str, Path]:
    """Every place that is there: as ``given``, else by its variable. Raises ConfigError for a folder that is not it."""
    unknown = sorted(set(given) - set(PLACES))
    if unknown:
        raise ConfigError("No chapter uses a folder of this name.", given=unknown[0], allowed=", ".join(PLACES))
    named = {name: Path(os.environ[p.variable]) for name, p in PLACES.items() if os.environ.get(p.variable)}
    return {name: _inside(PLACES[name], folder) for name, folder in (named | dict(given)).items()}


def _inside(place: Place, folder: Path) -> Path:
    for below in place.below:
        if (folder / below / place.holds).is_file():
            return folder / below
    raise ConfigError(f"This folder does not hold {place.what}.", given=f"{folder}: no {place.holds}", do=place.do)


def require(chapter: str, needs: Collection[str], have: Collection[str]) -> None:
    """Raise ConfigError where one of ``needs`` is not there."""
    for name in needs:
        if name not in have:
            place = PLACES[name]
            raise ConfigError(
                f"The chapter {chapter} needs {place.what}.",
                given=f"neither --with {name}=FOLDER nor {place.variable}",
                do=place.do,
            )
