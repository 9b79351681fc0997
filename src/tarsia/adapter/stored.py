"""Checkpoints that hold weights in 4 bits: which are taken, and how bitsandbytes and Transformers are told of ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from torch import nn

from tarsia.adapter.four_bits import FourBits
from tarsia.core.errors import AdapterError, ConfigError
from tarsia.quant.levels import KINDS

OURS: Final = "tarsia4"
"""The ``quant_method`` of a checkpoint with levels that bitsandbytes has not: Transformers knows none of this name."""

_BITSANDBYTES: Final = "bitsandbytes"
_TAKEN: Final = "16 or 32 bits, or bitsandbytes' 4 bits (nf4, fp4)"


def stored_form(config: Mapping[str, Any], where: object) -> FourBits | None:
    """The form in which the files of a model with this ``config.json`` hold weights; None where it is not quantised.

    Raises AdapterError for another scheme than is taken.
    """
    held = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not held:
        return None
    method = str(held.get("quant_method")) if isinstance(held, Mapping) else repr(held)
    if method == OURS:
        return _form(str(held.get("kind")), held.get("nested"), where)
    if method != _BITSANDBYTES or held.get("load_in_8bit") or not held.get("load_in_4bit"):
        eight = isinstance(held, Mapping) and held.get("load_in_8bit")
        raise AdapterError(
            "The base is quantised in a way that is not read here.",
            given=f"{where}: {method}{' in 8 bits' if eight else ''}",
            allowed=_TAKEN,
            do="take the model's checkpoint in 16 bits; four_bits quantises it as it is opened",
        )
    return _form(str(held.get("bnb_4bit_quant_type", "fp4")), held.get("bnb_4bit_use_double_quant", False), where)


def _form(kind: str, nested: object, where: object) -> FourBits:
    if kind not in KINDS or not isinstance(nested, bool):
        raise AdapterError(
            "The base's quantization_config is not understood.",
            given=f"{where}: levels {kind!r}, nested {nested!r}",
            allowed=f"{', '.join(KINDS)}; true, false",
            do="fetch config.json again",
        )
    return FourBits(kind, nested)


def written_config(form: FourBits, model: nn.Module, names: Collection[str], dtype: str) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint with the weights ``names`` in 4 bits, computed with in ``dtype``."""
    if form.kind == "int4":
        return {"quant_method": OURS, "kind": form.kind, "nested": form.nested}
    return {
        "quant_method": _BITSANDBYTES,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": form.kind,
        "bnb_4bit_use_double_quant": form.nested,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped(model, names),
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def skipped(model: nn.Module, names: Collection[str]) -> list[str]:
    """The linear layers that bitsandbytes must leave alone, as the model at hand names them.

    Transformers takes each entry for the start, the end or the whole of a module's name, and a regular expression.
    Raises ConfigError where it would so leave out, or quantise, another layer than ``names`` says.
    """
    linear = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    wanted = {name.removesuffix(".weight") for name in names}
    skip = [path for path in linear if path not in wanted]
    always = [*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    caught = [path for path in wanted if any(re.match(key, path) or path.endswith(key) for key in always)]
    foreign = sorted(wanted - set(linear)) or sorted(caught)
    if foreign:
        raise ConfigError(
            "bitsandbytes would not hold these layers in 4 bits.",
            given=", ".join(foreign[:3]),
            do="leave them out of the selection",
        )
    return skip
