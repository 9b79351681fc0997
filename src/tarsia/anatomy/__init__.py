"""What model families are made of: tables of roles, one file a family.

    anatomy = anatomy_of(model.config)
    sites = anatomy.sites(model)           # every parameter on one site
    segments = anatomy.segments(inputs)    # which row owns which entries of what a site sees

A family is data (``table.Family``): parts, which are a prefix and rules about the paths below it, and a
function that counts what each row owns. Vision towers (``towers``) and text decoders (``decoders``) are
tables of their own, by the ``model_type`` of their configuration, so families compose.

To add a family, write its file, add it to ``_FAMILIES`` below and a tiny model of it to tests/families.py:
every test of this folder then holds it to real passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tarsia.anatomy import blip_2, gemma3, idefics3, internvl, llava, llava_next, mllama, paligemma, qwen_vl
from tarsia.anatomy.table import Anatomy, Config
from tarsia.core.errors import AnatomyError

__all__ = ["Anatomy", "anatomy_of"]

_FAMILIES = {
    family.name: family
    for family in (
        llava.FAMILY,
        *llava_next.FAMILIES,
        *qwen_vl.FAMILIES,
        *idefics3.FAMILIES,
        paligemma.FAMILY,
        gemma3.FAMILY,
        internvl.FAMILY,
        mllama.FAMILY,
        blip_2.FAMILY,
    )
}


def anatomy_of(config: Config | Mapping[str, Any]) -> Anatomy:
    """The anatomy of a model with this configuration, or with the dictionary that a config.json holds.

    Raises AnatomyError where the family, its vision tower or its text model is not known, or where
    Transformers refuses the configuration.
    """
    fields = dict(config) if isinstance(config, Mapping) else config.to_dict()
    name = fields.get("model_type")
    if name not in _FAMILIES:
        seeing = any(key in fields for key in ("vision_config", "visual", "vision_tower"))
        raise AnatomyError(
            f"The family {name!r} is not known." if seeing or not name else f"{name!r} is no vision-language model.",
            given=f"model_type {name!r}" + ("" if seeing else ", a configuration without a vision tower"),
            allowed=", ".join(_FAMILIES),
            do="use a model of one of these families, or describe its own in tarsia/anatomy",
        )
    return Anatomy(_read(fields) if isinstance(config, Mapping) else config, _FAMILIES[name])


def _read(fields: dict[str, Any]) -> Config:
    """The configuration that Transformers makes of ``fields``."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**fields)
    except (StrictDataclassError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise AnatomyError(
            f"Transformers can not read this configuration of {fields['model_type']}.",
            given=" ".join(str(error).split())[:300],
            do="correct the model's config.json",
        ) from error
