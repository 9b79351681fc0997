"""What comes before the decoder: pictures encoded once, and a row's ids as the embeddings that the decoder reads.

Everything here is Transformers' own code for the family, called for one row at a time: its vision side for one picture,
and its model up to the moment at which it calls the decoder. So a picture's features are a function of that picture
and of whatever adapter touches what it passes through, of nothing else; and no family needs code of its own.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tarsia.adapter import Host
from tarsia.core.errors import ServeError
from tarsia.core.patch import dense, swapped
from tarsia.core.site import Kind, Site
from tarsia.serve.forms import Odd
from tarsia.serve.mixed import Board
from tarsia.serve.page import Page
from tarsia.serve.request import Picture, Prompt

_BY_LAYER: Final = "deepstack_features"
_PIXELS: Final = "pixel_"
_KNOWN: Final = {"inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "deepstack_visual_embeds"}


class _Reached(Exception):
    """The decoder was about to be called with these arguments."""

    def __init__(self, call: Mapping[str, Any]) -> None:
        self.call = call


@dataclass(frozen=True, eq=False)
class Features:
    """What the model makes of one picture: its fields, and how many of the decoder's tokens they fill."""

    fields: Mapping[str, Any]
    tokens: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Read:
    """A row as the decoder is given it.

    ``embeds`` [tokens, width]; ``positions`` [axes, tokens], and ``next``, the position of the token after;
    ``pictures`` tells of each token which of the row's pictures it stands for, -1 for none. ``shape``: where tokens
    attend to later ones, the masks that the model made for this row, by kind of layer ("" for all); None where each
    sees what is before it. ``deep`` [layers, tokens of pictures, width] is added in the first layers.
    """

    embeds: Tensor
    positions: Tensor
    next: int
    pictures: Tensor
    shape: Mapping[str, Tensor] | None
    deep: Tensor | None

    def deeper(self, own: slice) -> tuple[Tensor | None, Tensor | None]:
        """Which of these tokens are a picture's, and what is added to them in the first layers; None for nothing."""
        if self.deep is None:
            return None, None
        seen = self.pictures >= 0
        first, count = int(seen[: own.start].sum()), int(seen[own].sum())
        return (seen[own], self.deep[:, first : first + count]) if count else (None, None)


class Front:
    """The base up to its decoder. ``limit`` is how many bytes of pictures' features are kept.

    Raises ServeError for a base of which this can not be done: no decoder of text, a version of Transformers that
    takes no encoded pictures.
    """

    def __init__(self, host: Host, board: Board, limit: int) -> None:
        self._host, self._board, self._limit = host, board, limit
        self.site = sequence(host)
        self._inner = inner(host)
        self.decoder = decoder(host, self.site)
        own = next(name for name, module in host.model.named_modules() if module is self._inner)
        self._own = [site for site in host.sites if site.kind is Kind.TENSOR and site.module == own]
        self._takes = {*inspect.signature(type(self._inner).forward).parameters}
        if "mm_encoder_outputs" not in self._takes:
            raise ServeError(
                "invalid",
                "This base can not be given pictures that were encoded before.",
                given=f"{type(self._inner).__name__}, transformers {transformers.__version__}",
                do="update transformers to 5.23 or later; of some families it never can",
            )
        self._pixels = {*inspect.signature(type(self._inner).get_image_features).parameters}
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self._kept_bytes = self.hits = self.misses = 0
        self._catching = False
        self.decoder.register_forward_pre_hook(self._catch, with_kwargs=True)

    @property
    def held(self) -> int:
        """Bytes of all features that are kept."""
        return self._kept_bytes

    def read(self, prompt: Prompt, page: Page | None) -> Read:
        """The row as the decoder is given it under the adapter of ``page``.

        Raises ServeError where pictures do not fill the places that the prompt has for them, or the model gives its
        decoder something that is not known here.
        """
        found = [self.features(picture, page) for picture in prompt.pictures]
        ids = torch.tensor([prompt.ids], device=self._device)
        owners = self._owners(prompt, ids[0], found)
        call: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        call |= {name: value.to(self._device) for name, value in prompt.marks.items()}
        if found:
            call["mm_encoder_outputs"] = {"image": _joined([one.fields for one in found])}
            call |= self._beside(prompt.pictures)
        if getattr(self._inner, "rope_deltas", None) is not None:
            self._inner.rope_deltas = None  # of another row
        with self._board.lying([page], [len(prompt.ids)]):
            given = self._reached({name: value for name, value in call.items() if name in self._takes})
        return _read(given, owners, self.site.first)

    def features(self, picture: Picture, page: Page | None) -> Features:
        """What the model makes of ``picture`` under the adapter of ``page``: kept, or computed."""
        key = picture.key + (page.front if page is not None else b"")
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            self.hits += 1
            return kept
        self.misses += 1
        inputs = {
            name: value.to(self._device, self._dtype if value.is_floating_point() else value.dtype)
            for name, value in picture.inputs.items()
            if name in self._pixels
        }
        with self._board.alone(page), swapped(self._inner, self._aside(page)):
            out = self._inner.get_image_features(**inputs, return_dict=True)
        fields = {name: out[name] for name in ("pooler_output", _BY_LAYER) if out.get(name) is not None}
        made = Features(fields, _tokens(fields["pooler_output"]), _bytes(fields))
        self._keep(key, made)
        return made

    def _aside(self, page: Page | None) -> dict[str, Tensor | None]:
        """Tensors that the model reads outside of its own call (a newline's embedding, say), with their patches."""
        changed: dict[str, Tensor | None] = {}
        for site in self._own if page is not None else ():
            form = page.forms.get(site.path) if page is not None else None
            if isinstance(form, Odd):
                changed[site.key] = form.patch.fold(*dense(self._inner, site))[0]
        return changed

    def _keep(self, key: bytes, made: Features) -> None:
        if made.bytes > self._limit:
            return
        self._kept[key] = made
        self._kept_bytes += made.bytes
        while self._kept_bytes > self._limit:
            self._kept_bytes -= self._kept.popitem(last=False)[1].bytes

    def _beside(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """What the model is told of all pictures beside their pixels: grids, sizes."""
        names = dict.fromkeys(name for picture in pictures for name in picture.inputs)
        return {
            name: torch.cat([picture.inputs[name] for picture in pictures]).to(self._device)
            for name in names
            if name in self._takes and not name.startswith(_PIXELS)
        }

    def _owners(self, prompt: Prompt, ids: Tensor, found: Sequence[Features]) -> Tensor:
        places = (ids == self._host.model.config.image_token_id).nonzero()[:, 0]  # type: ignore[union-attr]
        counts = [one.tokens for one in found]
        if len(places) != sum(counts):
            raise ServeError(
                "invalid",
                "The pictures do not fill the places that the prompt has for them.",
                given=f"{len(places)} places, pictures of {counts} tokens",
            )
        owners = torch.full_like(ids, -1)
        owners[places] = torch.repeat_interleave(torch.tensor(counts, dtype=torch.long)).to(ids.device)
        return owners

    def _reached(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        self._catching = True
        try:
            self._inner(**call, use_cache=False)
        except _Reached as reached:
            return reached.call
        finally:
            self._catching = False
        raise ServeError("internal", "The model did not call its decoder.", given=type(self._inner).__name__)

    def _catch(self, module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> None:
        if self._catching:
            raise _Reached(call)

    @property
    def _device(self) -> torch.device:
        return self._host.model.get_input_embeddings().weight.device  # type: ignore[operator,no-any-return]

    @property
    def _dtype(self) -> torch.dtype:
        return self._host.model.get_input_embeddings().weight.dtype  # type: ignore[operator,no-any-return]


def sequence(host: Host) -> Site:
    """The site of what the base's decoder attends to. Raises ServeError where there is none."""
    found = [site for site in host.sites if site.kind is Kind.SEQUENCE]
    if len(found) != 1:
        raise ServeError("invalid", "This base has no decoder of text that could be served.", given=host.anatomy.name)
    return found[0]


def inner(host: Host) -> Any:
    """The base without its head. Raises ServeError for a model of another form."""
    found: Any = getattr(host.model, "model", None)
    if not hasattr(found, "get_image_features"):
        raise ServeError(
            "invalid",
            "This base is not a vision-language model of the form that can be served.",
            given=type(host.model).__name__,
        )
    return found


def decoder(host: Host, site: Site) -> Any:
    """The module with the decoder's layers."""
    module: Any = host.model.get_submodule(site.module)
    found: Any = module.get_decoder() if hasattr(module, "get_decoder") else module
    return found


def _read(call: Mapping[str, Any], owners: Tensor, first: int) -> Read:
    unknown = {n for n, v in call.items() if isinstance(v, Tensor | list | tuple | dict) and n not in _KNOWN}
    if unknown or call.get("inputs_embeds") is None:
        raise ServeError(
            "invalid", "The decoder is given something that can not be served.", given=", ".join(sorted(unknown))
        )
    embeds, positions = call["inputs_embeds"][0], call.get("position_ids")
    if positions is None:
        positions = torch.arange(len(embeds), device=embeds.device) + first
    positions = positions.reshape(-1, len(embeds))
    deep = call.get("deepstack_visual_embeds")
    return Read(
        embeds=embeds,
        positions=positions,
        next=int(positions.max()) + 1,
        pictures=owners,
        shape=_shape(call.get("attention_mask")),
        deep=None if deep is None else torch.stack(list(deep)),
    )


def _shape(mask: Any) -> dict[str, Tensor] | None:
    """The masks of a row in which a token may see later ones; None where none does."""
    masks = mask if isinstance(mask, Mapping) else {"": mask}
    made = {kind: one for kind, one in masks.items() if isinstance(one, Tensor) and one.ndim == 4}
    seen = {kind: one if one.dtype == torch.bool else one >= 0 for kind, one in made.items()}
    if not any(bool(one.triu(1).any()) for one in seen.values()):
        return None
    return seen


def _joined(parts: Sequence[Mapping[str, Any]]) -> BaseModelOutputWithPooling:
    """What the model would have made of all pictures at once."""
    whole = BaseModelOutputWithPooling(pooler_output=_end_to_end([part["pooler_output"] for part in parts]))
    if _BY_LAYER in parts[0]:
        layers = zip(*(part[_BY_LAYER] for part in parts), strict=True)
        deep: Any = [_end_to_end(list(layer)) for layer in layers]
        whole[_BY_LAYER] = deep
        setattr(whole, _BY_LAYER, deep)
    return whole


def _end_to_end(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return [tensor for value in values for tensor in value]


def _tokens(pooled: Any) -> int:
    if isinstance(pooled, Tensor):
        return pooled.numel() // pooled.shape[-1]
    return sum(map(_tokens, pooled))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    held = value.values() if isinstance(value, Mapping) else value
    return sum(map(_bytes, held))
