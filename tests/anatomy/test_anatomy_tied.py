"""A tensor under several names is one site, also where offloading has made two tensors of it."""

from __future__ import annotations

import accelerate
import pytest
from families import FAMILIES

from tarsia.anatomy import anatomy_of


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "blip_2"])
def test_offloading_unties_nothing(family: str) -> None:
    model, config = FAMILIES[family].build(text_config={"tie_word_embeddings": True}, tie_word_embeddings=True)
    anatomy = anatomy_of(config)
    before, untouched = anatomy.sites(model), anatomy.untouched(model)
    (tied,) = [site for site in before if site.tied]
    assert list(untouched) == list(tied.tied)
    accelerate.cpu_offload(model)
    assert anatomy.sites(model) == before
    assert anatomy.untouched(model) == untouched
