"""The method that CONTRIBUTING.md shows is one: as printed there, it attaches, is identical at first, and folds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from surface import source
from torch import nn

from tarsia.core.attach import Part, attach, detach, merge, patches
from tarsia.core.method import METHODS, Method, find
from tarsia.core.site import Component, Kind, Role, Site


@pytest.fixture
def gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    text = (source.ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "shown_gain.py").write_text(block, encoding="utf8")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("shown_gain")
    yield find("gain")
    del METHODS["gain"], sys.modules["shown_gain"]


def test_the_method_shown_works(gain: Method) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    site = Site("0", Component.LANGUAGE, Role.Q, 0, Kind.WEIGHT, (3, 4), "0.weight", "0.bias")
    before = model(x)
    (line,) = attach(model, [site], [Part("gain", "language", gain.configure({}))])
    assert line.trained == 3
    assert torch.equal(model(x), before)
    (patch,) = patches(model, "default").values()
    with torch.no_grad():
        patch.gain.copy_(torch.tensor([1.0, 2.0, -1.0]))
    patched = model(x)
    assert torch.allclose(patched, before * torch.tensor([1.0, 2.0, -1.0]))
    merge(model)
    assert torch.allclose(model(x), patched)
    detach(model, "default")
    assert torch.equal(model(x), before)
