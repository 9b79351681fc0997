"""A tiny random model, and batches for it, of each family that Tarsia knows.

Every model is built from its family's own configuration class, in float32, with parameters drawn
anew so that no activation is degenerate (gates that start at zero are not zero here). Batches are
what a processor would give, made without one: placeholders, right padding, pictures, grids, sizes.

    model, config = FAMILIES["llava"].build(seed=0, vision_feature_layer=-1)
    inputs = FAMILIES["llava"].batch((0, 1, 3), seed=0)     # three rows with 0, 1 and 3 pictures
    logits = model(**inputs).logits

``FAMILIES`` has one entry a family. ``VARIANTS`` has the same families with other towers or text models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

PAD, BOS, EOS, START, END, FIRST_WORD, VIDEO, IMAGE, VOCABULARY = 0, 1, 2, 3, 4, 8, 94, 95, 96
SIDE, CELL = 16, 4  # a square picture of SIDE pixels has (SIDE / CELL) ** 2 = 16 patches

# What a family's pictures look like: ids that a picture takes in a row (START and END included), and pixel inputs.
Pictures = Callable[[PretrainedConfig, Sequence[int], torch.Generator], tuple[list[list[int]], dict[str, Tensor]]]


@dataclass(frozen=True)
class Family:
    """How to build one family, tiny. ``min_pictures`` and ``max_pictures`` hold for a row."""

    name: str
    config_class: str
    model_class: str
    options: Mapping[str, Any]
    pictures: Pictures
    min_pictures: int = 0
    max_pictures: int | None = None
    text_only: bool = True  # whether a batch without any picture runs at all
    types: str | None = None  # the input that marks placeholders with 1

    def config(self, **overrides: Any) -> PretrainedConfig:
        """The configuration; nested ``overrides`` are merged into the tiny defaults."""
        return getattr(transformers, self.config_class)(**_merged(self.options, overrides))

    def build(self, seed: int = 0, **overrides: Any) -> tuple[PreTrainedModel, PretrainedConfig]:
        """A model in eval mode, float32, and its configuration."""
        config = self.config(**overrides)
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.15 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
        return model.eval(), config

    def batch(
        self, pictures: Sequence[int] = (0, 1, 3), seed: int = 0, config: PretrainedConfig | None = None
    ) -> dict[str, Tensor]:
        """Inputs of one row for each number of pictures in ``pictures``, padded on the right.

        ``config`` is needed where a model was built with overrides that change how many ids a picture takes.
        """
        assert all(self.min_pictures <= n <= (self.max_pictures or n) for n in pictures), self
        config = config or self.config()
        generator = torch.Generator().manual_seed(seed)
        spans, pixels = self.pictures(config, pictures, generator)
        rows, start = [], 0
        for row, count in enumerate(pictures):
            ids = [BOS, *_words(2 + row, generator)]
            for span in spans[start : start + count]:
                ids += [*span, *_words(1, generator)]
            rows.append([*ids, *_words(4 - row % 3, generator), EOS])
            start += count
        length = max(map(len, rows))
        input_ids = torch.tensor([[*row, *[PAD] * (length - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        inputs = {"input_ids": input_ids, "attention_mask": mask, **pixels}
        if self.types:
            inputs[self.types] = (input_ids == IMAGE).long()
        if "cross_attention_mask" in inputs:
            inputs["cross_attention_mask"] = _seen(input_ids, pictures, inputs["cross_attention_mask"])
        return inputs


def _merged(options: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(deepcopy(options))
    for key, value in overrides.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(value, Mapping) and isinstance(known, Mapping) else value
    return merged


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, VIDEO, (count,), generator=generator).tolist()


def _pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, 3, SIDE, SIDE, generator=generator)


def _flat(tokens: Callable[[PretrainedConfig], int]) -> Pictures:
    """Pictures in one flat batch [pictures, 3, SIDE, SIDE], each of as many placeholders."""

    def make(
        config: PretrainedConfig, pictures: Sequence[int], generator: torch.Generator
    ) -> tuple[list[list[int]], dict[str, Tensor]]:
        total = sum(pictures)
        spans = [[START, *[IMAGE] * tokens(config), END]] * total
        return spans, {"pixel_values": _pixels(generator, total)} if total else {}

    return make


def _patches(config: PretrainedConfig) -> int:
    return (SIDE // CELL) ** 2


_CROPS = ((16, 16), (8, 16), (12, 8))  # of pictures in their own size, padded to SIDE x SIDE


def _native(
    config: PretrainedConfig, pictures: Sequence[int], generator: torch.Generator
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Pictures in their own sizes, [pictures, 3, SIDE, SIDE] with zeros around (Pixtral)."""
    if not sum(pictures):
        return [], {}
    sizes = [_CROPS[i % len(_CROPS)] for i in range(sum(pictures))]
    pixels = torch.zeros(len(sizes), 3, SIDE, SIDE)
    for picture, (height, width) in zip(pixels, sizes, strict=True):
        picture[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    spans = [[START, *[IMAGE] * (height // CELL * (width // CELL)), END] for height, width in sizes]
    return spans, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


_SIZES = ((16, 32), (32, 16), (24, 32), (32, 32))  # of original pictures: height, width


def _anyres(
    config: PretrainedConfig, pictures: Sequence[int], generator: torch.Generator
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Pictures cut into tiles: [pictures, most tiles, 3, SIDE, SIDE], zeros where a picture has fewer."""
    from transformers.models.llava_next import modeling_llava_next as llava_next

    if not sum(pictures):
        return [], {}
    one = config.model_type == "llava_onevision"  # where a row with several pictures has each as one tile
    sizes, spans, tiles = [], [], []
    for count in pictures:
        for _ in range(count):
            size = _SIZES[len(sizes) % len(_SIZES)]
            sizes.append(size)
            if one and count > 1:
                tiles.append(1)
                spans.append([IMAGE] * (_patches(config) + 1))
                continue
            rows, columns = llava_next.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, SIDE)
            grid = torch.zeros(1, rows * SIDE // CELL, columns * SIDE // CELL)
            _, height, width = llava_next.unpad_image(grid, size).shape
            tiles.append(1 + rows * columns)
            spans.append([IMAGE] * (_patches(config) + height * (width + 1)))
    pixels = torch.zeros(len(sizes), max(tiles), 3, SIDE, SIDE)
    for picture, count in zip(pixels, tiles, strict=True):
        picture[:count] = _pixels(generator, count)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    if one:
        inputs["batch_num_images"] = torch.tensor(pictures)
    return [[START, *span, END] for span in spans], inputs


_GRIDS = ((1, 4, 4), (1, 2, 4), (1, 6, 2))  # patches of a picture: time, height, width


def _grids(
    config: PretrainedConfig, pictures: Sequence[int], generator: torch.Generator
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Patches of all pictures in one sequence [patches, 3 * 2 * CELL * CELL], with a grid for each picture."""
    if not sum(pictures):
        return [], {}
    grids = [_GRIDS[i % len(_GRIDS)] for i in range(sum(pictures))]
    sizes = [time * height * width for time, height, width in grids]
    spans = [[START, *[IMAGE] * (size // config.vision_config.spatial_merge_size**2), END] for size in sizes]
    patches = torch.randn(sum(sizes), 3 * config.vision_config.temporal_patch_size * CELL**2, generator=generator)
    return spans, {"pixel_values": patches, "image_grid_thw": torch.tensor(grids)}


def _padded(
    config: PretrainedConfig, pictures: Sequence[int], generator: torch.Generator
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Pictures by row [rows, most pictures, 3, SIDE, SIDE], zeros where a row has fewer."""
    spans = [[START, *[IMAGE] * (_patches(config) // config.scale_factor**2), END]] * sum(pictures)
    if not spans:
        return spans, {}
    pixels = torch.zeros(len(pictures), max(pictures), 3, SIDE, SIDE)
    mask = torch.zeros(len(pictures), max(pictures), SIDE, SIDE, dtype=torch.int64)
    for row, count in enumerate(pictures):
        pixels[row, :count] = _pixels(generator, count)
        mask[row, :count] = 1
    return spans, {"pixel_values": pixels, "pixel_attention_mask": mask}


def _crossed(
    config: PretrainedConfig, pictures: Sequence[int], generator: torch.Generator
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Mllama: [rows, most pictures, tiles, 3, SIDE, SIDE] with aspect ratios; one placeholder for each picture."""
    most, tiles = max(pictures), config.vision_config.max_num_tiles
    if not most:
        return [], {}
    ratios = config.vision_config.supported_aspect_ratios
    pixels = torch.zeros(len(pictures), most, tiles, 3, SIDE, SIDE)
    ids = torch.zeros(len(pictures), most, dtype=torch.int64)
    mask = torch.zeros(len(pictures), most, tiles, dtype=torch.int64)
    mask[:, :, 0] = 1  # as the processor does, a padding picture has one tile too
    for row, count in enumerate(pictures):
        for picture in range(count):
            ratio = (row + picture) % len(ratios)
            used = ratios[ratio][0] * ratios[ratio][1]
            ids[row, picture] = ratio + 1
            mask[row, picture, :used] = 1
            pixels[row, picture, :used] = _pixels(generator, used)
    inputs = {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}
    return [[IMAGE]] * sum(pictures), {**inputs, "cross_attention_mask": mask}


def _seen(ids: Tensor, pictures: Sequence[int], tiles: Tensor) -> Tensor:
    """Which tiles each token sees, [rows, length, pictures, tiles]: those of the pictures before it."""
    before = (ids == IMAGE).cumsum(1)  # [rows, length]
    order = torch.arange(tiles.shape[1])
    real = order < torch.tensor(pictures)[:, None]  # [rows, pictures]
    seen = (before[..., None] > order) & real[:, None] & (ids != PAD)[..., None]
    return seen[..., None].long() * tiles[:, None]


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": CELL,
}
_LLAMA = {"model_type": "llama", **_TEXT}
_QWEN2 = {"model_type": "qwen2", **_TEXT}
_MISTRAL = {"model_type": "mistral", **_TEXT}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **_VISION}
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION}
_SIGLIP_HEAD = {**_SIGLIP, "vision_use_head": True}
_IDS = {"image_token_index": IMAGE}
_PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_VISION = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": CELL,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "out_hidden_size": 32,
}
_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_QWEN_TEXT = {**_TEXT, "rope_parameters": _MROPE}
_QWEN3_TEXT = {**_QWEN_TEXT, "head_dim": 8, "rope_parameters": {**_MROPE, "mrope_interleaved": True}}
_QWEN3_VISION = {**_QWEN_VISION, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "decoder_sparse_step": 1}
_GEMMA = {**_TEXT, "head_dim": 8}
_GEMMA3 = {**_GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 16, "sliding_window_pattern": 2}
_RATIOS = [[1, 1], [1, 2], [2, 1]]

_DEFINED = (
    Family(
        "llava",
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"vision_config": _CLIP, "text_config": _LLAMA, "image_seq_length": 16, **_IDS},
        _flat(lambda config: config.image_seq_length),
    ),
    Family(
        "llava_next",
        "LlavaNextConfig",
        "LlavaNextForConditionalGeneration",
        {"vision_config": _CLIP, "text_config": _MISTRAL, "image_seq_length": 16, **_IDS, **_PINPOINTS},
        _anyres,
    ),
    Family(
        "llava_onevision",
        "LlavaOnevisionConfig",
        "LlavaOnevisionForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": _QWEN2, "video_token_index": VIDEO, **_IDS, **_PINPOINTS},
        _anyres,
    ),
    Family(
        "qwen2_vl",
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": {**_QWEN_VISION, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2},
            "text_config": _QWEN_TEXT,
            **_QWEN_IDS,
        },
        _grids,
        types="mm_token_type_ids",
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            "text_config": _QWEN_TEXT,
            **_QWEN_IDS,
        },
        _grids,
        types="mm_token_type_ids",
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {"vision_config": _QWEN3_VISION, "text_config": _QWEN3_TEXT, **_QWEN_IDS},
        _grids,
        types="mm_token_type_ids",
    ),
    Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        {"vision_config": _QWEN3_VISION, "text_config": {**_QWEN3_TEXT, **_MOE}, **_QWEN_IDS},
        _grids,
        types="mm_token_type_ids",
    ),
    Family(
        "idefics3",
        "Idefics3Config",
        "Idefics3ForConditionalGeneration",
        {"vision_config": _VISION, "text_config": _LLAMA, "image_token_id": IMAGE, "scale_factor": 2},
        _padded,
    ),
    Family(
        "smolvlm",
        "SmolVLMConfig",
        "SmolVLMForConditionalGeneration",
        {"vision_config": _VISION, "text_config": _LLAMA, "image_token_id": IMAGE, "scale_factor": 2},
        _padded,
    ),
    Family(
        "paligemma",
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": {"model_type": "gemma", **_GEMMA}, "projection_dim": 32, **_IDS},
        _flat(_patches),
        types="token_type_ids",
    ),
    Family(
        "gemma3",
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": _GEMMA3, "mm_tokens_per_image": 4, **_IDS},
        _flat(lambda config: config.mm_tokens_per_image),
        types="token_type_ids",
    ),
    Family(
        "internvl",
        "InternVLConfig",
        "InternVLForConditionalGeneration",
        {
            "vision_config": {**_VISION, "image_size": [SIDE, SIDE], "patch_size": [CELL, CELL]},
            "text_config": _QWEN2,
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        _flat(lambda config: config.image_seq_length),
    ),
    Family(
        "mllama",
        "MllamaConfig",
        "MllamaForConditionalGeneration",
        {
            "vision_config": {
                **{k: v for k, v in _VISION.items() if k != "num_attention_heads"},
                "attention_heads": 4,
                "num_global_layers": 2,
                "max_num_tiles": 2,
                "vision_output_dim": 72,
                "intermediate_layers_indices": [0, 2],
                "supported_aspect_ratios": _RATIOS,
            },
            "text_config": {
                **_TEXT,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "image_token_index": IMAGE,
        },
        _crossed,
    ),
    Family(
        "blip_2",
        "Blip2Config",
        "Blip2ForConditionalGeneration",
        {
            "vision_config": _VISION,
            "qformer_config": {
                "vocab_size": VOCABULARY,
                "hidden_size": 28,
                "intermediate_size": 40,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "cross_attention_frequency": 2,
            },
            "text_config": {
                "model_type": "opt",
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "ffn_dim": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "max_position_embeddings": 512,
                "word_embed_proj_dim": 32,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
            },
            "num_query_tokens": 5,
            "image_token_index": IMAGE,
        },
        _flat(lambda config: config.num_query_tokens),
        text_only=False,
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _DEFINED}


def _variant(family: str, name: str, **overrides: Any) -> Family:
    base = FAMILIES[family]
    return replace(base, name=name, options={**base.options, **overrides})


VARIANTS: dict[str, Family] = {
    family.name: family
    for family in (
        _variant(
            "llava",
            "llava-siglip-qwen2",
            vision_config=_SIGLIP_HEAD,
            text_config=_QWEN2,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        _variant("llava_next", "llava_next-llama", text_config=_LLAMA),
        _variant("paligemma", "paligemma2", text_config={"model_type": "gemma2", **_GEMMA}),
        _variant("gemma3", "gemma3-head", vision_config=_SIGLIP_HEAD),
        _variant("internvl", "internvl-llama", text_config=_LLAMA),
        _variant(
            "internvl",
            "internvl-normed",
            text_config={"model_type": "qwen3", **_GEMMA},
            vision_config={
                **_VISION,
                "attention_bias": True,
                "use_qk_norm": True,
                "use_mask_token": True,
                "use_mean_pooling": False,
            },
        ),
        replace(
            _variant(
                "llava",
                "llava-pixtral",
                text_config=_MISTRAL,
                vision_feature_select_strategy="full",
                vision_feature_layer=-1,
                vision_config={**_VISION, "model_type": "pixtral", "head_dim": 6},
            ),
            pictures=_native,
        ),
        *(
            _variant("llava", f"llava-{name}", text_config={"model_type": name, **text})
            for name, text in {
                "gemma": _GEMMA,
                "gemma2": _GEMMA,
                "gemma3_text": _GEMMA3,
                "granite": _TEXT,
                "phi3": _TEXT,
                "qwen3": _GEMMA,
                "qwen3_moe": {**_GEMMA, **_MOE},
            }.items()
        ),
    )
}
