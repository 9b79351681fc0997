"""Which adapter a picture is for: by its signature, against what the adapters' cards say of their pictures.

    router = Router(view(host))
    router.add("bins@3", adapter.card)           # refused, by name, where the card is of another base or says nothing
    choice = router.choose([signature(host, picture.inputs)])
    choice.name, choice.confidence, choice.why   # None: nobody's, the bare base answers

Linear discriminants over prototypes (Fisher 1936; Hastie, Tibshirani, Friedman, Elements of Statistical Learning, 4.3):
the covariance around the prototypes, pooled over all adapters, takes away what says nothing of whose a picture is
(light, noise, where a thing lies), and in the few directions in which prototypes differ each adapter's own covariance,
shrunk to the pooled one, tells how far its pictures lie (Friedman 1989, regularised discriminant analysis). All is made
from the cards; an adapter comes or goes without another's pictures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter.prototypes import Look
from tarsia.core.errors import AdapterError, BaseMismatch, ServeError
from tarsia.serve.space import Space, scatter

STRANGE: Final = 0.015
"""Share of its own pictures that an adapter may lose to the base: a rarer one is taken for nobody's."""
UNSURE: Final = 0.4
"""Confidence below which the choice is left open."""
CARD: Final = "routing"
"""Where a card says what its adapter's pictures look like."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and how sure that is.

    ``name`` is the adapter, None for the bare base. ``confidence`` is the chance, calibrated on pictures that the
    cards keep apart, that a picture of one of the adapters is the ``nearest``'s. ``typical`` is a conformal p-value:
    the share of the adapters' own pictures that lie as far from their prototypes as this, small for what none has
    seen. ``why`` is a word: nearest, strange, unsure, no picture, no adapter.
    """

    name: str | None
    confidence: float
    typical: float
    why: str
    nearest: str | None = None
    runner_up: str | None = None

    def plain(self) -> dict[str, Any]:
        """For the answer to the request."""
        return {
            "adapter": self.name,
            "confidence": round(self.confidence, 4),
            "typical": round(self.typical, 4),
            "why": self.why,
            "nearest": self.nearest,
            "runner_up": self.runner_up,
        }


class Router:
    """Adapters that can be chosen among, by name; ``view`` is that of the base which makes the signatures.

    ``width`` is how many numbers these have; None: as many as the first card's.
    """

    def __init__(
        self, view: Mapping[str, str], *, strange: float = STRANGE, unsure: float = UNSURE, width: int | None = None
    ) -> None:
        self.view, self.strange, self.unsure, self.width = dict(view), strange, unsure, width
        self._looks: dict[str, Look] = {}
        self._within: Tensor | None = None
        self._space: Space | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._looks)

    def add(self, name: str, card: Mapping[str, Any]) -> None:
        """Take an adapter in, in place of one of this name. The other adapters' pictures are not needed.

        Raises AdapterError, naming it, where its card says nothing of its pictures or can not be read, and BaseMismatch
        where these were looked at by another base, with another processor or another version of the signature.
        """
        look = self.fit_for(name, card)
        if name in self._looks:
            self.remove(name)
        self._looks[name] = look
        self._within = scatter(look) if self._within is None else self._within.add_(scatter(look))
        self._space = None

    def fit_for(self, name: str, card: Mapping[str, Any]) -> Look:
        """What a card says, where it can be compared with this base's pictures; raises as ``add`` does."""
        held = card.get(CARD)
        if held is None or (isinstance(held, Mapping) and "none" in held):
            raise AdapterError(
                f"The adapter {name} can not be chosen by a picture: its card says nothing of pictures.",
                given=f"no {CARD!r} in its card" if held is None else str(held["none"]),
                do="train it again with pictures and without routing: 0, or name it in requests",
            )
        try:
            look = Look.read(held)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error.what}", given=error.given, do=error.do) from None
        parts = sorted(set(look.view) | set(self.view))
        differing = [part for part in parts if look.view.get(part) != self.view.get(part)]
        if differing:
            raise BaseMismatch(
                f"The pictures of the adapter {name} were looked at in another way: not the same "
                f"{' and '.join(differing)}.",
                given="; ".join(f"{part} {look.view.get(part, 'none')[:32]}" for part in differing),
                allowed="; ".join(f"{part} {self.view.get(part, 'none')[:32]}" for part in differing),
                do="serve the base that it was trained on, or name the adapter in requests",
            )
        known = self.width or next(iter(self._looks.values()), look).width
        if look.width != known:
            raise AdapterError(
                f"The signatures in the card of the adapter {name} have another width.",
                given=f"{look.width} numbers",
                allowed=f"{known} numbers",
                do="train it again, or name it in requests",
            )
        return look

    def remove(self, name: str) -> None:
        """Let an adapter go. Raises ServeError where it is not here."""
        if name not in self._looks:
            raise ServeError("unknown_adapter", "The router does not know this adapter.", given=name)
        gone = scatter(self._looks.pop(name))
        self._within = self._within.sub_(gone) if self._looks and self._within is not None else None
        self._space = None

    def settle(self) -> None:
        """Work out now what the next ``choose`` needs, where adapters came or went: a moment, for thousands seconds.

        Raises ArithmeticError where that are no numbers, and what torch raises where it can not be solved.
        """
        if self._space is None and self._looks:
            self._space = Space.of(self._looks, self._within)

    def choose(self, signatures: Sequence[Tensor], among: Collection[str] | None = None) -> Choice:
        """Whose a request's pictures are, by their signatures [width] each; several count together.

        ``among`` are the names that may be chosen (None: all). A request whose pictures are not all like one adapter's
        is nobody's; so is one without any. Raises ServeError where a signature has another width than the cards'.
        """
        if not signatures:
            return Choice(None, 0.0, 0.0, "no picture")
        self.settle()
        space, may = self._space, None
        if space is not None and among is not None:
            may = torch.tensor([name in among for name in space.names])
        if space is None or (may is not None and not bool(may.any())):
            return Choice(None, 0.0, 0.0, "no adapter")
        wrong = next((s for s in signatures if s.shape != (space.width,)), None)
        if wrong is not None:
            raise ServeError(
                "internal",
                "A signature is not one of this router's.",
                given=str(tuple(wrong.shape)),
                allowed=str((space.width,)),
            )
        found = space.nearest(torch.stack(list(signatures)), may)
        name = space.names[found.best]
        second = None if found.second is None else space.names[found.second]
        why = "strange" if found.typical < self.strange else "unsure" if found.confidence < self.unsure else "nearest"
        chosen = name if why == "nearest" else None
        return Choice(chosen, found.confidence, found.typical, why, name, second)
