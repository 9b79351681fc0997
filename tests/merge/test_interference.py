"""The interference report: held to the plain definitions on dense changes, and to worlds whose answer is known."""

from __future__ import annotations

import base64
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.made_adapters import made
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tarsia.adapter import Adapter, Host, Patched
from tarsia.core.errors import BaseMismatch, ConfigError, MergeError
from tarsia.merge import between as module
from tarsia.merge.between import cosines, product, subspaces
from tarsia.merge.delta import Delta, deltas
from tarsia.merge.interference import Interference, interference
from tarsia.merge.interference_page import Table, write_page

Q = "language.*.q"


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.of(FAMILIES["llava"].build()[0])


def adapter(host: Host, *parts: Any, seed: int = 0) -> Adapter:
    return made(host, parts, seed=seed, probed=False)


def times(adapter: Adapter, factor: float) -> Adapter:
    """The same LoRA adapter with all changes multiplied."""
    patches = {
        path: Patched(p.method, {**p.constants, "scale": factor * float(p.constants["scale"])}, p.tensors)
        for path, p in adapter.patches.items()
    }
    return replace(adapter, patches=patches)


def lost(stack: Tensor) -> tuple[float, float]:
    """What has not the sum's sign, as a share of all magnitude, and the share of numbers where that is so."""
    elected = stack.sum(0).sign()
    losing = (stack.sign() != elected) & (stack != 0)
    shared = (stack != 0).sum(0) > 1
    return float((stack.abs() * losing).sum() / stack.abs().sum()), float(
        (losing.any(0) & shared).sum() / shared.sum().clamp_min(1)
    )


def test_it_is_what_the_definitions_say(host: Host) -> None:
    parts = [
        [("lora", "language.*.{q,v,up}", {"rank": 2})],
        [("rslora", Q, {"rank": 5}), ("dora", "language.*.v", {"rank": 2})],
        [("dora", Q, {"rank": 3})],
    ]
    held = {name: adapter(host, *p, seed=i) for i, (name, p) in enumerate(zip("abc", parts, strict=True))}
    found = interference(held, host, [1.0, 0.5, 2.0])
    every = [deltas(one, host) for one in held.values()]
    paths = sorted(set().union(*every))
    stacks = {
        path: [None if path not in d else w * d[path].weight() for d, w in zip(every, (1.0, 0.5, 2.0), strict=True)]
        for path in paths
    }
    by_site = {place.name: place for place in found.sites}
    assert sorted(by_site) == paths
    for path, stack in stacks.items():
        there = torch.stack([one for one in stack if one is not None])
        share, entries = lost(there)
        assert by_site[path].conflict == pytest.approx(share, rel=1e-5)
        assert by_site[path].entries == pytest.approx(entries, rel=1e-5)
        assert by_site[path].norms == pytest.approx([0 if one is None else float(one.norm()) for one in stack])
    whole = torch.cat([torch.stack([o if o is not None else torch.zeros(s) for o in stacks[p]]).flatten(1)
                       for p in paths for s in [next(o.shape for o in stacks[p] if o is not None)]], 1)  # fmt: skip
    assert found.whole.conflict == pytest.approx(lost(whole)[0], rel=1e-5)
    assert found.whole.entries == pytest.approx(lost(whole)[1], rel=1e-5)
    for pair in found.whole.pairs:
        i, j = "abc".index(pair.first), "abc".index(pair.second)
        common = [p for p in paths if stacks[p][i] is not None and stacks[p][j] is not None]
        one, other = (torch.cat([stacks[p][k].flatten() for p in common]) for k in (i, j))
        assert pair.sites == len(common)
        assert pair.cosine == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-9)
        assert pair.conflict == pytest.approx(lost(torch.stack([one, other]))[0], rel=1e-5)


def test_an_adapter_and_itself_do_not_interfere(host: Host) -> None:
    one = adapter(host, ("lora", Q, {"rank": 3}))
    (pair,) = interference({"a": one, "b": times(one, 2.0)}, host).whole.pairs
    assert pair.cosine == pytest.approx(1)
    assert pair.conflict == 0
    assert pair.columns == pytest.approx(1)
    assert pair.rows == pytest.approx(1)


def test_an_adapter_and_its_opposite_lose_all(host: Host) -> None:
    one = adapter(host, ("lora", Q, {"rank": 3}))
    found = interference({"a": one, "b": times(one, -1.0)}, host)
    assert found.whole.pairs[0].cosine == pytest.approx(-1)
    assert found.whole.pairs[0].conflict == 1
    assert found.whole.conflict == found.whole.entries == 1
    half = interference({"a": one, "b": times(one, -0.5)}, host)
    assert half.whole.conflict == pytest.approx(1 / 3)
    assert interference({"a": one, "b": one}, host, [1.0, -0.5]).whole.conflict == pytest.approx(1 / 3)


def test_chance_is_what_the_page_says() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = module.Sums.none(2)
    changes = [Delta(whole=torch.randn(400, 400, generator=generator, dtype=torch.float64)) for _ in range(2)]
    module.signs(dict(enumerate(changes)), sums)
    assert float(sums.lost.sum() / sums.mass.sum()) == pytest.approx((2**0.5 - 1) / (2 * 2**0.5), rel=0.01)
    assert float(sums.entries[1] / sums.entries[0]) == pytest.approx(0.5, rel=0.01)
    thin = [torch.linalg.qr(torch.randn(500, k, generator=generator, dtype=torch.float64))[0] for k in (8, 5)]
    assert float(cosines(*thin).square().mean()) == pytest.approx(8 / 500, rel=0.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_products_are_those_of_the_whole(out: int, into: int, first: int, second: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    one, other = (Delta(drawn(out, rank), drawn(rank, into)) for rank in (first, second))
    dense = [Delta(whole=delta.weight()) for delta in (one, other)]
    wanted = float((one.weight() * other.weight()).sum())
    for a, b in ((one, other), (one, dense[1]), (dense[0], other), (dense[0], dense[1])):
        assert product(a, b) == pytest.approx(wanted, abs=1e-9)
    sums = [module.Sums.none(2) for _ in range(2)]
    for held, pair in zip(sums, ((one, other), dense), strict=True):
        module.signs(dict(enumerate(pair)), held)
    for name in ("mass", "lost", "pair_mass", "pair_lost"):
        assert torch.allclose(getattr(sums[0], name), getattr(sums[1], name), rtol=1e-4, atol=1e-5)


def test_subspaces_hold_nine_tenths_and_angles_are_theirs() -> None:
    basis = torch.eye(6, dtype=torch.float64)
    one = Delta(up=basis[:, :3] * torch.tensor([3.0, 1.0, 0.1]), down=basis[:3])
    columns, rows = subspaces(one)
    assert columns.shape == (6, 1) or columns.shape == (6, 2)
    assert float(columns[0, 0].abs()) == pytest.approx(1)
    assert float((columns.T @ one.weight()).norm() ** 2) >= 0.9 * one.norm**2
    turned = torch.stack([basis[0], (basis[1] + basis[3]) / 2**0.5], 1)
    assert cosines(basis[:, :2], turned).tolist() == pytest.approx([1, 2**-0.5])
    assert float(cosines(basis[:, :2], basis[:, 3:5]).abs().max()) == 0
    assert rows.shape[1] == columns.shape[1]


def test_what_is_read_and_what_is_written_are_told_apart(host: Host) -> None:
    """Two that read the same and write to different places."""
    one = adapter(host, ("lora", Q, {"rank": 2}))
    generator = torch.Generator().manual_seed(3)
    patches = {}
    for path, patched in one.patches.items():
        b = patched.tensors["B"]
        left = torch.linalg.qr(torch.cat([b, torch.randn(b.shape, generator=generator)], 1))[0][:, b.shape[1] :]
        patches[path] = Patched("lora", patched.constants, {"A": patched.tensors["A"], "B": left.contiguous()})
    (pair,) = interference({"a": one, "b": replace(one, patches=patches)}, host).whole.pairs
    assert pair.rows is not None and pair.columns is not None
    assert pair.columns < 1e-6
    assert pair.rows > 0.5
    assert pair.rows_chance == pytest.approx(pair.columns_chance)  # the layers are square


def test_tiles_do_not_change_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {name: adapter(host, ("lora", Q, {"rank": 2}), seed=i) for i, name in enumerate("abc")}
    found = interference(held, host)
    monkeypatch.setattr(module, "TILE", 7)
    again = interference(held, host)
    assert again.whole.conflict == pytest.approx(found.whole.conflict, rel=1e-6)
    assert again.whole.entries == found.whole.entries


def test_components_and_layers_add_up(host: Host) -> None:
    held = {
        name: adapter(host, ("lora", "*.*.{q,v}", {"rank": 2}), ("full", "projector", {}), seed=i)
        for i, name in enumerate("ab")
    }
    found = interference(held, host)
    assert {place.name for place in found.components} == {"vision", "projector", "language"}
    assert sum(place.sites for place in found.components) == found.whole.sites == len(found.sites)
    for k in range(2):
        square = sum(place.norms[k] ** 2 for place in found.components)
        assert found.whole.norms[k] ** 2 == pytest.approx(square)
    assert {place.layer for place in found.layers if place.component == "language"} == {0, 1, 2}


def test_bottlenecks_are_said_to_be_left_out(host: Host) -> None:
    held = {
        name: adapter(host, ("houlsby", "language", {"reduction": 4}), ("lora", Q, {"rank": 2}), seed=i)
        for i, name in enumerate("ab")
    }
    found = interference(held, host)
    assert len(found.skipped) == 6
    assert all(path.endswith("()") for path in found.skipped)


def test_biases_alone_are_told_of(host: Host) -> None:
    held = {name: adapter(host, ("bitfit", "vision.*.q", {}), seed=i) for i, name in enumerate("ab")}
    found = interference(held, host)
    assert 0 < found.whole.conflict < 1
    assert found.whole.pairs[0].columns is None


def test_it_is_json_and_back(host: Host) -> None:
    held = {name: adapter(host, ("lora", Q, {"rank": 2}), seed=i) for i, name in enumerate("ab")}
    found = interference(held, host)
    assert Interference.model_validate_json(found.json_text()) == found


def test_no_name_can_act_on_the_page(host: Host, tmp_path: Path) -> None:
    held = {
        name: adapter(host, ("lora", Q, {"rank": 2}), seed=i) for i, name in enumerate(("<script>x</script>", "$a_b$"))
    }
    table = Table("<b>t</b>", "n", ("c",), (("<i>",),))
    write_page(interference(held, host), tmp_path / "page.html", "<u>title", [table])
    text = (tmp_path / "page.html").read_text()
    assert not any(mark in text for mark in ("<script", "<b>t", "<i>", "<u>"))
    assert (tmp_path / "page.png").read_bytes() in base64.b64decode(text.partition("base64,")[2].partition('"')[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.png"]
    with pytest.raises(ConfigError, match="can not be written"):
        write_page(interference(held, host), tmp_path / "no" / "page.html")


def test_what_makes_no_report_is_refused(host: Host) -> None:
    one, other = adapter(host, ("lora", Q, {"rank": 2})), adapter(host, ("lora", "language.*.v", {"rank": 2}))
    with pytest.raises(MergeError, match="two adapters"):
        interference({"a": one}, host)
    with pytest.raises(MergeError, match="two adapters"):
        interference({"a": one, "b": one}, host, [1.0])
    with pytest.raises(MergeError, match="nothing between"):
        interference({"a": one, "b": other}, host)
    assert one.fingerprint is not None
    foreign = replace(one, fingerprint=replace(one.fingerprint, weights="memory:other"))
    for pair in combinations((one, foreign), 2):
        with pytest.raises(BaseMismatch):
            interference(dict(zip("ab", pair, strict=True)), host)
