"""The embedded base models."""

from __future__ import annotations

from pathlib import Path

from tarsia.core.errors import ConfigError

NAMES = ("mini-1",)
"""The models that the package carries, newest last."""


def resolve(name: str) -> str:
    """The folder of an embedded model; any other name as it is.

    Raises ConfigError for an embedded model that this installation lacks.
    """
    if name not in NAMES or Path(name).is_dir():
        return name
    folder = Path(__file__).parent / name
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"The embedded model {name!r} is not in this installation.",
            given=str(folder),
            do="install the package with its data files, or give a folder or a hub id",
        )
    return str(folder)
