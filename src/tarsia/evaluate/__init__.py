"""How well a model answers: metrics, free and constrained answers, intervals, before and after."""

from tarsia.evaluate.bootstrap import Interval, interval, paired
from tarsia.evaluate.chat import Chat
from tarsia.evaluate.choose import Chances, chances
from tarsia.evaluate.effect import effects
from tarsia.evaluate.evaluate import Asking, active, evaluate
from tarsia.evaluate.forgetting import Baseline, ForgettingReport, baseline, forgetting
from tarsia.evaluate.gate import Verdict, gate
from tarsia.evaluate.generate import generate
from tarsia.evaluate.metrics import METRICS, find, metric
from tarsia.evaluate.report import Change, Comparison, Report, Result, Row, compare
from tarsia.evaluate.transfer import Transfer, transfer

__all__ = [
    "METRICS",
    "Asking",
    "Baseline",
    "Chances",
    "Change",
    "Chat",
    "Comparison",
    "ForgettingReport",
    "Interval",
    "Report",
    "Result",
    "Row",
    "Transfer",
    "Verdict",
    "active",
    "baseline",
    "chances",
    "compare",
    "effects",
    "evaluate",
    "find",
    "forgetting",
    "gate",
    "generate",
    "interval",
    "metric",
    "paired",
    "transfer",
]
