"""Recipes that fit into so much memory, best first, each with what it gives up.

    found = fitting(recipe, budget("24GB"))
    found.proposals[0].text, found.proposals[0].gives_up

Each is judged by a rehearsal of it (`tarsia.plan.search`), and leaves as much free as a run may come above its plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from tarsia.core.errors import ConfigError, PlanError
from tarsia.plan import cards
from tarsia.plan.cards import Card
from tarsia.plan.proposal import OF_DEVICE, Need, Nominal, Proposal
from tarsia.plan.rehearse import Outline
from tarsia.plan.search import Search
from tarsia.plan.time import Speeds
from tarsia.plan.variants import EFFORT, Effort, Rehearsals, Show
from tarsia.train.reading import size
from tarsia.train.recipe import Recipe


def budget(given: str | int) -> tuple[int, Card | None]:
    """Bytes of a size ("24GB", "24GiB", a number) or of a card by its name, with that card.

    Raises PlanError for what is neither, naming the nearest card.
    """
    try:
        return size(given, "--fit"), None
    except ConfigError:
        try:
            card = cards.find(str(given))
        except PlanError as error:
            raise PlanError(
                "That is neither a size nor a card.",
                given=repr(given),
                allowed=f"a size such as 24GB or 800MB, or one of {error.allowed}",
                do=error.do,
            ) from None
        return card.memory, card


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to: ``proposals`` that fit, best first. ``smallest`` is the least of all that was looked at.

    ``as_it_is`` is the recipe without any change, ``side`` the most pixels along a side of its pictures. ``tried``
    combinations were rehearsed of ``all`` that there are; ``stopped`` says what ended the search before it was through,
    "" where nothing did. ``refused`` are changes that can not be made here, and why; ``useless`` those that save
    nothing where it is too much.
    """

    budget: int
    margin: float
    as_it_is: Proposal
    side: int
    proposals: tuple[Proposal, ...]
    smallest: Proposal
    tried: int
    all: int
    stopped: str
    refused: tuple[str, ...]
    useless: tuple[str, ...]
    basis: str

    @property
    def missing(self) -> int:
        """Bytes that the smallest has too much; below 0 where it fits."""
        return self.smallest.figures.total - int(self.budget / (1 + self.margin))


def fitting(
    recipe: Recipe,
    bytes_: int,
    *,
    speeds: Speeds | None = None,
    need: Need = OF_DEVICE,
    effort: Effort = EFFORT,
    show: Show = lambda number, what: None,
) -> Found:
    """Search for recipes that need at most so many bytes of the device, less the margin.

    ``need`` is what of a plan counts. Raises as `tarsia.plan.plan` does for the recipe itself.
    """
    outline = Outline.of(recipe.model)
    held = Rehearsals(recipe, outline, speeds or Nominal(), need, effort, show)
    search = Search(held, bytes_)
    stopped = search.run()
    looked = [proposal for proposal in held.tried.values() if proposal is not None]
    return Found(
        budget=bytes_,
        margin=held.margin,
        as_it_is=held.as_it_is,
        side=held.known.side,
        proposals=search.proposals,
        smallest=min(looked, key=lambda proposal: proposal.figures.total),
        tried=len(held.tried),
        all=search.all,
        stopped=stopped,
        refused=tuple(f"{what}: {why}" for what, why in held.refused.items()),
        useless=tuple(search.useless),
        basis=held.speeds.basis,
    )
