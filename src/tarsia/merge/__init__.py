"""Several adapters made one, and one made part of its base: arithmetic on values, each step proved."""

from tarsia.merge.adapters import Merged, digest, merge
from tarsia.merge.delta import Delta, deltas
from tarsia.merge.ways import WAYS, Way

__all__ = ["WAYS", "Delta", "Merged", "Way", "deltas", "digest", "merge"]
