"""One pass of the decoder over a line: the tokens of all rows of a step, end to end.

The decoder is Transformers' own; what it attends to is not. It hands its queries, keys and values to `Line.attend`,
which keeps keys and values in blocks of one pool a layer and lets every row attend to its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tarsia.adapter import Host
from tarsia.core.errors import ServeError
from tarsia.core.lead import Pairs
from tarsia.serve import kernel
from tarsia.serve.front import decoder, sequence
from tarsia.serve.mixed import Board
from tarsia.serve.page import Page

_ATTENTION: Final = "tarsia_line"
_HANDLED: Final = {"dropout", "sliding_window", "softcap", "position_ids", "use_cache", "is_causal", "layer_idx"}
FULL, WINDOWED = "full_attention", "sliding_attention"


@dataclass(frozen=True, eq=False)
class Part:
    """What a step reads of one row: the next tokens after the ``before`` that its ``blocks`` hold.

    ``embeds`` [tokens, width], or None where they are looked up from ``ids``; ``positions`` [axes, tokens]. ``shape``
    as of a row that is read whole (`front.Read`). ``places`` tells which tokens are a picture's (None: none of them),
    and ``deep`` [layers, of these, width] what is added to them in the first layers. ``wanted``: whether the logits
    after its last token are asked for.
    """

    page: Page | None
    blocks: Sequence[int]
    before: int
    ids: Sequence[int]
    embeds: Tensor | None
    positions: Tensor
    shape: Mapping[str, Tensor] | None = None
    places: Tensor | None = None
    deep: Tensor | None = None
    wanted: bool = True

    @property
    def count(self) -> int:
        """Tokens that are read."""
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class _Step:
    """Where everything lies in the pass that runs now: see `kernel.attend`."""

    parts: Sequence[Part]
    starts: Tensor
    before: Tensor
    tables: Tensor
    slots: Tensor


class Line:
    """The decoder of a base over its pools: ``bytes`` of keys and values, in blocks of ``size`` tokens."""

    def __init__(self, host: Host, board: Board, limit: int, size: int) -> None:
        self._host, self.board, self.size = host, board, size
        site = sequence(host)
        self._decoder = decoder(host, site)
        self._config = self._decoder.config
        _, heads, width = site.shape
        weight = host.model.get_input_embeddings().weight  # type: ignore[operator]
        each = 2 * heads * width * weight.element_size() * size * len(site.layers)
        self.count = limit // each
        if self.count < 1:
            raise ServeError(
                "invalid",
                "The memory for keys and values holds not one block.",
                given=f"{limit:,} bytes",
                allowed=f"at least {each:,}",
            )
        self._layers = {number: i for i, number in enumerate(site.layers)}
        shape = (self.count, size, heads, width)
        self._keys = [torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in site.layers]
        self._values = [torch.empty_like(keys) for keys in self._keys]
        self._device, self._dtype = weight.device, weight.dtype
        self._step: _Step | None = None
        self._met: set[int] = set()
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, _unmasked)

    @property
    def bytes(self) -> int:
        """Of all pools."""
        return sum(t.nbytes for t in (*self._keys, *self._values))

    def lead(self, blocks: Sequence[int], pairs: Pairs) -> None:
        """Lay what stands before a row's own tokens into its first blocks."""
        count = pairs[0][0].shape[-2]
        slots = self._slots(blocks, 0, count).to(self._device)
        for i, (keys, values) in enumerate(pairs):
            k, v = (t[0].transpose(0, 1).to(self._device, self._dtype).contiguous() for t in (keys, values))
            kernel.store(k, v, self._keys[i], self._values[i], slots)

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Tensor:
        """Logits [parts that want them, vocabulary] in float32, in the order of ``parts``."""
        pages, counts = [part.page for part in parts], [part.count for part in parts]
        self._step, self._met = self._laid(parts, counts), set()
        call = self._call(parts, counts)
        try:
            with self._attending(), self.board.lying(pages, counts):
                hidden = self._decoder(**call, use_cache=False).last_hidden_state
        finally:
            step, self._step = self._step, None
        if self._met != set(range(len(self._keys))):
            raise ServeError(
                "internal", "Not all layers of the decoder attended.", given=f"{len(self._met)} of {len(self._keys)}"
            )
        last = [end - 1 for end, part in zip(step.starts[1:].tolist(), parts, strict=True) if part.wanted]
        if not last:
            return torch.empty(0, 0)
        wanted = [part.page for part in parts if part.wanted]
        with self.board.lying(wanted, [1] * len(wanted)):
            return self._head(hidden[:, last])[0].float()

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._host.model.get_output_embeddings()(hidden)  # type: ignore[operator]
        cap = getattr(self._config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _call(self, parts: Sequence[Part], counts: Sequence[int]) -> dict[str, Any]:
        axes = max(part.positions.shape[0] for part in parts)
        positions = torch.cat([part.positions.expand(axes, -1) for part in parts], 1)
        call: dict[str, Any] = {
            "inputs_embeds": self._embedded(parts),
            "position_ids": positions if axes == 1 else positions[:, None],
        }
        if any(part.deep is not None for part in parts):
            places = [
                torch.zeros(part.count, dtype=torch.bool, device=self._device) if part.places is None else part.places
                for part in parts
            ]
            call["visual_pos_masks"] = torch.cat(places)[None]
            call["deepstack_visual_embeds"] = list(torch.cat([p.deep for p in parts if p.deep is not None], 1))
        return call

    def _embedded(self, parts: Sequence[Part]) -> Tensor:
        """[1, tokens, width]: those that are looked up in one call, in their places."""
        bare = [part for part in parts if part.embeds is None]
        found: Iterator[Tensor] = iter(())
        if bare:
            ids = torch.tensor([[token for part in bare for token in part.ids]], device=self._device)
            with self.board.lying([part.page for part in bare], [part.count for part in bare]):
                looked = self._host.model.get_input_embeddings()(ids)[0]  # type: ignore[operator]
            found = iter(looked.split([part.count for part in bare]))
        return torch.cat([next(found) if part.embeds is None else part.embeds for part in parts])[None]

    def _laid(self, parts: Sequence[Part], counts: Sequence[int]) -> _Step:
        most = max(len(part.blocks) for part in parts)
        tables = [[*part.blocks, *[0] * (most - len(part.blocks))] for part in parts]
        slots = [self._slots(part.blocks, part.before, part.count) for part in parts]
        return _Step(
            parts=parts,
            starts=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            before=torch.tensor([part.before for part in parts], dtype=torch.int32),
            tables=torch.tensor(tables, dtype=torch.int32),
            slots=torch.cat(slots).to(self._device),
        )

    def _slots(self, blocks: Sequence[int], first: int, count: int) -> Tensor:
        places = torch.arange(first, first + count)
        return torch.tensor(blocks)[places // self.size] * self.size + places % self.size

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Let the decoder's layers attend through this line inside."""
        config, before = self._config, self._config._attn_implementation
        config._attn_implementation = _ATTENTION
        _here.append(self)
        try:
            yield
        finally:
            _here.pop()
            config._attn_implementation = before

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, further: Mapping[str, Any]) -> Tensor:
        """[1, tokens, heads, width] for queries, keys and values [1, heads, tokens, width] of one layer."""
        step = self._step
        unknown = {name for name, value in further.items() if name not in _HANDLED and value is not None}
        if step is None or unknown:
            raise ServeError("invalid", "A layer attends in a way that is not known here.", given=", ".join(unknown))
        at = self._layers[layer]
        self._met.add(at)
        keys, values = self._keys[at], self._values[at]
        q = q[0].transpose(0, 1)
        kernel.store(k[0].transpose(0, 1), v[0].transpose(0, 1), keys, values, step.slots)
        window, cap = further.get("sliding_window"), further.get("softcap")
        out = kernel.attend(q, keys, values, step.tables, step.starts, step.before, scale, window, cap)
        for i, part in enumerate(step.parts):
            if part.shape is not None:
                own = slice(int(step.starts[i]), int(step.starts[i + 1]))
                before = self._slots(part.blocks, 0, part.before).to(keys.device)
                all_k, all_v = (
                    torch.cat([pool.flatten(0, 1)[before], new[0].transpose(0, 1)[own]])
                    for pool, new in ((keys, k), (values, v))
                )
                out[own] = _shaped(q[own], all_k, all_v, _mask(part.shape, part.before, window), scale, cap)
        return out[None]


_here: list[Line] = []
"""The lines whose passes run now, the innermost last: Transformers looks attention up by a name."""


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **further: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface, for the line whose pass runs now."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return _here[-1].attend(module.layer_idx, q, k, v, scale, further), None


def _unmasked(*args: Any, **keywords: Any) -> None:
    """No mask: whose tokens are whose is known by their blocks."""


def _mask(shape: Mapping[str, Tensor], before: int, window: int | None) -> Tensor:
    """Of a row that is read whole, [tokens, before + tokens]: all see what stands before it, or their window of it."""
    mask = shape.get(WINDOWED if window and WINDOWED in shape else FULL)
    own = (shape[""] if mask is None else mask)[0, 0]
    places = torch.arange(len(own), device=own.device)[:, None] + before
    seen = places - torch.arange(before, device=own.device) < (window or len(own) + before + 1)
    return torch.cat([seen, own], 1)


def _shaped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float | None) -> Tensor:
    """Queries [tokens, heads, width] to keys and values [all, kept heads, width] by a mask [tokens, all]."""
    groups = q.shape[1] // k.shape[1]
    queries = q.transpose(0, 1)[None]
    keys, values = (t.transpose(0, 1).repeat_interleave(groups, 0)[None] for t in (k, v))
    if cap is None:
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = cap * torch.tanh(queries.float() @ keys.float().mT * scale / cap)
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(values.dtype) @ values
    return out[0].transpose(0, 1)
