"""Mllama (Llama 3.2 Vision, arXiv:2407.21783): the text model looks at pictures by cross attention."""

from __future__ import annotations

from tarsia.anatomy.decoders import LLAMA, head
from tarsia.anatomy.streams import PICTURES, ROWS, TILES, rows
from tarsia.anatomy.table import Config, Counts, Family, Inputs, Packing, Part, rules
from tarsia.core.site import Component, Role

_LAYER = {
    "layers.#.self_attn.q_proj": Role.Q,
    "layers.#.self_attn.k_proj": Role.K,
    "layers.#.self_attn.v_proj": Role.V,
    "layers.#.self_attn.o_proj": Role.O,
    "layers.#.mlp.fc1": Role.UP,
    "layers.#.mlp.fc2": Role.DOWN,
    "layers.#.input_layernorm": Role.NORM,
    "layers.#.post_attention_layernorm": Role.NORM,
}
_GATES = {"layers.#.gate_attn": Role.SCALE, "layers.#.gate_ffn": Role.SCALE}
_EMBEDDINGS = (
    *rules({"patch_embedding": Role.PATCH}, stream=TILES),
    *rules(
        {
            "class_embedding": Role.TOKEN,
            "gated_positional_embedding.embedding": Role.POSITION,
            "gated_positional_embedding.tile_embedding": Role.POSITION,
            "pre_tile_positional_embedding.embedding": Role.POSITION,
            "post_tile_positional_embedding.embedding": Role.POSITION,
        },
        stream=None,
    ),
    *rules(
        {
            "gated_positional_embedding.gate": Role.SCALE,
            "pre_tile_positional_embedding.gate": Role.SCALE,
            "post_tile_positional_embedding.gate": Role.SCALE,
            "layernorm_pre": Role.NORM,
            "layernorm_post": Role.NORM,
        }
    ),
)
# Keys and values of the cross attention see the projected tiles, everything else of it the rows.
_CROSS = (
    *rules(
        {
            "layers.#.cross_attn.q_proj": Role.Q,
            "layers.#.cross_attn.o_proj": Role.O,
            "layers.#.cross_attn.q_norm": Role.NORM,
            "layers.#.cross_attn.k_norm": Role.NORM,
            "layers.#.cross_attn_attn_gate": Role.SCALE,
            "layers.#.cross_attn_mlp_gate": Role.SCALE,
        }
    ),
    *rules({"layers.#.cross_attn.k_proj": Role.K, "layers.#.cross_attn.v_proj": Role.V}, stream=TILES),
)


def _parts(config: Config) -> tuple[Part, ...]:
    local = config.vision_config.num_hidden_layers
    return (
        Part(Component.VISION, "vision_model", _EMBEDDINGS, PICTURES),
        Part(Component.VISION, "vision_model.transformer", rules(_LAYER), PICTURES),
        # the global layers run after the local ones and are numbered after them
        Part(Component.VISION, "vision_model.global_transformer", rules(_LAYER | _GATES), PICTURES, offset=local),
        Part(Component.PROJECTOR, "multi_modal_projector", rules({"": Role.PROJ}), ROWS),
        Part(Component.LANGUAGE, "language_model", (*LLAMA, *_CROSS), ROWS),
        head(),
    )


def _counts(config: Config, inputs: Inputs) -> Counts:
    """``pixel_values`` is [rows, most pictures, tiles, 3, height, width]; padding goes through the tower too."""
    base = rows(inputs)
    pixels = inputs.get("pixel_values")
    pictures, tiles = (0, 0) if pixels is None else (pixels.shape[1], pixels.shape[2])
    batch = len(base[ROWS])
    return {**base, PICTURES: (pictures,) * batch, TILES: (pictures * tiles,) * batch}


_ACROSS = Packing(None, "its layers attend across to the pictures of a line, not of a row")

FAMILY = Family("mllama", _parts, _counts, _ACROSS)
