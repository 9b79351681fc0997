"""A decoder whose rows have prompts and prefixes before them: which, and what its layers make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tarsia.core.compose import Acting, Average, Stack, members
from tarsia.core.errors import RouteError
from tarsia.core.lead import Ahead, Pairs, averaged, joined, led, length
from tarsia.core.patch import Forward, Patch
from tarsia.core.site import Site

_LED = "tarsia_lead"  # where a cache keeps what stands before its rows
Parts = Sequence[Acting | None]


@dataclass(frozen=True)
class Decoder:
    """The module of a SEQUENCE site, as its slot sees it.

    ``below`` is its forward under the slot, ``held`` gives an adapter's patch of the site, and ``only`` lets but the
    given adapters act on all rows within the module, for as long as it is entered.
    """

    module: nn.Module
    site: Site
    below: Forward
    held: Callable[[Acting | None], Patch | None]
    only: Callable[[Parts], AbstractContextManager[None]]

    def run(self, call: Mapping[str, Any], stacks: Sequence[Parts], rows: Callable[[int], Sequence[int]]) -> Any:
        """The decoder's call with each row's lead before it.

        ``stacks`` are adapters that act over one another; ``rows``, asked for a number of rows, which stack is whose.
        """
        if any(self._leads(part) for stack in stacks for part in stack):
            self._check()
        whose, cache = rows(_rows(call)), call.get("past_key_values")
        ahead = self._ahead(stacks, whose, cache)
        if ahead is None:
            return self.below(**call)
        out = led(self.below, self.module.config, self.site, call, ahead)
        made = getattr(out, "past_key_values", None)
        if cache is None and made is not None:
            _mark(made, self._key(stacks, whose), ahead)
        return out

    def _key(self, stacks: Sequence[Parts], rows: Sequence[int]) -> tuple[tuple[Acting | None, ...], ...]:
        """What has prompts or prefixes among that which acts on each row."""
        return tuple(tuple(part for part in stacks[row] if self._leads(part)) for row in rows)

    def _check(self) -> None:
        """Raise RouteError where layers would drop the cache, and the lead with it, to compute activations again."""
        if any(module.training and getattr(module, "gradient_checkpointing", False) for module in self._layers()):
            raise RouteError(
                "Layers whose activations are checkpointed read no cache, and so no prompt or prefix.",
                given=f"{type(self.module).__name__} in train mode, with checkpointing",
                do="train prompts and prefixes without checkpointing: they need few activations",
            )

    def _layers(self) -> Iterator[nn.Module]:
        find: Any = getattr(self.module, "get_decoder", None)
        decoder: nn.Module = self.module if find is None else find()
        return decoder.modules()

    def _ahead(self, stacks: Sequence[Parts], rows: Sequence[int], cache: Any) -> Ahead | None:
        """The leads of the rows, or those with which the tokens of ``cache`` were read."""
        key = self._key(stacks, rows)
        past = 0 if cache is None else int(cache.get_seq_length())
        held = None if cache is None else cache.__dict__.get(_LED)
        if past and key != (held[0] if held is not None else ((),) * len(rows)):
            raise RouteError(
                "The cache holds tokens that were read after other prompts or prefixes.",
                given=", ".join(sorted({str(name) for names in key for name in names})) or "none now",
                allowed=", ".join(sorted({str(name) for names in held[0] for name in names})) if held else "none",
                do="begin with an empty cache, or go on with the adapters that it was begun with",
            )
        if past and held is not None:
            found: Ahead | None = held[1]
            return found
        leads = [self._lead(stack) for stack in stacks]
        ahead = Ahead.of(leads, rows) if any(map(length, leads)) else None
        if cache is not None:
            _mark(cache, key, ahead)
        return ahead

    def _leads(self, part: Acting | None) -> bool:
        return any(self.held(name) is not None for name in members(part))

    def _lead(self, parts: Parts) -> Pairs:
        """The keys and values of these adapters' prompts and prefixes, one after the other."""
        pairs: Pairs = ()
        for part in parts:
            pairs = joined(pairs, self._after(pairs, part, parts))
        return pairs

    def _after(self, before: Pairs, part: Acting | None, acting: Parts) -> Pairs:
        """The lead of one part, which stands after those ``before``; prompts are read as ``acting`` reads them."""
        if isinstance(part, Stack):
            own: Pairs = ()
            for one in part.parts:
                own = joined(own, self._after(joined(before, own), one, acting))
            return own
        if isinstance(part, Average):
            leads = [self._after(before, one, acting) for one in part.parts]
            return averaged(leads, part.weights) if any(leads) else ()
        patch = self.held(part)
        if patch is None:
            return ()
        found: Pairs = patch(lambda x, earlier: self.read(acting, x, earlier), before)
        return found

    def read(self, acting: Parts, embeddings: Tensor, before: Pairs) -> Pairs:
        """Keys and values that the decoder, with the patches of ``acting``, makes of embeddings [1, length, width]."""
        from tarsia.core.front import endless

        module: Any = self.module
        count, cache = embeddings.shape[1], endless()
        place = torch.arange(count, device=embeddings.device)[None]
        call = {
            "inputs_embeds": embeddings.to(module.get_input_embeddings().weight.dtype),
            "position_ids": place + self.site.first,
            "past_key_values": cache,
            "use_cache": True,
        }
        if self.site.causal is not None:
            call["token_type_ids"] = torch.full_like(place, self.site.causal)
        with self.only(acting):
            if before:
                led(self.below, module.config, self.site, call, Ahead((length(before),), before))
            else:
                self.below(**call)
        return tuple((cache.layers[layer].keys, cache.layers[layer].values) for layer in self.site.layers)


def _mark(cache: Any, key: tuple[tuple[Acting | None, ...], ...], ahead: Ahead | None) -> None:
    """Let a cache remember what its tokens are read after, and refuse who would go on with them without it.

    That outlives the slot: where the last prompt or prefix is taken out, nothing else would notice.
    """
    cache.__dict__[_LED] = key, ahead
    cache.__dict__.pop("update", None)
    if ahead is not None:
        cache.update = partial(_unled, sorted({str(part) for parts in key for part in parts}))


def _unled(names: Sequence[str], *args: Any, **keywords: Any) -> Any:
    """What a bare decoder's call comes to: one that is led goes to the layers, past the cache itself."""
    raise RouteError(
        "The cache was begun after prompts or prefixes that are not there any more.",
        given=", ".join(names),
        do="begin with a new cache, or put these adapters in again",
    )


def _rows(call: Mapping[str, Any]) -> int:
    given = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
    return 0 if given is None else len(given)
