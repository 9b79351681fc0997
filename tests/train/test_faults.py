"""Faults that are planted: each is a clear refusal, and nothing is lost."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from train import small

from tarsia.adapter import Host, open_base
from tarsia.core.attach import slots
from tarsia.core.errors import AdapterError, ConfigError, DataError, SelectionError, TrainingError
from tarsia.train import run as run_module
from tarsia.train.checkpoint import found, locked, newest
from tarsia.train.events import Log, Memory, Started, Step
from tarsia.train.loop import fit


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return small.world(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def fresh(values, tmp_path):
    return values | {"out": str(tmp_path / "out")}


def part(select: str, method: str = "lora", **options) -> dict:
    return {"parts": [{"method": method, "select": select, "lr": 1e-3, **options}]}


@pytest.mark.parametrize(
    "select, helps",
    [
        ("language.*.qq", "did you mean q"),  # misspelt role
        ("langage", "did you mean language"),  # misspelt component
        ("language.*.{q,router}", "half matched"),  # half of the term is there
        ("language.7..", "0..2"),  # no such layers
        ("vision.2", "no gradient can reach"),  # LLaVA reads the layer before the last
    ],
)
def test_selections_that_match_not_all_stop_before_step_0(fresh, select, helps):
    host = open_base(fresh["model"])
    with pytest.raises(SelectionError) as caught:
        small.run(fresh | part(select), host=host)
    assert helps in str(caught.value)
    assert not slots(host.model)
    assert not (Path(fresh["out"]) / "events.jsonl").exists()


def test_a_run_that_can_not_be_built_leaves_a_callers_base_as_it_was(fresh, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    host = open_base(fresh["model"])
    frozen = [p.requires_grad for p in host.model.parameters()]
    monkeypatch.setattr(run_module, "adamw", no_memory)
    with pytest.raises(MemoryError):
        small.run(fresh, host=host)
    assert not slots(host.model)
    assert [p.requires_grad for p in host.model.parameters()] == frozen
    monkeypatch.undo()
    small.run(fresh, "steps=3", host=host)


def test_two_parts_on_one_site(fresh):
    twice = part("language.*.q")["parts"] + part("language.1.q")["parts"]
    with pytest.raises(Exception, match="Two parts claim") as caught:
        small.run(fresh | {"parts": twice})
    assert "disjoint" in str(caught.value)


def poison_patch(host, site: str) -> None:
    for slot in slots(host.model):
        for held in slot.patches.values():
            for key, patch in held.items():
                if slot.sites[key].path.endswith(site):
                    next(iter(patch.parameters())).data.fill_(math.nan)


def test_nan_in_a_patch_stops_and_keeps_the_last_checkpoint(fresh):
    host = open_base(fresh["model"])

    def poison(event):
        if isinstance(event, Step) and event.step == 4:
            poison_patch(host, "language_model.layers.0.self_attn.q_proj")

    with pytest.raises(TrainingError, match="step 5 is not a number") as caught:
        small.drive(fit(small.recipe(fresh), host=host), poison)
    assert "row" in caught.value.given
    assert "task" in caught.value.given
    assert [p.name for p in found(Path(fresh["out"]) / "checkpoints")] == ["step-000003"]
    assert not (Path(fresh["out"]) / "adapter").exists()
    assert small.run(fresh)[0].resumed == 3, "the run goes on from there once the cause is gone"


def test_nan_in_a_row_names_the_row(fresh, monkeypatch):
    """A picture of numbers that are none, in one row of the batch."""
    plain = run_module.Run.encode

    def poisoned(self, numbers):
        batch = plain(self, numbers)
        if self.step == 3 and "pixel_values" in batch.inputs:
            batch.inputs["pixel_values"][0] = math.nan
        return batch

    monkeypatch.setattr(run_module.Run, "encode", poisoned)
    events = small.recipe(fresh | {"batch": 4, "accumulate": 1})
    with pytest.raises(TrainingError, match="loss of step 4 is not a number") as caught:
        list(fit(events))
    assert caught.value.given.count("row") == 1, "only the row with that picture"


def test_a_gradient_that_is_no_number_names_the_site(fresh):
    host = open_base(fresh["model"])

    def poison(event):
        if isinstance(event, Step) and event.step == 1:
            patch = next(p for s in slots(host.model) for held in s.patches.values() for p in held.values())
            next(patch.parameters()).register_hook(lambda g: g * math.inf)

    with pytest.raises(TrainingError, match="gradient of step 2 is not a number") as caught:
        small.drive(fit(small.recipe(fresh), host=host), poison)
    assert "model." in caught.value.given
    assert "row" in caught.value.given


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full while ``disk["full"]`` is true."""
    state = {"full": False}

    def limited(function):
        def call(*args, **keywords):
            if state["full"]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **keywords)

        return call

    monkeypatch.setattr(os, "fsync", limited(os.fsync))
    monkeypatch.setattr(os, "replace", limited(os.replace))
    return state


@pytest.mark.parametrize("synced", [False, True])
def test_a_full_disk_while_saving_keeps_the_old_checkpoint(fresh, disk, monkeypatch, synced):
    """Full before the log is forced to the disk, or only for the checkpoint itself."""
    plain, reached = Log.sync, []

    def sync(self):
        length = plain(self)
        disk["full"] = 6 in reached
        return length

    def fill(event):
        if isinstance(event, Step):
            reached.append(event.step)
            disk["full"] = event.step == 6 and not synced

    if synced:
        monkeypatch.setattr(Log, "sync", sync)
    with pytest.raises(TrainingError, match="disk is full") as caught:
        small.drive(fit(small.recipe(fresh)), fill)
    assert ("step-000003" if synced else "events.jsonl") in str(caught.value)
    disk["full"] = False
    monkeypatch.setattr(Log, "sync", plain)
    kept, notices = newest(Path(fresh["out"]) / "checkpoints")
    assert (kept.step, notices) == (3, ())
    assert small.run(fresh)[0].resumed == 3


def test_a_full_disk_for_the_adapter_keeps_the_last_checkpoint(fresh, disk):
    def fill(event):
        disk["full"] = isinstance(event, Memory)

    with pytest.raises(AdapterError, match="The adapter can not be written"):
        small.drive(fit(small.recipe(fresh)), fill)
    disk["full"] = False
    assert not (Path(fresh["out"]) / "adapter").exists()
    assert [event.kind for event in small.run(fresh)] == ["started", "notice", "memory", "finished"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_for_the_log(fresh):
    Path(fresh["out"]).mkdir()
    (Path(fresh["out"]) / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="The event log can not be written"):
        small.run(fresh)


def source(path: Path, rows: list[dict]) -> dict:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": {"train": [{"path": str(path)}]}}


def test_a_missing_picture_names_row_and_file(fresh, tmp_path):
    rows = source(tmp_path / "gone.jsonl", [{"image": "gone.png", "question": "what?", "answer": "a cat"}] * 3)
    with pytest.raises(DataError, match="gone") as caught:
        small.run(fresh | rows)
    assert "gone.png" in str(caught.value)
    assert "row" in str(caught.value)


def test_more_pictures_than_placeholders(fresh, tmp_path):
    small.rows(tmp_path / "shown.jsonl", 1, (1,))
    turns = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "a cat"}]
    rows = source(tmp_path / "more.jsonl", [{"images": ["shown-0-0.png"] * 2, "messages": turns}])
    with pytest.raises(DataError, match="fewer picture placeholders than pictures"):
        small.run(fresh | rows)


def test_vision_patches_without_any_picture(fresh, tmp_path):
    talk = {"data": {"train": [{"path": str(small.rows(tmp_path / "talk.jsonl", 4, (0,)))}]}}
    with pytest.raises(TrainingError, match="No row has a picture") as caught:
        small.run(fresh | talk)
    assert "talk" in caught.value.given
    curve = small.curve(small.run(fresh | talk | part("language.*.q")))
    assert len(curve) == 8, "language alone can be trained on text alone"


def test_pictures_that_are_never_drawn(fresh, tmp_path):
    talk = small.rows(tmp_path / "talk.jsonl", 4, (0,))
    task = fresh["data"]["train"][0]
    mixed = {"data": {"train": [{**task, "weight": 1e-9}, {"path": str(talk), "weight": 1.0}]}}
    with pytest.raises(TrainingError, match="no step held a picture") as caught:
        small.run(fresh | mixed)
    assert "vision_tower" in caught.value.given or "projector" in caught.value.given
    assert not (Path(fresh["out"]) / "adapter").exists()


def without_gradient(values) -> Host:
    """A base whose projector's output is cut off from the loss, as a wrongly written model would."""
    host = open_base(values["model"])
    projector = host.model.get_submodule("model.multi_modal_projector")
    projector.register_forward_hook(lambda module, args, output: output.detach())
    return host


def test_a_live_patch_without_gradient_stops_the_run(fresh):
    with pytest.raises(TrainingError, match="never had a gradient: 4 steps with pictures") as caught:
        small.run(fresh, host=without_gradient(fresh))
    assert "multi_modal_projector.linear_1" in caught.value.given or "vision_tower" in caught.value.given
    assert "6 patches" in caught.value.what, "two of the projector, four of the vision tower, none of the language"


def test_a_short_run_is_judged_at_its_end(fresh):
    with pytest.raises(TrainingError, match="never had a gradient"):
        small.run(fresh, "steps=3", host=without_gradient(fresh))
    assert not found(Path(fresh["out"]) / "checkpoints")


def test_the_watch_goes_on_after_a_resume(fresh):
    """Two steps before the kill, two after: the dead patch is found all the same."""
    small.until(fit(small.recipe(fresh, "save_every=2"), host=without_gradient(fresh)), 3)
    with pytest.raises(TrainingError, match="After step 4"):
        small.run(fresh, "save_every=2", host=without_gradient(fresh))


def test_two_runs_in_one_folder(fresh):
    events = fit(small.recipe(fresh))
    assert isinstance(next(events), Started)
    with pytest.raises(ConfigError, match="Another run"):
        small.run(fresh)
    events.close()
    with locked(Path(fresh["out"])):
        pass


def test_nothing_labelled_is_refused(fresh, tmp_path):
    rows = source(tmp_path / "long.jsonl", [{"question": "what is this? " * 40, "answer": "a cat"}])
    with pytest.raises(DataError, match="nothing that the assistant says is left"):
        small.run(fresh | rows | part("language.*.q"), "max_length=20")


def test_a_missing_source(fresh):
    with pytest.raises(DataError, match="missing"):
        small.run(fresh | {"data": {"train": [{"path": "nowhere.jsonl"}]}})


def test_a_log_that_was_cut_by_someone_else(fresh):
    small.until(fit(small.recipe(fresh)), 4)
    (Path(fresh["out"]) / "events.jsonl").write_text("")
    with pytest.raises(TrainingError, match="lost lines"):
        small.run(fresh)


def test_a_checkpoint_of_other_patches(fresh, monkeypatch):
    small.until(fit(small.recipe(fresh)), 4)
    from tarsia.train.checkpoint import read, write

    folder = Path(fresh["out"]) / "checkpoints"
    held = read(folder / "step-000003")
    key = next(k for k in held.tensors if k.startswith("patch/"))
    write(folder, type(held)(held.step, {**held.tensors, key: torch.zeros(1)}, held.values))
    with pytest.raises(TrainingError, match="patches are not this run"):
        small.run(fresh)


def test_a_model_that_can_not_recompute(fresh):
    host = open_base(fresh["model"])
    host.model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="can not be recomputed"):
        small.run(fresh, "checkpointing=true", host=host)
    assert not slots(host.model)


@pytest.mark.parametrize("text", ["{", "[]", '{"hash": "x"}'])
def test_a_folder_whose_recipe_can_not_be_read(fresh, text):
    small.until(fit(small.recipe(fresh)), 4)
    (Path(fresh["out"]) / "recipe.json").write_text(text)
    with pytest.raises(ConfigError, match="can not be read"):
        small.run(fresh)


def test_a_full_disk_before_the_first_byte(fresh, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TrainingError, match="disk is full"):
        small.run(fresh)
