"""Adapters as folders: written whole or not at all, read wholly or refused."""

from __future__ import annotations

from pathlib import Path

from tarsia.adapter.host import Host
from tarsia.adapter.value import Adapter


def save(adapter: Adapter, folder: Path | str) -> None:
    """Write the adapter, atomically. An existing folder is replaced only where it is an adapter."""
    raise NotImplementedError


def load(folder: Path | str, host: Host | None = None) -> Adapter:
    """Read an adapter. A folder without ``tarsia.json`` (made by PEFT) is understood only against ``host``."""
    raise NotImplementedError
