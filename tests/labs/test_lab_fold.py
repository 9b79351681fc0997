"""The chapters on folding fail where a fold is wrong, slow, or rounding does what they say it does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tarsia.core.site import Component, Kind, Role, Site
from tarsia.labs.chapters import delta
from tarsia.labs.chapters import fold as chapter
from tarsia.labs.frame.chapter import Found

FOLD = {
    "worst: all": {"differs / rounding": 1.2, "same token, %": 99.5},
    "time: folded over base": {"median": 1.0},
    "time: live over base": {"median": 1.4},
    "more: folded": {"parameters": 0},
}
DELTA = {
    "share: 0.01": {"4 bits again": 8.0, "4 bits again, original": 100.0, "bfloat16": 100.0},
    "share: 0.001": {"bfloat16, original": 60.0},
    "share: 1": {"4 bits again": 99.0},
}


@pytest.mark.parametrize("made,rows", [(chapter.CHAPTER, FOLD), (delta.CHAPTER, DELTA)], ids=["fold", "delta"])
def test_each_bound_fails_by_itself(made, rows):
    assert made.judge(Found(rows)) == "PASS"
    for bound in made.bounds:
        for value in (bound.low - 0.5, bound.high + 0.5, float("nan")):
            if value in (float("inf"), float("-inf")):
                continue
            broken = copy.deepcopy(rows)
            broken[bound.row][bound.column] = value
            assert made.judge(Found(broken)) == "FAIL", bound


@pytest.fixture(scope="module")
def found():
    """Four layers with weights beside their grid, and a low-rank change of each."""
    draw = torch.Generator().manual_seed(0)
    changes = []
    for number in range(4):
        weight = torch.randn(128, 256, generator=draw)
        change = torch.randn(128, 4, generator=draw) @ torch.randn(4, 256, generator=draw)
        site = Site(f"layers.{number}", Component.LANGUAGE, Role.Q, number, Kind.WEIGHT, (128, 256), f"{number}.weight")
        changes.append((site, weight.bfloat16().float(), delta.four(weight), change))
    return changes


def test_shares_are_those_of_the_claim(found):
    rows = delta.kept(found)
    assert delta.CHAPTER.judge(Found(rows)) == "PASS"
    small, large = rows["share: 0.001"], rows["share: 1"]
    assert small["4 bits again"] < 5 < 90 < large["4 bits again"]


def test_rounding_that_does_nothing_is_seen(found, monkeypatch):
    monkeypatch.setattr(delta, "FORMS", {name: lambda weight: weight for name in delta.FORMS})
    assert delta.CHAPTER.judge(Found(delta.kept(found))) == "FAIL"


def test_what_is_folded_for_a_while_is_taken_out_again(found):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(256, 128, bias=False) for _ in range(4))

    class Host:
        model = Whole()

    sites = [Site(s.path, s.component, s.role, s.layer, s.kind, s.shape, f"{s.path}.weight") for s, *_ in found]
    some = [(site, *rest) for site, (_, *rest) in zip(sites, found, strict=True)]
    before = list(Host.model.parameters())
    with delta.folded(Host, some, 0.5, lambda weight: weight):
        inside = Host.model.layers[2].weight
        assert torch.equal(inside, some[2][2] + 0.5 * some[2][3])
    assert all(a is b for a, b in zip(Host.model.parameters(), before, strict=True))


def test_every_method_that_folds_has_a_row():
    assert {"lora", "dora", "oft", "ia3", "vera", "full", "bitfit", "pissa"} <= set(chapter.names())
    assert "loftq" not in chapter.names()
