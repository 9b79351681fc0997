"""A run over a base in 4 bits: it learns, the base stays, it goes on to the bit; another form is refused."""

from __future__ import annotations

import json

import pytest
import torch
from train import small

from tarsia.adapter import Fingerprint, FourBits, load, open_base, prove, put
from tarsia.cli import main
from tarsia.core.errors import AttachError, BaseMismatch, ConfigError, SelectionError
from tarsia.quant import native
from tarsia.quant.tensor import Weight4
from tarsia.train.events import Finished, Started, read_log
from tarsia.train.loop import fit
from tarsia.train.recipe import Recipe

FORM = {"kind": "nf4"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.world(tmp_path_factory.mktemp("four")) | {"four_bits": FORM}


@pytest.fixture(scope="module")
def ran(world):
    """The events of a whole run."""
    return small.run(world)


def curve(events):
    return [(step.step, step.loss, step.grad_norm) for step in small.curve(events)]


def test_the_base_in_4_bits_stays_as_it_is(world, tmp_path):
    host = small.recipe(world).open()
    before = Fingerprint.of_model(host.model)
    seen = []

    def watch(event):
        weights = [p for p in host.model.parameters() if isinstance(p, Weight4)]
        assert weights and all(p.grad is None and not p.requires_grad for p in weights)
        seen.append(event)

    small.drive(fit(small.recipe(world | {"out": str(tmp_path / "out")}), host=host), watch)
    assert Fingerprint.of_model(host.model) == before
    assert len(small.curve(seen)) == 8


def test_mini_learns(tmp_path):
    values = {
        "model": "mini-1",
        "parts": [
            {"method": "full", "select": "projector", "lr": 1e-3},
            {"method": "lora", "select": "language.*.{q,v,up,down}", "rank": 8, "lr": 3e-3},
        ],
        "data": {"train": [{"path": str(small.rows(tmp_path / "rows.jsonl", 6, (1,)))}]},
        "steps": 12, "batch": 6, "warmup": 0, "threads": 1, "device": "cpu", "precision": "float32",
        "four_bits": {"kind": "nf4", "select": "language; vision"}, "out": str(tmp_path / "out"),
    }  # fmt: skip
    losses = [step.loss for step in small.curve(small.run(values))]
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]


def test_it_says_what_is_in_4_bits(ran, world):
    started = next(event for event in ran if isinstance(event, Started))
    (card,) = [event.adapter.card for event in ran if isinstance(event, Finished)]
    for report in (started.four_bits, card["four_bits"]):
        assert report["select"] == "language; vision"
        assert 4.1 < report["bits"] < 4.5
        assert 0.05 < report["error"] < 0.15
        kept = {line["role"]: line["kept"] for line in report["roles"] if line["component"] == "projector"}
        assert kept == {"proj": "not selected"}
    (logged,) = [event for event in read_log(small.Path(world["out"]) / "events.jsonl") if event["event"] == "started"]
    assert logged["four_bits"] == json.loads(json.dumps(started.four_bits))
    assert f"weights in 4 bits: {native.status()}" in started.fast


def test_a_run_that_was_stopped_goes_on_to_the_bit(ran, world, tmp_path):
    values = world | {"out": str(tmp_path / "out")}
    small.until(fit(small.recipe(values)), 5)
    held = tmp_path / "out" / "checkpoints"
    # patches and moments: nothing of the size of the base
    base = sum(path.stat().st_size for path in small.Path(world["model"]).glob("*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in held.rglob("*") if path.is_file()) < base / 4
    again = small.run(values)
    assert curve(again) == curve(ran)[-len(curve(again)) :]
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (small.Path(world["out"]) / name).read_bytes()


def test_a_run_does_not_go_on_over_another_form(ran, world, tmp_path):
    values = world | {"out": str(tmp_path / "out")}
    small.until(fit(small.recipe(values)), 4)
    with pytest.raises(ConfigError, match="run of another recipe"):
        small.run(values | {"four_bits": {"kind": "fp4"}})
    with pytest.raises(ConfigError, match="run of another recipe"):
        small.run({key: value for key, value in values.items() if key != "four_bits"})


def test_a_host_in_another_form_is_refused(world, tmp_path):
    values = world | {"out": str(tmp_path / "out")}
    for form in (None, FourBits("int4")):
        host = open_base(world["model"], four_bits=form)
        with pytest.raises(ConfigError, match="not in the form"):
            small.run(values, host=host)
    four = small.recipe(world).open()
    with pytest.raises(ConfigError, match="not in the form"):
        small.run({key: value for key, value in values.items() if key != "four_bits"}, host=four)


def test_the_adapter_is_proved_over_its_form_and_refused_over_another(ran, world):
    folder = small.Path(world["out"]) / "adapter"
    adapter = load(folder)
    host = open_base(world["model"], four_bits=FourBits.of(adapter.fingerprint.quantisation))
    put(host, adapter, "a")
    assert prove(host, "a", adapter.probe) < 1e-4
    with pytest.raises(BaseMismatch, match="another form"):
        put(open_base(world["model"]), adapter, "a")


def test_full_training_of_a_weight_in_4_bits_is_refused(world, tmp_path):
    values = world | {"out": str(tmp_path / "out")}
    parts = [{"method": "full", "select": "language.-1", "lr": 1e-3}]
    with pytest.raises(AttachError, match="quantised") as refusal:
        small.run(values | {"parts": parts})
    assert "lora" in refusal.value.allowed
    parts = [{"method": "full", "select": "language.*.norm", "lr": 1e-3}]
    assert len(small.curve(small.run(values | {"parts": parts}))) == 8


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{"checkpointing": True}, {"batching": "packed"}, {"batching": "grouped"}])
def test_it_goes_together_with_the_rest(precision, options, world, tmp_path):
    parts = [{key: value for key, value in part.items() if key != "dropout"} for part in world["parts"]]
    plain = world | {"parts": parts, "precision": precision, "out": str(tmp_path / "plain"), "steps": 3}
    other = small.curve(small.run(plain | options | {"out": str(tmp_path / "other")}))
    for a, b in zip(small.curve(small.run(plain)), other, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4 if precision == "float32" else 5e-2)


def test_features_of_a_tower_in_4_bits_are_others(world, tmp_path):
    parts = [part for part in world["parts"] if "vision" not in part["select"]]
    values = world | {"parts": parts, "steps": 3, "features": {"path": str(tmp_path / "kept")}}
    plain = small.curve(small.run(values | {"features": None, "out": str(tmp_path / "plain")}))
    found = []
    for i, form in enumerate((FORM, FORM, {"kind": "fp4"}, None)):
        events = small.run(values | {"four_bits": form, "out": str(tmp_path / str(i))})
        found.append(events[-1].adapter.card["features"])
        if form == FORM:
            for a, b in zip(plain, small.curve(events), strict=True):
                assert b.loss == pytest.approx(a.loss, abs=1e-5)
    assert [entry["computed"] > 0 for entry in found] == [True, False, True, True]


def test_it_is_another_base_than_in_16_bits(ran, world, tmp_path):
    plain = {key: value for key, value in world.items() if key != "four_bits"} | {"out": str(tmp_path / "out")}
    four, sixteen = curve(ran), curve(small.run(plain))
    assert abs(four[0][1] - sixteen[0][1]) > 1e-3


def test_what_can_not_be_opened_is_told(world, tmp_path):
    values = world | {"out": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=r"'four_bits\.kind' can not be used"):
        small.recipe(values | {"four_bits": {"kind": "nf3"}})
    with pytest.raises(ConfigError, match=r"no key 'four_bits\.nest'") as refusal:
        small.recipe(values | {"four_bits": {"nest": True}})
    assert refusal.value.do == "did you mean nested?"
    with pytest.raises(SelectionError, match="names no component"):
        small.recipe(values | {"four_bits": {"select": "langage"}})
    with pytest.raises(SelectionError, match="matches nothing"):
        small.run(values | {"four_bits": {"select": "language.*.qkv"}})
    assert not (tmp_path / "out" / "adapter").exists()


def test_the_hash_of_a_recipe_without_it_is_what_it_was(world):
    plain = {key: value for key, value in world.items() if key != "four_bits"}
    assert Recipe.of(plain).hash == Recipe.of(plain | {"four_bits": None}).hash
    assert Recipe.of(plain).hash != Recipe.of(world).hash


def test_the_commands_open_the_base_as_the_adapter_says(ran, world, tmp_path, capsys):
    adapter = str(small.Path(world["out"]) / "adapter")
    ask = ["ask", world["model"], "what is this?", "--device", "cpu", "--precision", "float32", "--max-new-tokens", "2"]
    assert main([*ask, "--adapter", adapter]) == 0
    assert "not proved" not in capsys.readouterr().err
    for form in ("none", "{kind: fp4, nested: false}"):
        assert main([*ask, "--adapter", adapter, "--four-bits", form]) == 0
        assert "another form of this base" in capsys.readouterr().err
    for form, said in (
        ("nf3", "no such 4-bit type"),
        ("{knd: nf4}", "no such option"),
        ("{nested: 1}", "true or false"),
    ):
        assert main([*ask, "--adapter", adapter, "--four-bits", form]) == 2
        assert said in capsys.readouterr().err
    assert main([*ask, "--four-bits", "nf4"]) == 0
    other = world | {"out": str(tmp_path / "out"), "four_bits": None, "steps": 3}
    small.run(other)
    (tmp_path / "out" / "adapter").rename(tmp_path / "plain")
    assert main([*ask, "--adapter", adapter, "--adapter", str(tmp_path / "plain")]) == 2
    assert "different forms" in capsys.readouterr().err


def test_an_adapter_of_a_rounded_base_names_it_over_files_in_4_bits(ran, world, tmp_path, capsys):
    assert main(["quantise", world["model"], "--out", str(tmp_path / "four"), "--json"]) == 0
    adapter = str(small.Path(world["out"]) / "adapter")
    capsys.readouterr()
    assert main(["ask", str(tmp_path / "four"), "what is this?", "--adapter", adapter, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert f"open the base that it was trained on: {world['model']}" in said
    assert str(tmp_path / "four") in said and "four_bits" not in said
    ask = ["ask", str(tmp_path / "four"), "what is this?", "--device", "cpu", "--four-bits", "nf4"]
    assert main(ask) == 2
    assert "quantised already" in capsys.readouterr().err
    assert main([*ask[:-1], "none"]) == 2
    assert "no other numbers to open" in capsys.readouterr().err
    said = json.loads((tmp_path / "four" / "config.json").read_text())
    del said["quantization_config"]
    (tmp_path / "four" / "config.json").write_text(json.dumps(said))
    assert main(ask[:-2]) == 2
    assert "config.json does not say so" in capsys.readouterr().err


def test_a_base_that_its_files_hold_in_4_bits(world, tmp_path):
    assert main(["quantise", world["model"], "--out", str(tmp_path / "four"), "--json"]) == 0
    values = {key: value for key, value in world.items() if key != "four_bits"}
    values |= {"model": str(tmp_path / "four"), "out": str(tmp_path / "out"), "steps": 3}
    with_form = small.curve(small.run(world | {"out": str(tmp_path / "same"), "steps": 3}))
    events = small.run(values)
    assert curve(events) == [(s.step, s.loss, s.grad_norm) for s in with_form]
    adapter = load(tmp_path / "out" / "adapter")
    with pytest.raises(BaseMismatch):
        put(open_base(world["model"], four_bits=FourBits()), adapter, "a")
    put(host := open_base(str(tmp_path / "four")), adapter, "a")
    assert prove(host, "a", adapter.probe) < 1e-4
    assert torch.is_tensor(next(host.model.parameters()))
