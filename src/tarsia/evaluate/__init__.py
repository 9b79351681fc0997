"""How well a model answers: metrics, free and constrained answers, intervals, before and after."""

from tarsia.evaluate.bootstrap import Interval, interval, paired
from tarsia.evaluate.chat import Chat
from tarsia.evaluate.choose import Chances, chances
from tarsia.evaluate.effect import effects
from tarsia.evaluate.evaluate import active, evaluate
from tarsia.evaluate.generate import generate
from tarsia.evaluate.metrics import METRICS, find, metric
from tarsia.evaluate.report import Change, Comparison, Report, Result, Row, compare

__all__ = [
    "METRICS",
    "Chances",
    "Change",
    "Chat",
    "Comparison",
    "Interval",
    "Report",
    "Result",
    "Row",
    "active",
    "chances",
    "compare",
    "effects",
    "evaluate",
    "find",
    "generate",
    "interval",
    "metric",
    "paired",
]
