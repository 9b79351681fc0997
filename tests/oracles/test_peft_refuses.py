"""A folder of a method that PEFT lacks says so by its peft_type, and PEFT refuses it; Tarsia reads it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES

from tarsia.adapter import Adapter, Host, load, put, save
from tarsia.adapter.files import sealed
from tarsia.core.attach import Part, attach, patches
from tarsia.core.errors import AdapterError
from tarsia.core.method import find

CASES: dict[str, dict[str, Any]] = {
    "houlsby": {"reduction": 3, "activation": "silu", "norm": True},
    "pfeiffer": {"reduction": 5, "bias": False},
    "parallel": {"reduction": 3, "activation": "tanh"},
    "scaled_parallel": {"reduction": 3, "scale": 1.5},
    "vpt": {"length": 3},
    "vpt_deep": {"length": 3},
}


def saved(name: str, folder: Path) -> tuple[Host, tuple[Part, ...]]:
    select = "vision" if name in ("vpt", "vpt_deep") else "vision; language"
    host, parts = Host.of(FAMILIES["llava"].build()[0]), (Part(name, select, find(name).configure(CASES[name])),)
    attach(host.model, host.sites, parts)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for patch in patches(host.model, "default").values():
            for parameter in patch.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    save(Adapter.of(host, "default", parts), folder)
    return host, parts


@pytest.mark.parametrize("name", CASES)
def test_peft_refuses_it_by_its_type(name: str, tmp_path: Path) -> None:
    host, parts = saved(name, tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == "TARSIA"
    assert name in " ".join(config["why_not_peft"])
    with pytest.raises(Exception, match="TARSIA"):
        peft.PeftModel.from_pretrained(FAMILIES["llava"].build()[0], tmp_path / "a")
    inputs, other = FAMILIES["llava"].batch(), Host.of(FAMILIES["llava"].build()[0])
    again = load(tmp_path / "a")
    assert again.parts == parts
    with torch.no_grad():
        before, live = other.model(**inputs).logits, host.model(**inputs).logits
        put(other, again, "b")
        assert torch.equal(other.model(**inputs).logits, live)
    assert (live - before).abs().max() >= 0.1


@pytest.mark.parametrize(
    "edit,words",
    [
        ({"activation": "sine"}, "does not fit"),
        ({"activation": 1}, "is no word"),
        ({"scale": "4"}, "is no number"),
        ({"scale": None}, "is no number"),
    ],
)
def test_constants_that_were_edited_are_refused(edit: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved("scaled_parallel", tmp_path / "a")
    path = tmp_path / "a/tarsia.json"
    described = json.loads(path.read_text())
    next(iter(described["patches"].values()))["constants"] |= edit
    path.write_text(sealed(described))
    with pytest.raises(AdapterError, match=words):
        put(Host.of(FAMILIES["llava"].build()[0]), load(tmp_path / "a"), "b")
