"""Adapters kept as carefully as code: immutable versions, integrity, provenance."""

from tarsia.library.places import Reference, default_root
from tarsia.library.record import Version
from tarsia.library.store import Library, Published

__all__ = ["Library", "Published", "Reference", "Version", "default_root"]
