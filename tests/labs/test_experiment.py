"""An experiment from rows to reports on a tiny base."""

from __future__ import annotations

import pytest
from data.processors import picture
from train import small

from tarsia.adapter import host as host_module
from tarsia.adapter import open_base
from tarsia.labs import demo, sources
from tarsia.labs.experiment import adapt, forgotten, measure, mixed


@pytest.mark.parametrize("native", [False, True])
def test_an_adaptation_is_measured_as_it_was_trained(tmp_path, monkeypatch, native):
    """On a machine that computes bfloat16, too, before, training and after are of one precision."""
    monkeypatch.setattr(host_module, "native_bf16", lambda *_: native)
    values = small.world(tmp_path)
    files = {}
    for name, answer in (("job", "a cat"), ("rest", "red")):
        files[name] = tmp_path / f"{name}.parquet"
        sources.write(files[name], [("what is this?", answer, (picture(shade=9 * i + 1),)) for i in range(4)])
    recipe = {key: value for key, value in values.items() if key not in ("precision", "device", "out")}
    recipe |= {"data": {"train": [{"path": str(files["job"])}]}}
    made = mixed(recipe, [{"path": str(files["rest"])}], 0.25, tmp_path / "mix")
    assert [source.weight for source in made.data.train] == [0.75, 0.25]
    before = measure(open_base(made.model), files)
    heard = []
    mix = adapt("a quarter", made, files, before, lambda name, event: heard.append(event))
    assert heard[-1] is None
    assert 0 < mix.share < 0.2
    assert mix.drift <= 1e-4
    assert [change.source for change in mix.change.changes] == ["job", "rest"]
    assert forgotten(mix, ["rest"]) == pytest.approx(mix.change.changes[1].forgetting)


def test_the_demo_draws_its_rows_anew(tmp_path, monkeypatch):
    """Rows that an older version left behind are not those that this one measures."""
    stale = tmp_path / "data" / "scenes-held-out.parquet"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    written = []
    monkeypatch.setattr(sources, "write", lambda path, rows: written.append(path))
    train, held = demo.write(tmp_path)
    assert stale in written
    assert set(written) == {*train.values(), *held.values()}
