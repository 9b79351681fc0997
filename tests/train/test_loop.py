"""A run from recipe to adapter: what it learns, says, keeps, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from train import small

from tarsia.adapter import load, open_base, prove, put
from tarsia.core.attach import activate, slots
from tarsia.core.errors import BaseMismatch, ConfigError, DataError
from tarsia.train.events import Evaluated, Finished, Notice, Saved, Started, as_json, read_log
from tarsia.train.loop import fit


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return small.world(tmp_path_factory.mktemp("loop"))


@pytest.fixture
def fresh(values, tmp_path):
    """The recipe's values with a folder of the test's own."""
    return values | {"out": str(tmp_path / "out")}


@pytest.fixture(scope="module")
def whole(values):
    """One uninterrupted run: its events, and its folder."""
    return small.run(values), Path(values["out"])


def tensors(out: Path | str) -> bytes:
    return (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_order_of_events(whole):
    events, _ = whole
    kinds = [event.kind for event in events]
    stretches = [*["step"] * 3, "saved", *["step"] * 3, "saved", *["step"] * 2, "saved"]
    assert kinds == ["started", *stretches, "memory", "finished"]
    assert [e.step for e in events if isinstance(e, Saved)] == [3, 6, 8]


def test_coverage_is_said_before_the_first_step(whole, values):
    started = whole[0][0]
    assert isinstance(started, Started)
    assert {(line.method, line.component) for line in started.coverage} == {
        ("full", "projector"), ("lora", "vision"), ("lora", "language")
    }  # fmt: skip
    assert started.trained == sum(line.trained for line in started.coverage) > 0
    assert 0 < started.share < 0.2
    assert (started.steps, started.resumed) == (8, 0)
    assert started.recipe["hash"] == small.recipe(values).hash


def test_it_learns_and_reports_by_part_and_source(whole):
    curve = small.curve(whole[0])
    assert curve[-1].loss < curve[0].loss - 0.5
    assert [len(step.lr) for step in curve] == [3] * 8
    assert curve[1].lr == (1e-3, 3e-3, 1e-2)
    for step in curve:
        assert sum(step.rows.values()) == 4
        assert sum(step.tokens_by_source.values()) == step.tokens > 0
        mean = sum(step.losses[s] * step.tokens_by_source[s] for s in step.losses) / step.tokens
        assert mean == pytest.approx(step.loss)
    rows = sum(step.rows.get("task", 0) for step in curve)
    assert 16 < rows < 32


def test_the_log_holds_every_event(whole):
    events, out = whole
    assert [json.loads(as_json(event)) for event in events] == list(read_log(out / "events.jsonl"))


def test_the_adapter_is_saved_with_card_and_probe(whole, values):
    events, out = whole
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert Path(finished.folder) == out / "adapter"
    host = open_base(values["model"])
    adapter = load(out / "adapter", host)
    card = adapter.card
    assert card["recipe"]["hash"] == small.recipe(values).hash
    assert len(card["data"]["task"]["sha256"]) == 64
    assert card["steps"] == 8
    assert card["loss"]["final"] == pytest.approx(small.curve(events)[-1].loss)
    assert sum(source["rows"] for source in card["data"].values()) == 32
    put(host, adapter, "again")
    assert adapter.probe is not None
    assert prove(host, "again", adapter.probe) <= 1e-5
    assert adapter.patches.keys() == finished.adapter.patches.keys()


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_an_interrupted_run_goes_on_to_the_same_curve(whole, fresh, stop):
    small.until(fit(small.recipe(fresh)), stop)
    events = small.run(fresh)
    assert isinstance(events[0], Started)
    assert events[0].resumed == stop - stop % 3 if stop != 3 else True
    logged = [e for e in read_log(Path(fresh["out"]) / "events.jsonl") if e["event"] == "step"]
    expected = [json.loads(as_json(step)) for step in small.curve(whole[0])]
    for entry in (*logged, *expected):
        del entry["tokens_per_second"]
    assert logged == expected
    assert tensors(fresh["out"]) == tensors(whole[1])


def test_a_finished_run_has_nothing_left_to_do(fresh):
    small.run(fresh)
    before = tensors(fresh["out"])
    assert [event.kind for event in small.run(fresh)] == ["started", "notice", "memory", "finished"]
    assert tensors(fresh["out"]) == before


def test_the_same_recipe_gives_the_same_bits_whatever_is_drawn_outside(whole, fresh):
    curve = []
    for event in fit(small.recipe(fresh)):
        torch.rand(3)
        curve.append(event)
    assert small.curve(curve) == small.curve(whole[0])
    assert tensors(fresh["out"]) == tensors(whole[1])


def test_nothing_outside_is_moved(fresh):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    small.run(fresh, "steps=4", f"threads={threads + 1}")
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_a_host_is_given_back_as_it_was(fresh, fails):
    host = open_base(fresh["model"])
    before = {key: value.clone() for key, value in host.model.state_dict().items()}
    if fails:
        with pytest.raises(ConfigError, match="shorten it"):
            small.run(fresh, "warmup=8", host=host)
    else:
        small.run(fresh, "steps=4", "checkpointing=true", host=host)
        assert host.model.get_submodule("model.language_model.layers.1").gradient_checkpointing is False
    assert not slots(host.model)
    assert not host.model.training
    after = host.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_accumulation_is_one_large_batch(fresh, tmp_path):
    """Mean over all tokens of the step, not mean of means: rows are of unequal length."""
    parts = [{**part, "dropout": 0.0} if part["method"] == "lora" else part for part in fresh["parts"]]
    flat = fresh | {"parts": parts, "steps": 4, "save_every": 4}
    one = small.curve(small.run(flat | {"batch": 4, "accumulate": 1, "out": str(tmp_path / "one")}))
    four = small.curve(small.run(flat | {"batch": 1, "accumulate": 4, "out": str(tmp_path / "four")}))
    for a, b in zip(one, four, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert a.tokens == b.tokens


def test_checkpointing_changes_no_number(whole, fresh):
    curve = small.curve(small.run(fresh, "checkpointing=true"))
    for a, b in zip(curve, small.curve(whole[0]), strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


def test_activations_are_computed_anew(fresh):
    """The start of a layer runs twice a micro-batch with checkpointing and once without."""
    counts = []
    for wanted in ("false", "true"):
        host, calls = open_base(fresh["model"]), []
        inside = host.model.get_submodule("model.language_model.layers.1.input_layernorm")
        inside.register_forward_hook(lambda module, args, output, calls=calls: calls.append(module.training))
        small.run(fresh | {"out": fresh["out"] + wanted}, f"checkpointing={wanted}", "steps=4", host=host)
        counts.append(sum(calls))
    assert counts == [8, 16]


def test_the_gradient_is_clipped(fresh, monkeypatch):
    norms = []
    plain = torch.optim.AdamW.step

    def step(self, *args, **keywords):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return plain(self, *args, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    curve = small.curve(small.run(fresh, "clip=0.5", "steps=4"))
    assert all(event.grad_norm > 1 for event in curve), "what is reported is the norm before"
    assert norms == pytest.approx([0.5] * 4, rel=1e-3)


def test_bfloat16_base_keeps_float32_patches(fresh):
    finished = small.run(fresh, "precision=bfloat16", "steps=4")[-1]
    tensors = [t for patched in finished.adapter.patches.values() for t in patched.tensors.values()]
    assert {t.dtype for t in tensors} == {torch.float32}
    assert finished.adapter.card["machine"]["dtype"] == "torch.bfloat16"


def test_the_evaluator_sees_the_adapter_and_disturbs_nothing(whole, fresh):
    seen = []

    def evaluator(host, step):
        assert not host.model.training
        assert not torch.is_grad_enabled()
        torch.rand(7)
        seen.append(all(slot.active for slot in slots(host.model)))
        activate(host.model)  # the bare base, to compare with
        return {"accuracy": step / 10}

    events = small.run(fresh, "eval_every=3", evaluator=evaluator)
    found = [(e.step, e.results["accuracy"]) for e in events if isinstance(e, Evaluated)]
    assert found == [(3, 0.3), (6, 0.6), (8, 0.8)]
    assert seen == [True] * 3
    assert [s.loss for s in small.curve(events)] == [s.loss for s in small.curve(whole[0])]


def test_an_evaluation_that_fails_costs_no_step(whole, fresh):
    def broken(host, step):
        raise DataError("A picture is missing.")

    with pytest.raises(DataError):
        small.run(fresh, "eval_every=8", evaluator=broken)
    events = small.run(fresh, "eval_every=8", evaluator=lambda host, step: {"accuracy": 1.0})
    assert [event.kind for event in events] == ["started", "notice", "evaluated", "memory", "finished"]
    assert events[0].resumed == 8
    logged = [e["event"] for e in read_log(Path(fresh["out"]) / "events.jsonl")]
    assert logged.count("evaluated") == 1
    assert tensors(fresh["out"]) == tensors(whole[1])


def test_a_template_that_reads_the_clock_is_trained_with_its_date(fresh, tmp_path):
    model = small.base(tmp_path / "clock")
    written = model / "chat_template.jinja"
    head = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
    written.write_text(head + "{{ date_string }}" + written.read_text())
    clock = fresh | {"model": str(model)}
    with pytest.raises(DataError, match="reads the clock"):
        small.run(clock, "steps=4")
    finished = small.run(clock, "steps=4", "variables.date_string=26 Jul 2024")[-1]
    assert finished.adapter.card["recipe"]["variables"] == {"date_string": "26 Jul 2024"}


def test_epochs_count_rows(fresh):
    events = small.run(fresh, "steps=null", "epochs=0.5")
    assert len(small.curve(events)) == 3, "half of 17 rows, 4 a step"


def test_a_damaged_checkpoint_is_told_and_the_one_before_used(whole, fresh):
    small.until(fit(small.recipe(fresh)), 7)
    (Path(fresh["out"]) / "checkpoints" / "step-000006" / "tensors.safetensors").write_bytes(b"half")
    events = small.run(fresh)
    assert events[0].resumed == 3
    assert isinstance(events[1], Notice)
    assert "step-000006" in events[1].what
    assert tensors(fresh["out"]) == tensors(whole[1])


def test_another_recipe_does_not_touch_the_folder(fresh):
    small.until(fit(small.recipe(fresh)), 5)
    files = {p: p.read_bytes() for p in Path(fresh["out"]).rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(ConfigError, match=r"parts.2.lr: 0.01 -> 0.02") as caught:
        small.run(fresh, "parts.2.lr=0.02")
    assert "choose another out" in str(caught.value)
    assert {p: p.read_bytes() for p in files} == files


def test_other_threads_are_refused_and_the_old_ones_taken_up(whole, fresh):
    small.until(fit(small.recipe(fresh)), 5)
    with pytest.raises(ConfigError, match="threads"):
        small.run(fresh, "threads=2")
    small.run({key: value for key, value in fresh.items() if key != "threads"})
    assert tensors(fresh["out"]) == tensors(whole[1])


def test_changed_rows_are_refused(fresh, tmp_path):
    changed = small.rows(tmp_path / "task.jsonl")
    source = [{"path": str(changed), "weight": 1.0}]
    small.until(fit(small.recipe(fresh | {"data": {"train": source}})), 4)
    changed.write_text(changed.read_text().replace("a dog", "a cat"))
    with pytest.raises(ConfigError, match="rows have changed") as caught:
        small.run(fresh | {"data": {"train": source}})
    assert "task" in str(caught.value)


def test_another_base_under_the_same_name_is_refused(fresh, tmp_path):
    model = small.base(tmp_path / "base")
    small.until(fit(small.recipe(fresh | {"model": str(model)})), 4)
    small.base(tmp_path / "base", initializer_range=0.5, vision_config={"num_hidden_layers": 4})
    with pytest.raises(BaseMismatch):
        small.run(fresh | {"model": str(model)})


def test_another_machine_is_told(fresh):
    small.until(fit(small.recipe(fresh)), 4)
    from tarsia.train.checkpoint import read, write

    folder = Path(fresh["out"]) / "checkpoints"
    held = read(folder / "step-000003")
    moved = {**held.values["machine"], "torch": "1.0"}
    write(folder, type(held)(held.step, held.tensors, {**held.values, "machine": moved}))
    notices = [event.what for event in small.run(fresh) if isinstance(event, Notice)]
    assert len(notices) == 1
    assert "torch 1.0 ->" in notices[0]
