"""Checkpoints of random weights, family by family, as a hub has them: safetensors, config, tokenizer, processor.

The processors are those of Transformers. Those that take films too load a processor of films, which needs
torchvision; here they are registered once more without one (``speak``), so a process that opens a world has to call
it first. Weights are written in bfloat16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.grid.words import CONTROLS, TEMPLATE, tokenizer

RESOLUTIONS: Final = (112, 224, 336)
"""Sides of a picture in pixels. Where a tower sees one size alone it is of ``TOWERS``'s size instead."""
TOWERS: Final[Mapping[int, int]] = {112: 112, 224: 168, 336: 224}
TILE: Final = 112
"""The side of a tile, where pictures are cut into tiles."""

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    """A model by its sizes; the same values give the same files.

    ``heads`` and ``key_values`` are of the language model's attention, ``resolution`` one of RESOLUTIONS.
    """

    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_values: int
    tower_hidden: int
    tower_layers: int
    tower_heads: int
    resolution: int
    tied: bool

    @property
    def side(self) -> int:
        """The side in pixels of what the tower sees at once."""
        return TOWERS[self.resolution] if FAMILIES[self.family].fixed else TILE

    @property
    def cells(self) -> int:
        """Patches along that side."""
        return self.side // FAMILIES[self.family].patch


@dataclass(frozen=True, slots=True)
class Family:
    """How a family's configuration and processor are made. ``fixed``: pictures become squares of the tower's size.

    ``marks`` are its tokens for pictures, ``named`` which attributes of the tokenizer they are, ``marker`` the one
    that a template writes. ``still`` is the processor's class where it is to be loaded without films.
    """

    config_class: str
    config: Callable[[World, Mapping[str, int]], Config]
    processor: Callable[[World, Any], Any]
    marks: tuple[str, ...]
    marker: str
    named: Mapping[str, str]
    fixed: bool = False
    patch: int = 14
    bos: bool = True
    still: str | None = None


def speak() -> None:
    """Make Transformers know the processors without films, in this process."""
    from transformers import AutoProcessor, PretrainedConfig

    for name in sorted({family.still for family in FAMILIES.values() if family.still}):
        key = type(f"Still{name}Config", (PretrainedConfig,), {"model_type": f"still_{name.lower()}"})
        AutoProcessor.register(key, still(name), exist_ok=True)


def still(name: str) -> Any:
    """The processor class ``name`` of Transformers that neither takes nor loads a processor of films."""
    if name not in _STILL:
        import transformers

        base: Any = getattr(transformers, name)

        class Still(base):  # type: ignore[misc]
            @classmethod
            def get_attributes(cls) -> list[str]:
                return [name for name in super().get_attributes() if name != "video_processor"]

        Still.__name__ = Still.__qualname__ = f"Still{name}"
        _STILL[name] = Still
    return _STILL[name]


_STILL: dict[str, Any] = {}


def build(world: World, folder: Path, seed: int = 0) -> None:
    """Write the world into ``folder``; parameters that begin at zero get noise, so that nothing is shut off."""
    import torch
    import transformers

    family = FAMILIES[world.family]
    words = tokenizer(world.vocabulary, family.marks, family.named, family.bos)
    ids = {mark: words.convert_tokens_to_ids(mark) for mark in (*CONTROLS, *family.marks)}
    config = getattr(transformers, family.config_class)(**family.config(world, ids))
    processor = family.processor(world, words)
    processor.chat_template = TEMPLATE.replace("MARK", family.marker)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _text(world: World, ids: Mapping[str, int], kind: str | None, **more: Any) -> dict[str, Any]:
    values = {
        "vocab_size": world.vocabulary,
        "hidden_size": world.hidden,
        "intermediate_size": world.intermediate,
        "num_hidden_layers": world.layers,
        "num_attention_heads": world.heads,
        "num_key_value_heads": world.key_values,
        "max_position_embeddings": 8192,
        "pad_token_id": ids["<pad>"],
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": world.tied,
    }
    return values | ({} if kind is None else {"model_type": kind}) | more


def _tower(world: World, kind: str | None, **more: Any) -> dict[str, Any]:
    values = {
        "hidden_size": world.tower_hidden,
        "intermediate_size": 4 * world.tower_hidden,
        "num_hidden_layers": world.tower_layers,
        "num_attention_heads": world.tower_heads,
        "image_size": world.side,
        "patch_size": FAMILIES[world.family].patch,
    }
    return values | ({} if kind is None else {"model_type": kind}) | more


def _pictures(module: str, name: str, **options: Any) -> Any:
    """A processor of pictures that needs no torchvision."""
    place = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(place, name)(**options)


def _clip(world: World, **more: Any) -> dict[str, Any]:
    side = world.side
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, **more}


def _square(world: World, **more: Any) -> dict[str, Any]:
    return {"size": {"height": world.side, "width": world.side}, **more}


_PINPOINTS: Final = [[a * TILE, b * TILE] for a, b in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


def _llava(world: World, ids: Mapping[str, int]) -> Config:
    return {
        "vision_config": _tower(world, "clip_vision_model", projection_dim=64),
        "text_config": _text(world, ids, "llama"),
        "image_token_index": ids["<image>"],
        "image_seq_length": world.cells**2,
        "tie_word_embeddings": world.tied,
    }


def _llava_processor(world: World, words: Any) -> Any:
    from transformers import LlavaProcessor

    return LlavaProcessor(
        _pictures("clip", "CLIPImageProcessorPil", **_clip(world)),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next(world: World, ids: Mapping[str, int]) -> Config:
    text = {"text_config": _text(world, ids, "mistral", sliding_window=None)}
    return {**_llava(world, ids), **text, "image_grid_pinpoints": _PINPOINTS}


def _llava_next_processor(world: World, words: Any) -> Any:
    from transformers import LlavaNextProcessor

    pictures = _clip(world, image_grid_pinpoints=_PINPOINTS)
    return LlavaNextProcessor(
        _pictures("llava_next", "LlavaNextImageProcessorPil", **pictures),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _onevision(world: World, ids: Mapping[str, int]) -> Config:
    return {
        "vision_config": _tower(world, "siglip_vision_model", vision_use_head=False),
        "text_config": _text(world, ids, "qwen2"),
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
        "image_grid_pinpoints": _PINPOINTS,
        "tie_word_embeddings": world.tied,
    }


def _onevision_processor(world: World, words: Any) -> Any:
    pictures = _square(world, image_grid_pinpoints=_PINPOINTS)
    return still("LlavaOnevisionProcessor")(
        _pictures("llava_onevision", "LlavaOnevisionImageProcessorPil", **pictures),
        words,
        num_image_tokens=world.cells**2,
        vision_feature_select_strategy="full",
    )


def _idefics(world: World, ids: Mapping[str, int]) -> Config:
    return {
        "vision_config": _tower(world, None),
        "text_config": _text(world, ids, "llama"),
        "image_token_id": ids["<image>"],
        "scale_factor": 2,
        "tie_word_embeddings": world.tied,
    }


def _idefics_processor(world: World, words: Any) -> Any:
    from transformers import Idefics3Processor

    edges = {"size": {"longest_edge": world.resolution}, "max_image_size": {"longest_edge": world.side}}
    pictures = _pictures("idefics3", "Idefics3ImageProcessorPil", **edges)
    return Idefics3Processor(pictures, words, image_seq_len=world.cells**2 // 4)


def _rotary(world: World, **more: Any) -> dict[str, Any]:
    """Half a head's numbers turn by three axes: time, height, width."""
    half = world.hidden // world.heads // 2
    side = 3 * half // 8
    return {"rope_type": "default", "mrope_section": [half - 2 * side, side, side], "rope_theta": 1e6, **more}


def _qwen(world: World, ids: Mapping[str, int], tower: Mapping[str, Any], text: Mapping[str, Any]) -> Config:
    shape = {"depth": world.tower_layers, "num_heads": world.tower_heads, "patch_size": FAMILIES[world.family].patch}
    return {
        "vision_config": {**shape, "spatial_merge_size": 2, "temporal_patch_size": 2, **tower},
        "text_config": _text(world, ids, None, **text),
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": world.tied,
    }


def _qwen2(world: World, ids: Mapping[str, int]) -> Config:
    tower = {"embed_dim": world.tower_hidden, "hidden_size": world.hidden, "mlp_ratio": 4}
    return _qwen(world, ids, tower, {"rope_parameters": _rotary(world)})


def _qwen25(world: World, ids: Mapping[str, int]) -> Config:
    tower = {
        "hidden_size": world.tower_hidden,
        "intermediate_size": 3 * world.tower_hidden,
        "out_hidden_size": world.hidden,
        "window_size": 112,
        "fullatt_block_indexes": [world.tower_layers - 1],
    }
    return _qwen(world, ids, tower, {"rope_parameters": _rotary(world)})


def _qwen3(world: World, ids: Mapping[str, int], **more: Any) -> Config:
    tower = {
        "hidden_size": world.tower_hidden,
        "intermediate_size": 4 * world.tower_hidden,
        "out_hidden_size": world.hidden,
        "num_position_embeddings": 576,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {"rope_parameters": _rotary(world, mrope_interleaved=True)}
    return _qwen(world, ids, tower, {"head_dim": world.hidden // world.heads, **rope, **more})


def _qwen3_moe(world: World, ids: Mapping[str, int]) -> Config:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return _qwen3(world, ids, moe_intermediate_size=world.intermediate // 4, **experts)


def _qwen_processor(name: str) -> Callable[[World, Any], Any]:
    def made(world: World, words: Any) -> Any:
        limits = {"min_pixels": 56**2, "max_pixels": 448**2, "patch_size": FAMILIES[world.family].patch}
        return still(name)(_pictures("qwen2_vl", "Qwen2VLImageProcessorPil", **limits), words)

    return made


def _gemma(world: World, ids: Mapping[str, int]) -> Config:
    wide = world.hidden // world.heads * 2
    head = {"head_dim": wide, "query_pre_attn_scalar": wide, "sliding_window": 64, "sliding_window_pattern": 3}
    return {
        "vision_config": _tower(world, "siglip_vision_model", vision_use_head=False),
        "text_config": _text(world, ids, None, **head),
        "mm_tokens_per_image": (world.cells // 2) ** 2,
        "image_token_index": ids["<image_soft_token>"],
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "tie_word_embeddings": world.tied,
    }


def _gemma_processor(world: World, words: Any) -> Any:
    from transformers import Gemma3Processor

    pictures = _pictures("gemma3", "Gemma3ImageProcessorPil", **_square(world))
    return Gemma3Processor(pictures, words, image_seq_length=(world.cells // 2) ** 2)


def _internvl(world: World, ids: Mapping[str, int]) -> Config:
    tower = _tower(world, None, image_size=[world.side, world.side], patch_size=[14, 14])
    return {
        "vision_config": tower,
        "text_config": _text(world, ids, "qwen2"),
        "image_token_id": ids["<IMG_CONTEXT>"],
        "image_seq_length": world.cells**2 // 4,
        "tie_word_embeddings": world.tied,
    }


def _internvl_processor(world: World, words: Any) -> Any:
    pictures = _square(world, crop_to_patches=True, max_patches=(world.resolution // TILE) ** 2)
    return still("InternVLProcessor")(
        _pictures("got_ocr2", "GotOcr2ImageProcessorPil", **pictures), words, image_seq_length=world.cells**2 // 4
    )


def _mllama(world: World, ids: Mapping[str, int]) -> Config:
    tower = _tower(world, None)
    heads, first = tower.pop("num_attention_heads"), [0, world.tower_layers - 1]
    ratios = [[a, b] for a in range(1, 5) for b in range(1, 5) if a * b <= 4]
    return {
        "vision_config": {
            **tower,
            "attention_heads": heads,
            "num_global_layers": 2,
            "max_num_tiles": 4,
            "vision_output_dim": world.tower_hidden * (1 + len(first)),
            "intermediate_layers_indices": first,
            "supported_aspect_ratios": ratios,
        },
        "text_config": _text(
            world,
            ids,
            None,
            cross_attention_layers=list(range(1, world.layers, 3)),
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        ),
        "image_token_index": ids["<|image|>"],
        "tie_word_embeddings": world.tied,
    }


def _mllama_processor(world: World, words: Any) -> Any:
    from transformers import MllamaProcessor

    return MllamaProcessor(_pictures("mllama", "MllamaImageProcessorPil", **_square(world, max_image_tiles=4)), words)


_QWEN_MARKS: Final = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_MARKER: Final = "<|vision_start|><|image_pad|><|vision_end|>"
_IDEFICS_MARKS: Final = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
_ONE: Final = {"image_token": "<image>"}
_SOFT: Final = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_CONTEXT: Final = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def _qwen_family(config_class: str, config: Callable[..., Config], processor: str, patch: int = 14) -> Family:
    return Family(
        config_class,
        config,
        _qwen_processor(processor),
        _QWEN_MARKS,
        _QWEN_MARKER,
        {},
        patch=patch,
        bos=False,
        still=processor,
    )


FAMILIES: Final[Mapping[str, Family]] = {
    "llava": Family("LlavaConfig", _llava, _llava_processor, ("<image>",), "<image>", _ONE, fixed=True),
    "llava_next": Family("LlavaNextConfig", _llava_next, _llava_next_processor, ("<image>",), "<image>", _ONE),
    "llava_onevision": Family(
        "LlavaOnevisionConfig",
        _onevision,
        _onevision_processor,
        ("<image>", "<video>"),
        "<image>",
        {**_ONE, "video_token": "<video>"},
        still="LlavaOnevisionProcessor",
    ),
    "idefics3": Family("Idefics3Config", _idefics, _idefics_processor, _IDEFICS_MARKS, "<image>", {}),
    "smolvlm": Family("SmolVLMConfig", _idefics, _idefics_processor, _IDEFICS_MARKS, "<image>", {}),
    "qwen2_vl": _qwen_family("Qwen2VLConfig", _qwen2, "Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen_family("Qwen2_5_VLConfig", _qwen25, "Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen_family("Qwen3VLConfig", _qwen3, "Qwen3VLProcessor", patch=16),
    "qwen3_vl_moe": _qwen_family("Qwen3VLMoeConfig", _qwen3_moe, "Qwen3VLProcessor", patch=16),
    "gemma3": Family(
        "Gemma3Config", _gemma, _gemma_processor, tuple(_SOFT.values()), "<start_of_image>", _SOFT, fixed=True
    ),
    "internvl": Family(
        "InternVLConfig",
        _internvl,
        _internvl_processor,
        tuple(_CONTEXT.values()),
        "<IMG_CONTEXT>",
        _CONTEXT,
        bos=False,
        still="InternVLProcessor",
    ),
    "mllama": Family(
        "MllamaConfig", _mllama, _mllama_processor, ("<|image|>", "<|python_tag|>"), "<|image|>", {}, bos=False
    ),
}
"""Those that can be taught by conversations; PaliGemma and BLIP-2 have no chat template."""
