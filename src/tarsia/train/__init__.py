"""From a recipe to an adapter: a run is a value, the loop is a generator of events."""

from tarsia.train.events import Evaluated, Event, Finished, Memory, Notice, Saved, Started, Step, as_json, read_log
from tarsia.train.loop import Evaluator, fit
from tarsia.train.recipe import RATES, DataRecipe, PartRecipe, Recipe, TrainSource

__all__ = [
    "RATES",
    "DataRecipe",
    "Evaluated",
    "Evaluator",
    "Event",
    "Finished",
    "Memory",
    "Notice",
    "PartRecipe",
    "Recipe",
    "Saved",
    "Started",
    "Step",
    "TrainSource",
    "as_json",
    "fit",
    "read_log",
]
