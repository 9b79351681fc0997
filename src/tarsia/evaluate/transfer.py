"""Several tasks learnt one after the other: what learning the later ones did to the earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, model_validator

from tarsia.core.errors import ConfigError
from tarsia.evaluate.report import FROZEN, Report


class Transfer(BaseModel):
    """``matrix[i][j]`` is the accuracy, 0..1, on task j after stage i, which learnt task i; T tasks and T stages, in
    the order in which they were learnt. ``base`` is the accuracy on each before the first stage, where it is known.

    D. Lopez-Paz and M. Ranzato, Gradient Episodic Memory for Continual Learning (2017), equations 2 to 4;
    A. Chaudhry et al., Riemannian Walk for Incremental Learning (2018), section 3.
    """

    model_config = FROZEN

    tasks: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    base: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _square(self) -> Self:
        tasks, rows = len(self.tasks), [*self.matrix, *([] if self.base is None else [self.base])]
        if not tasks or len(self.matrix) != tasks or any(len(row) != tasks for row in rows):
            raise ConfigError(
                "Backward transfer needs one stage for each task, and every task measured after every stage.",
                given=f"{tasks} tasks, stages of {', '.join(str(len(row)) for row in self.matrix) or 'none'}",
            )
        return self

    @property
    def accuracy(self) -> float:
        """ACC = mean over j of R[T][j], 0..1."""
        return sum(self.matrix[-1]) / len(self.tasks)

    @property
    def backward(self) -> float | None:
        """BWT = mean over j < T of R[T][j] - R[j][j], -1..1; None for a single task. Below 0 is forgetting."""
        last = self.matrix[-1]
        return _mean([last[j] - self.matrix[j][j] for j in range(len(self.tasks) - 1)])

    @property
    def forgetting(self) -> float | None:
        """F = mean over j < T of max over i < T of R[i][j], less R[T][j], -1..1; None for a single task."""
        last, earlier = self.matrix[-1], self.matrix[:-1]
        return _mean([max(row[j] for row in earlier) - last[j] for j in range(len(self.tasks) - 1)])

    @property
    def forward(self) -> float | None:
        """FWT = mean over j > 1 of R[j-1][j] less the base's accuracy on j, -1..1; None where that is unknown."""
        if self.base is None:
            return None
        return _mean([self.matrix[j - 1][j] - self.base[j] for j in range(1, len(self.tasks))])


def transfer(stages: Sequence[Report], tasks: Sequence[str], base: Report | None = None) -> Transfer:
    """From a report of every stage, in order; ``tasks`` names the source of each stage's task. Free answers.

    Raises ConfigError where a report lacks a task, or reports are not of the same base, metric and rows.
    """
    every = [*stages, *([] if base is None else [base])]
    for name in tasks:
        held = [next((r for r in report.results if r.source == name), None) for report in every]
        if missing := [str(i + 1) for i, result in enumerate(held) if result is None]:
            raise ConfigError("A stage was not measured on a task.", given=f"{name}: stage {', '.join(missing)}")
        rows = {tuple((row.row, row.reference) for row in result.rows) for result in held if result is not None}
        if len(rows) > 1:
            raise ConfigError("Stages that were measured on different rows can not be compared.", given=name)
    for what, values in (
        ("bases", {report.digest for report in every}),
        ("precisions", {report.precision for report in every}),
        ("metrics", {report.metric for report in every}),
        ("lengths of answers", {str(report.max_new_tokens) for report in every}),
    ):
        if len(values) > 1:
            raise ConfigError(f"Stages of different {what} can not be compared.", given=" and ".join(sorted(values)))
    matrix = [_accuracies(report, tasks) for report in stages]
    return Transfer(tasks=tuple(tasks), matrix=tuple(matrix), base=None if base is None else _accuracies(base, tasks))


def _accuracies(report: Report, tasks: Sequence[str]) -> tuple[float, ...]:
    means = {result.source: result.free.mean for result in report.results}
    return tuple(means[name] for name in tasks)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
