"""What an adapter's pictures look like to its base, small enough for its card.

    look = Look.of(view(host), signatures)       # [pictures, width], at the end of a training
    card["routing"] = look.plain()               # JSON: some tens of KB
    Look.read(card["routing"])                   # refused where anything is missing, or is no number

A *look* holds the few prototypes that k-means finds among an adapter's pictures, how these lie around them (the
leading directions and what is left in each coordinate), and some pictures' signatures that neither was made from, by
which a router learns how far from a prototype a picture of the adapter's may be.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor

from tarsia.core.errors import AdapterError

FEWEST: Final = 8
"""Pictures without which there is no look."""
MOST: Final = 4
"""Prototypes of an adapter."""
DIRECTIONS: Final = 20
"""Leading directions in which pictures lie around their prototypes."""
KEPT_APART: Final = 16
"""Signatures that are kept as they are."""
_TIGHTER: Final = 0.5
"""One more prototype is taken where it leaves at most this share of the squared distances."""
_ROUNDS: Final = 25
_LEVELS: Final = 127
_LARGEST: Final = 2 * torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class Look:
    """An adapter's pictures as its base sees them.

    ``view`` says what the signatures were computed with (``signature.view``), ``pictures`` of how many. ``counts``
    [prototypes] says of how many pictures each of ``prototypes`` [prototypes, width] is the mean. ``directions``
    [<= DIRECTIONS, width] times themselves, with ``rest`` [width] on the diagonal, are the covariance around these.
    ``apart`` [<= KEPT_APART, width] are signatures of pictures that nothing of it was made from.
    """

    view: Mapping[str, str]
    pictures: int
    counts: Tensor
    prototypes: Tensor
    directions: Tensor
    rest: Tensor
    apart: Tensor

    @property
    def width(self) -> int:
        return int(self.prototypes.shape[1])

    @classmethod
    def of(cls, view: Mapping[str, str], signatures: Tensor) -> Self:
        """Of the signatures [pictures, width] of an adapter's pictures, in an order that says nothing.

        Raises AdapterError for fewer pictures than FEWEST.
        """
        count = len(signatures)
        if count < FEWEST:
            raise AdapterError(
                "So few pictures do not tell what an adapter's pictures look like.",
                given=f"{count} pictures",
                allowed=f"{FEWEST} or more",
            )
        kept = min(KEPT_APART, count // 4)
        apart, made = signatures[:kept].float(), signatures[kept:].float()
        owners, prototypes = clusters(made)
        around = made - prototypes[owners]
        freedom = max(1, len(made) - len(prototypes))
        _, sizes, axes = torch.linalg.svd(around, full_matrices=False)
        leading = axes[:DIRECTIONS] * (sizes[:DIRECTIONS, None] / freedom**0.5)
        directions, scale = _rounded(leading)
        directions = directions * scale
        rest = (around.square().sum(0) / freedom - directions.square().sum(0)).clamp(min=0)
        counts = torch.bincount(owners, minlength=len(prototypes))
        return cls(dict(view), count, counts, prototypes, directions, rest, apart)

    def plain(self) -> dict[str, Any]:
        """As JSON. Prototypes are in 16 bits, all around them in 8."""
        middle = self.prototypes[0]
        return {
            "view": dict(self.view),
            "pictures": self.pictures,
            "width": self.width,
            "counts": self.counts.tolist(),
            "prototypes": _halves(self.prototypes),
            "rest": _halves(self.rest.sqrt()[None]),
            "directions": _bytes(self.directions),
            "apart": _bytes(self.apart - middle),
        }

    @classmethod
    def read(cls, values: object) -> Self:
        """What ``plain`` wrote. Raises AdapterError for all else."""
        try:
            return cls._read(values)
        except (KeyError, TypeError, ValueError, binascii.Error, RuntimeError, AttributeError) as error:
            raise AdapterError(
                "What the card says of its adapter's pictures can not be read.",
                given=f"routing: {type(error).__name__}: {error}",
                do="train the adapter again, or name it in requests",
            ) from None

    @classmethod
    def _read(cls, values: Any) -> Self:
        width, pictures, counts = values["width"], values["pictures"], values["counts"]
        if not all(type(number) is int and number > 0 for number in (width, pictures, *counts)):
            raise ValueError("width, pictures and counts are whole numbers above 0")
        view = values["view"]
        if not all(isinstance(text, str) for item in view.items() for text in item):
            raise ValueError("a view is texts by name")
        prototypes = _from_halves(values["prototypes"], width)
        rest = _from_halves(values["rest"], width)
        if not 1 <= len(prototypes) == len(counts) <= MOST or len(rest) != 1:
            raise ValueError(f"{len(prototypes)} prototypes, {len(counts)} counts")
        directions, apart = (_from_bytes(values[name], width) for name in ("directions", "apart"))
        found = cls(
            view=dict(view),
            pictures=pictures,
            counts=torch.tensor(counts),
            prototypes=prototypes,
            directions=directions,
            rest=rest[0].square(),
            apart=apart + prototypes[0],
        )
        # as large as 16 bits can say at most, as prototypes and `rest` are: what is farther would hide all others
        parts = (found.prototypes, found.rest.sqrt(), found.directions, found.apart)
        if not all(bool((part.abs() <= _LARGEST).all()) for part in parts):
            raise ValueError("not all of it is numbers that a signature has")
        return found


def clusters(points: Tensor) -> tuple[Tensor, Tensor]:
    """Owners [points] and prototypes [1..MOST, width] by k-means from the farthest points (Lloyd's algorithm).

    Coordinates count by their own deviation. There are as many prototypes as each more than halves what is left: a
    cloud in many dimensions does not come apart, two kinds of picture do.
    """
    scale = points.std(0, unbiased=False).clamp(min=1e-6)
    scaled = points / scale
    owners, left = torch.zeros(len(points), dtype=torch.long), _spread(scaled, scaled.mean(0, keepdim=True))
    for wanted in range(2, MOST + 1):
        tried = _lloyd(scaled, wanted)
        means = _means(scaled, tried, wanted)
        found = float((scaled - means[tried]).square().sum())
        if int(torch.bincount(tried, minlength=wanted).min()) < 2 or found > _TIGHTER * left:
            break
        owners, left = tried, found
    return owners, _means(points, owners, int(owners.max()) + 1)


def _lloyd(points: Tensor, wanted: int) -> Tensor:
    chosen = [int(torch.cdist(points, points.mean(0, keepdim=True)).argmax())]
    while len(chosen) < wanted:
        chosen.append(int(torch.cdist(points, points[chosen]).min(1).values.argmax()))
    centres = points[chosen]
    owners = torch.cdist(points, centres).argmin(1)
    for _ in range(_ROUNDS):
        centres = torch.where(
            torch.bincount(owners, minlength=wanted)[:, None] > 0, _means(points, owners, wanted), centres
        )
        now = torch.cdist(points, centres).argmin(1)
        if torch.equal(now, owners):
            break
        owners = now
    return owners


def _means(points: Tensor, owners: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, points.shape[1]).index_add_(0, owners, points)
    return sums / torch.bincount(owners, minlength=count).clamp(min=1)[:, None]


def _spread(points: Tensor, centres: Tensor) -> float:
    return float((points - centres).square().sum())


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / _LEVELS
    return (rows / scale).round(), scale


def _text(tensor: Tensor) -> str:
    return base64.b64encode(tensor.contiguous().view(torch.uint8).numpy().tobytes()).decode()


def _halves(rows: Tensor) -> str:
    return _text(rows.half())


def _bytes(rows: Tensor) -> dict[str, str]:
    whole, scale = _rounded(rows)
    return {"values": _text(whole.to(torch.int8)), "scale": _text(scale.float())}


def _from(text: str, dtype: torch.dtype) -> Tensor:
    raw = bytearray(base64.b64decode(text, validate=True))
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def _from_halves(text: str, width: int) -> Tensor:
    return _from(text, torch.float16).float().reshape(-1, width)


def _from_bytes(values: Mapping[str, str], width: int) -> Tensor:
    scale = _from(values["scale"], torch.float32)
    return _from(values["values"], torch.int8).float().reshape(-1, width) * scale[:, None]
