"""LLaVA-NeXT and LLaVA-OneVision (arXiv:2408.03326): pictures are cut into tiles by their size."""

from __future__ import annotations

import math

import torch

from tarsia.anatomy.llava import NEWLINE, features, llava_parts
from tarsia.anatomy.streams import ALONG, TILES, deal, placeholders, rows, sums
from tarsia.anatomy.table import Config, Counts, Family, Inputs, Part
from tarsia.anatomy.towers import side


def _parts(config: Config) -> tuple[Part, ...]:
    return (NEWLINE, *llava_parts(config, TILES))


def _grid(config: Config, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tiles into which a picture of ``size`` (height, width) is cut."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    down, right = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return int(down), int(right)


def _placeholders(config: Config, size: tuple[int, int]) -> int:
    """How many placeholders a picture takes: the whole, then the tiles without padding, a newline after each line."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    across = side(config.vision_config.image_size) // side(config.vision_config.patch_size)
    down, right = _grid(config, size)
    canvas = torch.empty(1, down * across, right * across, device="meta")
    _, height, width = unpad_image(canvas, size).shape
    if config.model_type == "llava_onevision":
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * across**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
    return features(config) + int(height * (width + 1))


def _counts(config: Config, inputs: Inputs) -> Counts:
    base = rows(inputs)
    sizes = [] if inputs.get("image_sizes") is None else inputs["image_sizes"].tolist()
    tiles = [1 + math.prod(_grid(config, size)) for size in sizes]
    taken = [_placeholders(config, size) for size in sizes]
    if config.model_type == "llava_onevision" and inputs.get("batch_num_images") is not None:
        # a row with several pictures has each of them whole, with one newline
        alone = [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]
        tiles = [n if cut else 1 for n, cut in zip(tiles, alone, strict=True)]
        taken = [n if cut else features(config) + 1 for n, cut in zip(taken, alone, strict=True)]
    return {**base, TILES: sums(deal(placeholders(config, inputs), taken), tiles)}


FAMILIES = tuple(Family(name, _parts, _counts, ALONG) for name in ("llava_next", "llava_onevision"))
