"""What a sum of memory starts from: a number of parameters, types, and how a QLoRA is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Final

from tarsia.core.errors import ConfigError
from tarsia.plan.geometry import BYTES, MODELS, Decoder, Geometry

NEAR: Final = 0.1
"""A round number takes the shapes of a model whose own number is at most this share away from it."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a figure starts from: a number of parameters, types by torch's names, and how a QLoRA is trained.

    ``shapes``, for what a number alone does not say, is a name of ``MODELS`` or a model of one's own. ``master`` is the
    copy that is updated where every parameter is trained, None where there is none; ``moments`` are Adam's two.
    ``patches`` is the type of the adapters and of their gradients; they have no further copy. A step has
    ``accumulation`` passes of ``batch`` rows of ``length`` tokens; ``unpacked``: a 4-bit weight is in 16 bits while it
    is multiplied with, as no kernel of ours needs it. Raises ConfigError for a type, a name or a number that is none.
    """

    parameters: int
    shapes: str | Geometry | None = None
    weights: str = "bfloat16"
    gradients: str = "bfloat16"
    master: str | None = "float32"
    moments: str = "float32"
    rank: int = 64
    patches: str = "bfloat16"
    nested: bool = True
    batch: int = 1
    length: int = 512
    checkpointing: bool = True
    accumulation: int = 16
    unpacked: bool = True

    def __post_init__(self) -> None:
        for name in ("weights", "gradients", "master", "moments", "patches"):
            held = getattr(self, name)
            if held not in BYTES and not (name == "master" and held is None):
                raise ConfigError(f"{name} are of no type that is known.", given=repr(held), allowed=", ".join(BYTES))
        for name in ("parameters", "rank", "batch", "length", "accumulation"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number above 0.", given=repr(getattr(self, name)))
        if isinstance(self.shapes, str) and self.shapes not in MODELS:
            raise ConfigError("No model of this name is in the table.", given=self.shapes, allowed=", ".join(MODELS))

    @property
    def geometry(self) -> Geometry:
        """The model of the shapes. Raises ConfigError where there is none."""
        if self.shapes is None:
            raise ConfigError(
                "A number of parameters does not say what adapters and activations take.",
                given=f"{self.parameters:,} parameters",
                allowed=", ".join(MODELS),
                do="name a model of the table",
            )
        return MODELS[self.shapes] if isinstance(self.shapes, str) else self.shapes

    @property
    def decoder(self) -> Decoder:
        """The shapes of its decoder. Raises as ``geometry`` does."""
        return self.geometry.decoder

    def words(self, *names: str) -> Mapping[str, str]:
        """The assumptions ``names`` as they are shown."""
        return {name: _word(getattr(self, name)) for name in names}


def _word(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "yes" if value else "none" if value is None else "no"
    if isinstance(value, Geometry):
        return f"{value.parameters:,} parameters ({value.source})"
    return f"{value:,}" if isinstance(value, int) else str(value)


def assume(text: str, **changes: Any) -> Assumptions:
    """Assumptions of a model of the table ("LLaMA-2-13B") or of a round number ("13B", "350M"), with ``changes``.

    A round number takes the shapes of the nearest model of the table, if that is at most ``NEAR`` away; else none.
    Raises ConfigError for a text that is neither, and for a change of what there is not.
    """
    known = {f.name for f in fields(Assumptions)}
    for name in changes:
        if name not in known:
            raise ConfigError("There is no assumption of this name.", given=name, allowed=", ".join(sorted(known)))
    named = {name.lower(): name for name in MODELS}
    if text.lower() in named:
        name = named[text.lower()]
        return Assumptions(**{"parameters": MODELS[name].parameters, "shapes": name, **changes})
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([bm])", text.strip().lower())
    if not found or not (size := round(float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]])):
        near = get_close_matches(text, MODELS, 1, 0.4)
        raise ConfigError(
            "This is neither a model of the table nor a number of parameters.",
            given=text,
            allowed=f"{', '.join(MODELS)}, or a number as 13B or 350M",
            do=f"did you mean {near[0]}?" if near else None,
        )
    return Assumptions(**{"parameters": size, "shapes": nearest(size), **changes})


def nearest(size: int) -> str | None:
    """The model of the table whose number is nearest to ``size``; None where all are more than ``NEAR`` away."""
    name = min(MODELS, key=lambda name: abs(MODELS[name].parameters / size - 1))
    return name if abs(MODELS[name].parameters / size - 1) <= NEAR else None
