"""The directions in which the prototypes of adapters differ, and how far each adapter's pictures lie in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.adapter.prototypes import Look

AXES: Final = 48
"""The most directions in which signatures are compared."""
OWN: Final = 0.3
"""How much of an adapter's own covariance counts; the rest is the pooled one (Friedman 1989, equation 12)."""
RIDGE: Final = 0.03
"""What is added to the pooled covariance, in units of each coordinate's own variance."""
CANDIDATES: Final = 32
"""Prototypes nearest by the pooled covariance, which are then looked at by their own."""
PRIOR: Final = 16.0
"""Pictures that the pooled scale of distances counts as, beside an adapter's own."""
_TEMPERATURES: Final = tuple(1.25**k for k in range(-4, 22))
_STEEPEST: Final = 0.1
"""The least that distances are taken to scatter by, as logarithms, beyond the farthest that was seen."""
_MOST: Final = 4096
"""Pictures, of all that the cards keep apart, which calibrate."""
_WARMING: Final = 1024
"""Of these, how many decide the temperature."""
_AT_ONCE: Final = 128


@dataclass(frozen=True, slots=True)
class Nearest:
    """The best adapter and the next, by number; see ``route.Choice`` for the rest."""

    best: int
    second: int | None
    confidence: float
    typical: float


@dataclass(frozen=True, eq=False)
class Space:
    """Signatures seen from the prototypes; all tensors float32.

    ``axes`` [axes, width] and ``origin`` [axes] take a signature there. Of the prototypes: ``owners`` the adapter's
    number, ``places`` [prototypes, axes]. Of the adapters: ``roots`` [adapters, axes, axes] whose squares are the
    inverse covariances, ``volumes`` their log-determinants, ``scales`` the squared distance that is usual.
    ``usual`` are all calibrating distances in these units, ascending; ``temperature`` divides the scores.
    """

    names: tuple[str, ...]
    axes: Tensor
    origin: Tensor
    owners: Tensor
    places: Tensor
    roots: Tensor
    volumes: Tensor
    scales: Tensor
    usual: Tensor
    temperature: float

    @property
    def width(self) -> int:
        return int(self.axes.shape[1])

    @classmethod
    def of(cls, looks: Mapping[str, Look], within: Tensor | None = None) -> Self:
        """From every adapter's look, by name. ``within`` is the sum of ``scatter`` of all, where it is known.

        Raises ArithmeticError where what comes out are no numbers.
        """
        held = list(looks.values())
        if within is None:
            within = scatter(held[0])
            for look in held[1:]:
                within += scatter(look)
        owners = torch.cat([torch.full((len(look.prototypes),), i) for i, look in enumerate(held)])
        prototypes = torch.cat([look.prototypes for look in held])
        axes = _axes(held, prototypes, within / len(held))
        origin = axes @ prototypes.mean(0)
        places = prototypes @ axes.T - origin
        roots, volumes = _covariances(held, axes)
        ones = torch.ones(len(held))
        bare = cls(tuple(looks), axes, origin, owners, places, roots, volumes, ones, torch.zeros(1), 1.0)
        found = bare._calibrated(held)
        parts = (found.axes, found.origin, found.places, found.roots, found.volumes, found.scales, found.usual)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ArithmeticError("directions, places or distances are no numbers")
        return found

    def nearest(self, signatures: Tensor, may: Tensor | None = None) -> Nearest:
        """Of one request's pictures, [pictures, width]: their scores add up, and the strangest says how strange.

        ``may`` [adapters] says which of them can be found, one at least; None: all.
        """
        points = signatures.float() @ self.axes.T - self.origin
        adapters, scores, distances = self._candidates(points, may)
        order = torch.argsort(scores)
        best = int(order[0])
        second = int(adapters[order[1]]) if len(order) > 1 else None
        # one request's pictures are much alike: their mean is one piece of evidence
        shares = torch.softmax(-scores / (2 * self.temperature * len(points)), 0)
        units = float(distances[:, best].max() / self.scales[adapters[best]])
        typical = min(1.0, _rarity(self.usual, units) * len(points))
        return Nearest(int(adapters[best]), second, float(shares[best]), typical)

    def _candidates(self, points: Tensor, may: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Adapters near ``points`` [n, axes], their scores added over these, and squared distances [n, adapters]."""
        rough, count = torch.cdist(points, self.places).square().sum(0), len(self.places)
        if may is not None:
            allowed = may[self.owners]
            rough, count = rough.masked_fill(~allowed, torch.inf), int(allowed.sum())
        taken = rough.topk(min(CANDIDATES, count), largest=False, sorted=False).indices
        owners = self.owners[taken]
        offsets = points[:, None] - self.places[taken]
        squares = torch.einsum("pkl,npl->npk", self.roots[owners], offsets).square().sum(2)
        adapters, where = owners.unique(return_inverse=True)
        least = torch.full((len(points), len(adapters)), torch.inf)
        least = least.scatter_reduce(1, where.expand(len(points), -1), squares, "amin")
        return adapters, (least + self.volumes[adapters]).sum(0), least

    def _calibrated(self, looks: list[Look]) -> Self:
        """With scales, usual distances and the temperature, from the pictures that the cards keep apart."""
        share = max(1, min(len(look.apart) for look in looks), _MOST // len(looks))
        kept = [look.apart[:share] @ self.axes.T - self.origin for look in looks]
        own = [self._own(i, points) for i, points in enumerate(kept)]
        middle = torch.cat(own).mean()
        sums, counts = (torch.tensor([float(f(one)) for one in own]) for f in (torch.sum, torch.numel))
        scales = (sums + PRIOR * middle) / (counts + PRIOR)
        # a picture's own distance is left out of the scale that it is held to
        usual = [
            one * (counts[i] - 1 + PRIOR) / (sums[i] - one + PRIOR * middle).clamp(min=1e-9)
            for i, one in enumerate(own)
        ]
        found = type(self)(
            self.names, self.axes, self.origin, self.owners, self.places, self.roots, self.volumes, scales,
            torch.cat(usual).sort().values, 1.0,
        )  # fmt: skip
        return found._warmed(kept)

    def _own(self, adapter: int, points: Tensor) -> Tensor:
        places = self.places[self.owners == adapter]
        offsets = points[:, None] - places
        return torch.einsum("kl,npl->npk", self.roots[adapter], offsets).square().sum(2).min(1).values

    def _warmed(self, kept: list[Tensor]) -> Self:
        """With the temperature under which the kept pictures' own adapters are likeliest (Guo and others 2017)."""
        step = max(1, sum(map(len, kept)) // _WARMING)
        rows = []
        for i, points in enumerate(kept):
            for point in points[i % step :: step]:
                adapters, scores, _ = self._candidates(point[None])
                held = torch.full((CANDIDATES,), torch.inf)
                held[: len(scores)] = scores - scores.min()
                mine = scores[adapters == i]
                rows.append((held, float(mine[0] - scores.min()) if len(mine) else float(held[: len(scores)].max())))
        table, own = torch.stack([row for row, _ in rows]), torch.tensor([mine for _, mine in rows])

        def loss(temperature: float) -> float:
            return float((own / (2 * temperature) + torch.logsumexp(-table / (2 * temperature), 1)).mean())

        best = min(_TEMPERATURES, key=loss)
        return type(self)(
            self.names, self.axes, self.origin, self.owners, self.places, self.roots, self.volumes, self.scales,
            self.usual, best,
        )  # fmt: skip


def _rarity(usual: Tensor, units: float) -> float:
    """The conformal p-value of a distance against ``usual`` ones, ascending (Vovk and others 2005).

    Beyond the farthest of these it goes on falling as their tail does (Hill 1975): few pictures could not say less.
    """
    count = len(usual)
    above = count - int(torch.searchsorted(usual, units))
    if above:
        return (1 + above) / (1 + count)
    tail = max(2, count // 10)
    start = max(float(usual[-tail]), 1e-9)
    slope = max(_STEEPEST, float((usual[-tail:] / start).log().mean()))
    return float(min(1 / (1 + count), tail / count * (units / start) ** (-1 / slope)))


def scatter(look: Look) -> Tensor:
    """The covariance of an adapter's pictures around their prototypes, [width, width] float64: sums of it are exact."""
    found = (look.directions.T @ look.directions).double()
    found.diagonal().add_(look.rest)
    return found


def _axes(looks: list[Look], prototypes: Tensor, pooled: Tensor) -> Tensor:
    """[<= AXES, width]: where prototypes lie apart once what is usual around them is taken away; then where it is most.

    In these coordinates the pooled covariance is the identity, but for the ridge.
    """
    width, within = prototypes.shape[1], pooled.float()
    scale = (within.diagonal() + prototypes.var(0, unbiased=False)).sqrt().clamp(min=1e-6)
    within = within / scale / scale[:, None]
    within.diagonal().add_(RIDGE)
    root = torch.linalg.cholesky(within)
    white = torch.linalg.solve_triangular(root, ((prototypes - prototypes.mean(0)) / scale).T, upper=False).T
    count = min(AXES, width)
    between = _leading(white, min(count, len(prototypes) - 1))
    if len(between) < count:
        # few adapters differ in few directions: strangers are told by where pictures of these vary too
        rows = torch.cat([look.directions for look in looks]) / scale
        whitened = torch.linalg.solve_triangular(root, rows.T, upper=False).T
        whitened = whitened - whitened @ between.T @ between
        between = torch.cat([between, _leading(whitened, count - len(between))])
    axes: Tensor = torch.linalg.solve_triangular(root.T, between.T, upper=True).T / scale
    return axes


def _leading(rows: Tensor, count: int) -> Tensor:
    """The leading right singular vectors of ``rows`` [n, width], at most ``count`` and none that nothing lies along."""
    if count < 1 or not len(rows):
        return torch.empty(0, rows.shape[1])
    square = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values, vectors = torch.linalg.eigh(square.double())
    keep = values > 1e-9 * values[-1].clamp(min=1e-30)
    vectors = vectors[:, keep].flip(1)[:, :count].float()
    axes: Tensor = vectors.T @ rows if len(rows) <= rows.shape[1] else vectors.T
    return F.normalize(axes, dim=1)


def _covariances(looks: list[Look], axes: Tensor) -> tuple[Tensor, Tensor]:
    """The roots of the inverse covariances [adapters, axes, axes], and the log-determinants [adapters]."""
    parts = []
    for first in range(0, len(looks), _AT_ONCE):
        rest = torch.stack([look.rest for look in looks[first : first + _AT_ONCE]])
        parts.append(torch.einsum("kw,jw,lw->jkl", axes, rest, axes) if len(rest) == 1 else _diagonal(axes, rest))
    own = torch.cat(parts)
    for i, look in enumerate(looks):
        seen = look.directions @ axes.T
        own[i] += seen.T @ seen
    mixed = OWN * own + (1 - OWN) * own.mean(0)
    mixed.diagonal(dim1=1, dim2=2).add_(RIDGE)
    roots = torch.linalg.cholesky(mixed)
    volumes = 2 * roots.diagonal(dim1=1, dim2=2).log().sum(1)
    eye = torch.eye(axes.shape[0]).expand_as(roots)
    return torch.linalg.solve_triangular(roots, eye, upper=False), volumes


def _diagonal(axes: Tensor, rest: Tensor) -> Tensor:
    """axes diag(rest_j) axes^T for every j, [j, axes, axes]."""
    pairs = (axes[:, None] * axes[None]).reshape(-1, axes.shape[1])
    return (rest @ pairs.T).reshape(len(rest), len(axes), len(axes))
