"""What model families are made of: tables of roles, one file a family.

    anatomy = anatomy_of(model.config)
    sites = anatomy.sites(model)           # every parameter on one site
    segments = anatomy.segments(inputs)    # which row owns which entries of what a site sees

A family is data (``table.Family``): parts, which are a prefix and rules about the paths below it, and a
function that counts what each row owns. Vision towers (``towers``) and text decoders (``decoders``) are
tables of their own, by the ``model_type`` of their configuration, so families compose.
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

    Raises AnatomyError where the family, its vision tower or its text model is not known.
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
    if isinstance(config, Mapping):
        from transformers import AutoConfig

        config = AutoConfig.for_model(**fields)
    return Anatomy(config, _FAMILIES[name])
