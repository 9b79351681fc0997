"""What can not act together at some site, found before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tarsia.core.compose import Acting, Average, Stack, members
from tarsia.core.errors import AttachError, CompositionError
from tarsia.core.lead import Lead, Pairs, length
from tarsia.core.patch import Outside, Patch
from tarsia.core.site import Kind, Site
from tarsia.core.slot import Slot


def check(slots: Sequence[Slot], parts: Sequence[Acting | None]) -> None:
    """Raise CompositionError where these, over one another, would lose a patch or average what has no mean."""
    if len(parts) < 2 and all(part is None or isinstance(part, str) for part in parts):
        return  # one adapter stands over the module itself
    for slot in slots:
        for site in slot.sites.values():
            _Place(slot, site).check(parts)


def over(model: nn.Module, acting: Sequence[Acting], patches: Sequence[tuple[Site, Patch]], name: str) -> None:
    """Raise AttachError where a patch of ``name`` would replace what one of those acting now makes of a site."""
    for site, patch in patches:
        slot = model.get_submodule(site.module)._modules.get("slot")
        if not patch.replaces or not isinstance(slot, Slot):
            continue
        below = [one for part in acting for one in members(part) if site.key in slot.held(one)]
        if below:
            raise AttachError(
                f"{name} would replace what {below[-1]} makes of {site.path}, which acts now.",
                given=type(patch).__name__,
                do="activate nothing first: activate(model)",
            )


def _lone(part: Average, lengths: Sequence[int]) -> None:
    """Raise CompositionError where some of the average's parts have a prompt or a prefix and others have none."""
    if all(lengths):
        return
    has = next(one for one, count in zip(part.parts, lengths, strict=True) if count)
    none = next(one for one, count in zip(part.parts, lengths, strict=True) if not count)
    acting = [one for one in part.parts if one is not None]
    alone = f"let {has} act alone"
    raise CompositionError(
        f"{has} has a prompt or a prefix and {'the base' if none is None else none} has none: they have no mean.",
        given=", ".join(f"{one}: {count}" for one, count in zip(part.parts, lengths, strict=True)) + " positions",
        do=f"stack them: Stack({', '.join(map(repr, acting))})" if len(acting) > 1 else alone,
    )


class _Place:
    """One site and the patches that its slot holds."""

    def __init__(self, slot: Slot, site: Site) -> None:
        self.slot, self.site = slot, site
        self.averaged = False  # whether a mean stands here, which hides the module itself from what is above

    def check(self, parts: Sequence[Acting | None], below: str | None = None) -> str | None:
        """Whose patch is topmost here with ``parts`` over the one of ``below``; None: nobody's."""
        for part in parts:
            below = self._over(part, below)
        return below

    def _over(self, part: Acting | None, below: str | None) -> str | None:
        if isinstance(part, Stack):
            return self.check(part.parts, below)
        if isinstance(part, Average):
            tops = [self._over(one, below) for one in part.parts]
            self._mean(part)
            top = next((top for top in tops if top != below), below)
            self.averaged |= top != below
            return top
        patch = self._patch(part)
        if patch is None:
            return below
        if patch.replaces and below is not None:
            raise CompositionError(
                f"{part} replaces what {below} makes of {self.site.path}, which would be lost.",
                given=f"{type(patch).__name__} over another patch",
                do=f"put {part} lowest, average the two, or let one of them act",
            )
        if self.averaged and self.site.kind is Kind.STREAM and not isinstance(patch, Outside):
            raise CompositionError(
                f"{part} has {self.site.path} run over more than its input, and can not do so over an average.",
                given=type(patch).__name__,
                do=f"put {part} lower in the stack",
            )
        return part if isinstance(part, str) else below

    def _patch(self, name: Acting | None) -> Patch | None:
        return self.slot.held(name).get(self.site.key)

    def _mean(self, part: Average) -> None:
        if self.site.kind is Kind.SEQUENCE:
            lengths = [self._length(one) for one in part.parts]
            if len(set(lengths)) > 1:
                _lone(part, lengths)
                of = ", ".join(f"{one}: {count}" for one, count in zip(part.parts, lengths, strict=True))
                raise CompositionError(
                    "Prompts and prefixes of unequal length have no mean.",
                    given=f"positions of {of}",
                    do="average adapters with prompts or prefixes of one length, or stack them",
                )
        if self.site.kind is Kind.STREAM:
            for name in members(part):
                patch = self._patch(name)
                if patch is not None and not isinstance(patch, Outside):
                    raise CompositionError(
                        f"{name} has {self.site.path} run over more than its input, which has no mean with others.",
                        given=type(patch).__name__,
                        do="stack it, or let it act alone",
                    )

    def _length(self, part: Acting | None) -> int:
        """How many positions the part's prompts and prefixes take."""
        if isinstance(part, Stack):
            return sum(self._length(one) for one in part.parts)
        if isinstance(part, Average):
            return max(self._length(one) for one in part.parts)
        patch = self._patch(part)
        if not isinstance(patch, Lead):
            return 0
        with torch.no_grad():
            return length(patch(self._counted, ()))

    def _counted(self, embeddings: torch.Tensor, before: Pairs) -> Pairs:
        """Keys and values of as many positions as a decoder would make of the embeddings, without any number."""
        _, heads, head = self.site.shape
        shape = (1, heads, embeddings.shape[1], head)
        return tuple((embeddings.new_empty(shape), embeddings.new_empty(shape)) for _ in self.site.layers)
