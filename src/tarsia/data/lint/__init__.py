"""What training would read, looked at before it is trained on: `tarsia lint`.

    findings = lint([Given("cells", read(source))], encoder)
    findings.errors     # what would spoil the training
    findings.numbers    # each source in numbers
    findings.views()    # rows as the loss sees them

No weights are needed. A rule is one function, registered with its code (see ``rule``).
"""

from tarsia.data.lint.finding import Finding, Severity, Where
from tarsia.data.lint.report import Findings, Numbers, View, lint
from tarsia.data.lint.rule import RULES, Hit, rule
from tarsia.data.lint.survey import Aim, Given, Survey

__all__ = [
    "RULES",
    "Aim",
    "Finding",
    "Findings",
    "Given",
    "Hit",
    "Numbers",
    "Severity",
    "Survey",
    "View",
    "Where",
    "lint",
    "rule",
]
