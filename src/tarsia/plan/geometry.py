"""Shapes of known models as a table, and what follows from them by counting: numbers, bytes, nothing loaded.

Every count is a formula over a row of ``MODELS``; bytes are whole numbers. The rehearsal of a plan does not use these:
they are for sums that a reader can follow by hand, and are held to real models in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}
)
"""Bytes a number, by torch's name of the type."""
BLOCK: Final = 64
NESTED_BLOCK: Final = 256
"""Numbers to a scale, and scales to a nested scale (arXiv:2305.14314, section 3)."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder of LLaMA's form: RMS norms, rotary positions, a gated MLP; ``bias`` is that of q, k and v.

    Embedding and head are two tensors. The width of a head is ``hidden / heads``.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    bias: bool = False

    @property
    def head(self) -> int:
        """Numbers of one head."""
        return self.hidden // self.heads

    @property
    def kv(self) -> int:
        """Numbers of a token's keys, or of its values."""
        return self.kv_heads * self.head

    @property
    def weights(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block, by role."""
        h, i, kv = self.hidden, self.intermediate, self.kv
        return {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (i, h), "up": (i, h), "down": (h, i)}

    @property
    def linear(self) -> int:
        """Numbers of the weights of all blocks' linear layers: what QLoRA holds in 4 bits."""
        return self.layers * sum(out * into for out, into in self.weights.values())

    @property
    def ends(self) -> int:
        """Numbers of embedding and head."""
        return 2 * self.vocabulary * self.hidden

    @property
    def small(self) -> int:
        """Numbers of norms and biases."""
        bias = self.hidden + 2 * self.kv if self.bias else 0
        return self.layers * (2 * self.hidden + bias) + self.hidden

    @property
    def parameters(self) -> int:
        """All numbers."""
        return self.linear + self.ends + self.small


@dataclass(frozen=True, slots=True)
class Tower:
    """Qwen2.5-VL's vision tower with its merger: windows of ``merge`` x ``merge`` patches go to the decoder."""

    hidden: int
    layers: int
    intermediate: int
    out: int
    patch: int = 14
    frames: int = 2
    merge: int = 2

    @property
    def parameters(self) -> int:
        """All numbers: patches, blocks (every linear layer with a bias), merger."""
        h, i, wide = self.hidden, self.intermediate, self.hidden * self.merge**2
        block = 2 * h + _linear(3 * h, h) + _linear(h, h) + 2 * _linear(i, h) + _linear(h, i)
        return (
            3 * self.frames * self.patch**2 * h
            + self.layers * block
            + h
            + _linear(wide, wide)
            + _linear(self.out, wide)
        )


def _linear(out: int, into: int) -> int:
    return out * into + out


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model's decoder and, where it sees, its tower; ``source`` says where the numbers stand."""

    decoder: Decoder
    source: str
    tower: Tower | None = None

    @property
    def parameters(self) -> int:
        """All numbers of the model."""
        return self.decoder.parameters + (self.tower.parameters if self.tower else 0)


_LLAMA = "arXiv:2302.13971, table 2, and the published configuration"
_LLAMA_2 = "arXiv:2307.09288, section 2.2, and the published configuration"
_QWEN = "arXiv:2412.15115 and the published configuration"
_QWEN_VL = "arXiv:2502.13923, table 1, and the published configuration"
MODELS: Final[Mapping[str, Geometry]] = MappingProxyType(
    {
        "LLaMA-2-7B": Geometry(Decoder(4096, 32, 32, 32, 11008, 32000), _LLAMA_2),
        "LLaMA-2-13B": Geometry(Decoder(5120, 40, 40, 40, 13824, 32000), _LLAMA_2),
        "LLaMA-2-70B": Geometry(Decoder(8192, 80, 64, 8, 28672, 32000), _LLAMA_2),
        "LLaMA-65B": Geometry(Decoder(8192, 80, 64, 64, 22016, 32000), _LLAMA),
        "Qwen2.5-14B": Geometry(Decoder(5120, 48, 40, 8, 13824, 152064, bias=True), _QWEN),
        "Qwen2.5-VL-7B": Geometry(
            Decoder(3584, 28, 28, 4, 18944, 152064, bias=True), _QWEN_VL, Tower(1280, 32, 3420, 3584)
        ),
        "Qwen2.5-VL-72B": Geometry(
            Decoder(8192, 80, 64, 8, 29568, 152064, bias=True), _QWEN_VL, Tower(1280, 32, 3456, 8192)
        ),
    }
)


def lora(decoder: Decoder, rank: int) -> int:
    """Numbers of LoRAs of ``rank`` over every linear layer of the blocks: r (out + in) each (arXiv:2106.09685)."""
    return decoder.layers * rank * sum(out + into for out, into in decoder.weights.values())


def codes(numbers: int) -> int:
    """Bytes of the 4-bit codes of one weight: two a byte."""
    return -(-numbers // 2)


def constants(numbers: int, nested: bool) -> int:
    """Bytes of the scales of one weight (arXiv:2305.14314, section 3).

    float32 for each 64 numbers; nested, one byte for each 64, a float32 for each 256 of those, and their mean.
    """
    blocks = -(-numbers // BLOCK)
    return blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if nested else 4 * blocks


def quantised(decoder: Decoder, nested: bool) -> tuple[int, int]:
    """Bytes of the codes and of the scales of all blocks' linear layers."""
    sizes = [out * into for out, into in decoder.weights.values()]
    return decoder.layers * sum(map(codes, sizes)), decoder.layers * sum(constants(size, nested) for size in sizes)


def cache(decoder: Decoder, tokens: int, width: int = 2) -> int:
    """Bytes of the keys and values of ``tokens``, ``width`` bytes a number."""
    return 2 * decoder.layers * decoder.kv * tokens * width


def block(decoder: Decoder, tokens: int, width: int, full: bool) -> int:
    """Bytes that one block keeps from its forward pass for the backward pass.

    A token keeps, ``width`` bytes a number: the two norms' outputs, queries and attention's output [hidden] each,
    keys and values, and four of the MLP's [intermediate]; in float32 the two norms' inputs [hidden] and deviations, and
    a number a head of attention that does not keep its square. Trained norms (``full``) keep what they scale, too.
    Transformers' LLaMA under scaled_dot_product_attention; LoRA keeps nothing beside its layer's input.
    """
    each = width * (4 * decoder.hidden + 2 * decoder.kv + 4 * decoder.intermediate)
    norms = 2 * (4 * decoder.hidden + 4) + (2 * width * decoder.hidden if full else 0)
    return tokens * (each + norms + 4 * decoder.heads)


def top(decoder: Decoder, tokens: int, width: int, full: bool) -> int:
    """Bytes kept behind the blocks: the last norm, probabilities in float32 [vocabulary], labels (and ids)."""
    norm = 4 * decoder.hidden + 4 + (2 * width * decoder.hidden if full else 0)
    return tokens * (norm + 4 * decoder.vocabulary + 8 + (8 if full else 0))


def passing(decoder: Decoder, tokens: int, width: int) -> int:
    """Bytes of gradients on their way back through a block: three [intermediate] and three [hidden] a token."""
    return 3 * width * tokens * (decoder.hidden + decoder.intermediate)


def loss(decoder: Decoder, tokens: int, width: int, full: bool) -> int:
    """Bytes when the loss goes back: what is kept behind the blocks, and two gradients [vocabulary] in float32."""
    return top(decoder, tokens, width, full) + 8 * tokens * decoder.vocabulary


def rotary(decoder: Decoder, length: int, width: int) -> int:
    """Bytes of the tables of rotary positions, which all blocks share."""
    return 2 * length * decoder.head * width


def inside(decoder: Decoder, batch: int, length: int, width: int, *, full: bool, checkpointing: bool) -> int:
    """Bytes that all blocks keep from the forward pass for the backward pass; with ``checkpointing`` their inputs."""
    tokens = batch * length
    one = tokens * decoder.hidden * width if checkpointing else block(decoder, tokens, width, full)
    return decoder.layers * one + rotary(decoder, length, width)
