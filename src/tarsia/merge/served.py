"""Which layers of which family vLLM gives LoRA to, and under which names (read from the sources of vLLM 0.33.0).

vLLM holds a tensor's name against the last part of its modules' names alone, and leaves out, without a word, what then
belongs to no module of the model: an adapter loads and does nothing. So the whole names are here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

VERSION: Final = "0.33.0"
"""The vLLM whose sources these facts are from."""

MOST_WORDS: Final = 258_048
"""Entries of a vocabulary over which a language head takes no LoRA (lora/layers/logits_processor.py)."""


@dataclass(frozen=True, slots=True)
class Region:
    """Modules of one part of a model, alike in how vLLM names them.

    Transformers calls a module one of ``own`` and an end that matches ``rest``; in the file its tensors are called
    ``written`` and that end; vLLM calls it ``module`` and that end, after its own renaming (``hf_to_vllm_mapper``).
    Modules of a ``tower`` have LoRA only with --enable-tower-connector-lora. ``decoders`` are the text models that it
    is so for (None: all).
    """

    own: tuple[str, ...]
    rest: str
    written: str
    module: str
    tower: bool = False
    decoders: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """How vLLM takes LoRA on one family: by region; or, where it does not at all, ``why``."""

    regions: tuple[Region, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Spot:
    """One module as vLLM holds it: its name in the file and in vLLM, and whether it is of a tower or connector."""

    written: str
    module: str
    tower: bool


_BLOCK: Final = r"layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
_CLIP: Final = r"encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]_proj|out_proj)|mlp\.fc[12])"
_PIXTRAL: Final = r"transformer\.layers\.\d+\.(?:attention\.[qkvo]_proj|feed_forward\.(?:gate|up|down)_proj)"
_MERGERS: Final = r"(?:merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
_HEADED: Final = frozenset({"llama", "granite", "qwen3", "qwen3_moe"})
"""Text models whose class in vLLM has lm_head among its ``embedding_modules``."""


def _language(rest: str = _BLOCK) -> Region:
    return Region(("model.language_model.",), rest, "model.language_model.", "language_model.model.")


def _visual(rest: str) -> Region:
    return Region(("model.visual.",), rest, "model.visual.", "visual.", tower=True)


_HEAD: Final = Region(("",), "lm_head", "", "language_model.", decoders=_HEADED)
# Transformers calls the tower's blocks vision_tower.encoder, vLLM keeps the wrapper that older versions had
_WRAPPED: Final = Region(
    ("model.vision_tower.", "model.vision_tower.vision_model."),
    _CLIP,
    "model.vision_tower.vision_model.",
    "vision_tower.vision_model.",
    tower=True,
)
_BARE: Final = Region(("model.vision_tower.",), _PIXTRAL, "model.vision_tower.", "vision_tower.", tower=True)
_TWO: Final = Region(
    ("model.multi_modal_projector.",),
    "linear_[12]",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
    tower=True,
)
_QWEN3: Final = _visual(rf"blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.linear_fc[12])|{_MERGERS}")
_IDEFICS3: Final = Served(
    (
        Region(("model.text_model.",), _BLOCK, "model.text_model.", "model.text_model."),
        Region(("model.vision_model.",), _CLIP, "model.vision_model.", "model.vision_model.", tower=True),
        Region(("model.connector.",), r"modality_projection\.proj", "model.connector.", "model.connector.", tower=True),
    )
)
_OPT: Final = r"decoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]_proj|out_proj)|fc[12])"
_BLIP: Final = r"encoder\.layers\.\d+\.(?:self_attn\.projection|mlp\.fc[12])"

FAMILIES: Final[Mapping[str, Served]] = {
    "llava": Served((_language(), _HEAD, _WRAPPED, _BARE, _TWO)),
    "llava_next": Served((_language(), _HEAD, _WRAPPED, _BARE, _TWO)),
    "llava_onevision": Served(why="its class there has no LoRA"),
    "qwen2_vl": Served((_language(), _visual(r"blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.fc[12])|merger\.mlp\.[02]"))),
    "qwen2_5_vl": Served(
        (_language(), _visual(r"blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.(?:gate|up|down)_proj)|merger\.mlp\.[02]"))
    ),
    "qwen3_vl": Served((_language(), _HEAD, _QWEN3)),
    "qwen3_vl_moe": Served((_language(r"layers\.\d+\.self_attn\.[qkvo]_proj"), _HEAD, _QWEN3)),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    # there the projectors of these two are a plain nn.Linear and a bare tensor, which have no LoRA
    "paligemma": Served((_language(), _WRAPPED)),
    "gemma3": Served((_language(), _WRAPPED)),
    # its class there, interns1, has no LoRA on tower and connector
    "internvl": Served((_language(),)),
    "mllama": Served(why="it was taken out of vLLM in 0.10.2"),
    # there the Q-Former and the projection are plain nn.Linear, and no layer with LoRA takes the tower's fused qkv
    "blip-2": Served(
        (
            Region(("language_model.model.",), _OPT, "language_model.model.", "language_model.model."),
            Region(("vision_model.",), _BLIP, "vision_model.", "vision_model.", tower=True),
        )
    ),
}
"""By the ``model_type`` of the base's configuration."""


def spot(config: Mapping[str, Any], path: str) -> Spot | None:
    """Where vLLM has LoRA for the module that Transformers calls ``path``; None where it has none.

    ``config`` is the base's config.json.
    """
    for region in _regions(config):
        for own in region.own:
            rest = path.removeprefix(own)
            if path.startswith(own) and re.fullmatch(region.rest, rest):
                return Spot(region.written + rest, region.module + rest, region.tower)
    return None


def spot_of(config: Mapping[str, Any], name: str) -> Spot | None:
    """The same for the module that a file calls ``name``: None where vLLM would leave it out."""
    for region in _regions(config):
        rest = name.removeprefix(region.written)
        if name.startswith(region.written) and re.fullmatch(region.rest, rest):
            return Spot(name, region.module + rest, region.tower)
    return None


def _regions(config: Mapping[str, Any]) -> Iterator[Region]:
    text = config.get("text_config") or {}
    for region in FAMILIES.get(str(config.get("model_type")), Served()).regions:
        few = int(text.get("vocab_size") or 0) <= MOST_WORDS
        if region.decoders is None or (text.get("model_type") in region.decoders and few):
            yield region
