"""Several matrices made one: pure functions of parts [n, ...] and weights [n].

What each does is the paper's; where a paper's own code leaves something to chance (singular vectors of a singular
value 0, an order among equals) the docstring says what is taken in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tarsia.core.errors import MergeError
from tarsia.merge.align import NOTHING, svd

Elect = Literal["total", "frequency"]
Weigh = Literal["after", "before"]
Normalise = Literal["count", "weights", "none"]


def total(parts: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i tau_i: task arithmetic (arXiv:2212.04089, section 3); a negative weight unlearns."""
    shape = (-1, *[1] * (parts.ndim - 1))
    return (parts * weights.to(parts.dtype).view(shape)).sum(0)


def mean(parts: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i tau_i / sum_i w_i: model soups (arXiv:2203.05482), mergekit's ``linear``."""
    return total(parts, weights / weights.sum())


def average(parts: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i tau_i / n, with a meaning for negative weights too."""
    return total(parts, weights / len(weights))


def signs(parts: Tensor, elect: Elect = "total") -> Tensor:
    """The elected sign of each number, 1 or -1, [...]: of the sum of all n, or of most (2306.01708, section 3).

    Where the vote is even it is 1, as in PEFT and mergekit.
    """
    votes = parts.sum(0) if elect == "total" else parts.sign().sum(0)
    return torch.where(votes >= 0, 1, -1)


def ties(
    parts: Tensor, weights: Tensor, *, elect: Elect = "total", weigh: Weigh = "after", normalise: Normalise = "count"
) -> Tensor:
    """Elect a sign for each number, then the mean of those numbers that have it (2306.01708, algorithm 1).

    PEFT's: ``weigh`` after the election and ``normalise`` by the count of those that agree. mergekit's: weigh before
    it and normalise by the sum of the weights of those that agree (or, where its option says so, by none).
    """
    voters = parts if weigh == "after" else parts * weights.to(parts.dtype).view(-1, *[1] * (parts.ndim - 1))
    agree = voters.sign() == signs(voters, elect)
    shape = (-1, *[1] * (parts.ndim - 1))
    weighted = parts * weights.to(parts.dtype).view(shape) if weigh == "after" else voters
    found = (weighted * agree).sum(0)
    if normalise == "none":
        return found
    if normalise == "count":
        return found / agree.sum(0).clamp(min=1)
    share = (agree * weights.to(parts.dtype).view(shape)).sum(0)
    return found / torch.where(share.abs() < 1e-8, 1.0, share)


def iso_c(parts: Tensor, weights: Tensor) -> Tensor:
    """The sum with all singular values at their mean: U mean(S) V^T (Iso-C, arXiv:2502.04959).

    Over the sum's own rank: the paper's code also fills directions of a singular value 0, which are whatever the
    decomposition happens to return, with the mean.
    """
    merged = total(parts, weights).double()
    left, values, right = svd(merged, _size(parts, weights))
    if not len(values):
        return torch.zeros_like(merged)
    return values.mean() * (left @ right)


def iso_cts(parts: Tensor, weights: Tensor, *, common: float = 0.8) -> Tensor:
    """Iso-C with directions of each task alone beside the common ones (Iso-CTS, 2502.04959).

    Of as many directions as all parts span together, the share ``common`` are the sum's largest; the others, equally
    many a task, are the largest of tau_i outside of them. All are orthogonalised together (polar factor) and
    get the mean of their singular values. With fewer directions than tasks none is left for one task alone: Iso-C.
    """
    tasks = [w * part for w, part in zip(weights.double(), parts.double(), strict=True) if bool(part.any())]
    size = _size(parts, weights)
    u, s, v = svd(total(parts, weights).double(), size)
    if not len(s):
        return torch.zeros_like(parts[0], dtype=torch.float64)
    smaller = _spanned(parts, size)
    each = min(round((smaller - int(smaller * common)) / len(tasks)), smaller // len(tasks))
    shared = min(smaller - each * len(tasks), len(s))
    u, s, v = u[:, :shared], s[:shared], v[:shared]
    apart = [svd(task - u @ (u.T @ task), size) for task in tasks]
    lefts = torch.cat([*(left[:, :each] for left, _, _ in apart), u], 1)
    values = torch.cat([*(value[:each] for _, value, _ in apart), s])
    rights = torch.cat([*(right[:each] for _, _, right in apart), v])
    return values.mean() * (polar(lefts) @ polar(rights))


def tsv(parts: Tensor, weights: Tensor) -> Tensor:
    """Task singular vectors made orthogonal together, each with its own singular value (TSV-M, arXiv:2412.00081).

    Each task keeps all its singular directions where these are no more than the tasks span together, as with low-rank
    changes; else its equal share of so many, the largest.
    """
    tasks = [w * part for w, part in zip(weights.double(), parts.double(), strict=True) if bool(part.any())]
    if not tasks:
        return torch.zeros_like(parts[0], dtype=torch.float64)
    size = _size(parts, weights)
    found = [svd(task, size) for task in tasks]
    smaller = _spanned(parts, size)
    most = max(len(values) for _, values, _ in found)
    each = most if sum(len(values) for _, values, _ in found) <= smaller else max(1, smaller // len(tasks))
    lefts = polar(torch.cat([left[:, :each] for left, _, _ in found], 1))
    rights = polar(torch.cat([right[:each] for _, _, right in found]))
    return (lefts * torch.cat([values[:each] for _, values, _ in found])) @ rights


def wudi(
    parts: Tensor, weights: Tensor, *, ridge: float = 0.1, sides: Literal["input", "output", "both"] = "input"
) -> Tensor:
    """The tau that changes least what each tau_i does to its own inputs (WUDI, arXiv:2503.08099), solved.

    WUDI minimises sum_i |(tau - w_i tau_i) tau_i^T|^2 / |tau_i|^2 by 300 steps of Adam from the sum of the tau_i: the
    rows of tau_i stand for the inputs that it was trained on. The minimum is a linear equation in G_i = tau_i^T tau_i /
    |tau_i|^2, and what early stopping does, holding what is hardly determined at the sum, a ridge does:

        tau (sum_i G_i + l I) = sum_i w_i tau_i G_i + l sum_i w_i tau_i,    l = ridge * mean eigenvalue > 0 of sum_i G_i

    A large ridge is the plain sum; 0 is the pseudo-inverse. ``sides`` output asks the same of the columns, with
    H_i = tau_i tau_i^T / |tau_i|^2 on the left; both of rows and columns: a Sylvester equation, diagonal between the
    eigenvectors of sum_i H_i and of sum_i G_i. Nothing of it depends on a basis: in a core it is the same in R x R.
    """
    parts = parts.double()
    held = [(float(w), part, part / part.norm()) for w, part in zip(weights, parts, strict=True) if bool(part.any())]
    summed = total(parts, weights.double())
    if not held:
        return summed
    left: Tensor | None = None
    right: Tensor | None = None
    found = torch.zeros_like(summed)
    if sides in ("input", "both"):
        right = torch.stack([unit.T @ unit for _, _, unit in held]).sum(0)
        found = found + torch.stack([w * part @ (unit.T @ unit) for w, part, unit in held]).sum(0)
    if sides in ("output", "both"):
        left = torch.stack([unit @ unit.T for _, _, unit in held]).sum(0)
        found = found + torch.stack([w * (unit @ unit.T) @ part for w, part, unit in held]).sum(0)
    return _sylvester(left, right, found, summed, ridge)


def regmean(
    parts: Tensor, weights: Tensor, *, inputs: Sequence[Tensor], ridge: float = 0.001, toward: float = 0.0
) -> Tensor:
    """The tau that answers each adapter's own inputs as that adapter does (RegMean, arXiv:2212.09849).

    With X_i [n_i, in] what the layer is given when adapter i runs over its probe, tau minimises

        sum_i |(tau - w_i tau_i) X_i^T|^2 / n_i + l |tau - toward * sum_i w_i tau_i|^2

    where l is ``ridge`` times the mean eigenvalue of sum_i X_i^T X_i / n_i. (The paper weighs the diagonal of the
    moments in place of l.) The equation solved is as large as the layer's inputs, or as the samples where these are
    fewer. The columns of tau are those of the tau_i, so factored deltas stay factored: parts are [n, p, in].
    """
    summed = total(parts, weights).double()
    start = toward * summed
    rows = torch.cat([x.double() / max(1, len(x)) ** 0.5 for x in inputs])
    gaps = [w * part.double() - start for w, part in zip(weights.double(), parts, strict=True)]
    missed = torch.cat([gap @ x.double().T / max(1, len(x)) ** 0.5 for gap, x in zip(gaps, inputs, strict=True)], 1)
    return start + ridged(missed, rows, ridge)


def ridged(missed: Tensor, rows: Tensor, ridge: float) -> Tensor:
    """The D [p, in] that minimises |D rows^T - missed|^2 + l |D|^2 for rows [n, in] and missed [p, n].

    l is ``ridge`` times the mean eigenvalue of rows^T rows.
    """
    pull = ridge * float(rows.square().sum()) / rows.shape[1]
    if len(rows) < rows.shape[1]:
        return _over(missed, rows @ rows.T, pull) @ rows
    return _over(missed @ rows, rows.T @ rows, pull)


def _over(goal: Tensor, moment: Tensor, pull: float) -> Tensor:
    """goal (moment + pull I)^-1 for a symmetric moment; within what it spans where pull is next to nothing."""
    if pull > NOTHING * float(moment.diagonal().mean()):
        # five times as fast as its eigenvectors, and as exact where the sum is well away from singular
        root = torch.linalg.cholesky(moment + pull * torch.eye(len(moment), dtype=moment.dtype))
        return torch.cholesky_solve(goal.T, root).T
    values, axes = torch.linalg.eigh(moment)
    values = values.clamp_min(0) + pull
    safe = values > NOTHING * values.max()
    solved: Tensor = (goal @ axes) * torch.where(safe, 1 / torch.where(safe, values, 1.0), 0.0) @ axes.T
    return solved


def _sylvester(left: Tensor | None, right: Tensor | None, found: Tensor, summed: Tensor, ridge: float) -> Tensor:
    """X with left X + X right + l X = found + l summed, where a side that is None is zero, left and right symmetric."""
    rows, row_axes = _spectrum(left, found.shape[0])
    columns, column_axes = _spectrum(right, found.shape[1])
    weight = rows[:, None] + columns[None, :]
    pull = ridge * (_typical(rows) + _typical(columns))
    goal = _turned(found + pull * summed, row_axes, column_axes)
    weight = weight + pull
    safe = weight > NOTHING * weight.max()
    solved = torch.where(safe, goal / torch.where(safe, weight, 1.0), 0.0)
    return _turned(solved, None if row_axes is None else row_axes.T, None if column_axes is None else column_axes.T)


def _spectrum(matrix: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    if matrix is None:
        return torch.zeros(size, dtype=torch.float64), None
    values, axes = torch.linalg.eigh(matrix)
    return values.clamp_min(0), axes


def _typical(values: Tensor) -> float:
    """The mean of the eigenvalues that are not nothing: the same in a core as in the whole matrix."""
    real = values[values > NOTHING * values.max()]
    return float(real.mean()) if len(real) else 0.0


def _turned(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """rows^T matrix columns, where None is the identity."""
    turned = matrix if rows is None else rows.T @ matrix
    return turned if columns is None else turned @ columns


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix whose columns (or rows, where it is wide) are orthonormal: U V^T; within the rank it has."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    real = values > 1e-7 * values[:1]
    nearest: Tensor = left[:, real] @ right[real]
    return nearest


def _size(parts: Tensor, weights: Tensor) -> float:
    """What sums of the parts are measured against, to tell nothing from rounding."""
    return float((weights.double().abs() * parts.double().flatten(1).norm(dim=1)).sum())


def _spanned(parts: Tensor, size: float) -> int:
    """How many directions all parts have together, on the side where these are fewer: the same in a core."""
    wide = parts.double()
    rows, columns = torch.cat(list(wide), 0), torch.cat(list(wide), 1)
    return min(int((torch.linalg.svdvals(side) > NOTHING * size).sum()) for side in (rows, columns))


@dataclass(frozen=True, slots=True)
class Combine:
    """One way to make several parts one.

    ``linear``: the result is a weighted sum, so factors can be laid side by side and patches joined. ``invariant``: it
    does not depend on the basis, so it may be done in a core. ``negative``: a weight below 0 has a meaning with these
    options (those of ``positive`` take it away). ``rest``: what is done to biases and other tensors that are no
    matrix. ``sees``: it looks at what layers are given.
    """

    run: Callable[..., Tensor]
    linear: bool = False
    invariant: bool = False
    negative: bool = True
    rest: Callable[..., Tensor] | None = None
    sees: bool = False


COMBINE: Mapping[str, Combine] = {
    "sum": Combine(total, linear=True, invariant=True),
    "mean": Combine(mean, linear=True, invariant=True, negative=False),
    "ties": Combine(ties),
    "iso_c": Combine(iso_c, invariant=True, rest=average),
    "iso_cts": Combine(iso_cts, invariant=True, rest=average),
    "tsv": Combine(tsv, invariant=True, rest=average),
    "wudi": Combine(wudi, invariant=True, rest=average),
    "regmean": Combine(regmean, rest=average, sees=True),
}
"""Every way by name."""


def check_weights(name: str, weights: Tensor, options: Mapping[str, Any]) -> None:
    """Raise MergeError for weights below 0 where they would mean nothing."""
    below = bool((weights < 0).any())
    if not below:
        return
    if name == "ties" and options.get("weigh", "after") == "after":
        raise MergeError(
            "Signs are elected before weights are applied, so what is to be unlearnt would vote for itself.",
            given=weights.tolist(),
            allowed="weights above 0",
            do="choose the option weigh=before (--option weigh=before), or task_arithmetic (--method task_arithmetic)",
        )
    if not COMBINE[name].negative:
        raise MergeError(
            "A mean with a weight below 0 is none.",
            given=weights.tolist(),
            allowed="weights above 0",
            do="use task_arithmetic (--method task_arithmetic): there a negative weight unlearns",
        )
