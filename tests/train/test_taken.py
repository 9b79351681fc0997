"""What a run took: each block once, by what it is for, and the sums those of the run itself."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train import small

from tarsia.cli.progress import memory
from tarsia.data import Batch
from tarsia.quant.codec import Scheme
from tarsia.quant.tensor import Weight4
from tarsia.train import taken
from tarsia.train.events import Event, Finished, Memory, Notice, Step, as_json, read_log
from tarsia.train.loop import fit
from tarsia.train.memory import Live, Phase, live, phase
from tarsia.train.taken import PERSISTENT, Meter, described, held, sizes, storages, totals


@pytest.fixture(autouse=True)
def alone() -> None:
    """What earlier tests left in cycles would go while a step is measured."""
    gc.collect()


def batch(lines: int, length: int, labelled: int = 1, pixels: int = 0) -> Batch:
    labels = torch.full((lines, length), -100)
    labels[0, :labelled] = 5
    inputs = {"input_ids": labels.clone()} | ({"pixel_values": torch.zeros(pixels)} if pixels else {})
    return Batch(inputs, labels, (0,) * lines, ("a",) * lines, tuple(range(lines)))


class Patched(nn.Module):
    """A base of one layer [16, 32], tied to another, with a buffer, and a patch [32, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16, bias=False)
        self.tied = nn.Linear(32, 16, bias=False)
        self.tied.weight = nn.Parameter(self.layer.weight.data[2:], requires_grad=False)
        self.layer.weight.requires_grad_(False)
        self.register_buffer("table", torch.zeros(10))


def stub() -> Any:
    """As much of a run as is asked for its memory."""
    model, patch = Patched(), nn.Linear(4, 32, bias=False)
    return SimpleNamespace(
        model=model,
        patches={"site": patch},
        optimiser=torch.optim.AdamW(patch.parameters(), fused=True),
        device=torch.device("cpu"),
        step=0,
    )


class TestHeld:
    def test_each_block_is_counted_once(self) -> None:
        run = stub()
        found = totals(held(run, [batch(2, 5)], everything=False))
        # the tied weight is a view; labels and ids are int64
        assert found == {
            "weights": 16 * 32 * 4 + 10 * 4,
            "quantised": 0,
            "patches": 32 * 4 * 4,
            "states": 0,
            "other": 0,
            "inputs": 2 * (2 * 5 * 8),
        }

    def test_states_are_there_after_a_step(self) -> None:
        run = stub()
        (parameter,) = run.patches["site"].parameters()
        parameter.grad = torch.zeros_like(parameter)
        run.optimiser.step()
        assert totals(held(run, (), everything=False))["states"] == 2 * parameter.nbytes + 4

    def test_a_weight_in_4_bits_is_its_codes_scales_and_levels(self) -> None:
        run = stub()
        weight = Weight4.of(torch.randn(64, 64), Scheme("nf4", nested=False))
        run.model.quantised = nn.Linear(64, 64, bias=False)
        run.model.quantised.weight = nn.Parameter(weight, requires_grad=False)
        found = totals(held(run, (), everything=False))
        assert found["quantised"] == 64 * 64 // 2 + 64 * 64 // 64 * 4 + weight.levels.untyped_storage().nbytes()
        assert found["weights"] == 16 * 32 * 4 + 10 * 4
        assert len(list(storages(weight))) == 3

    def test_a_patch_that_holds_the_bases_weight_adds_nothing(self) -> None:
        run = stub()
        run.patches["site"].base = run.model.layer.weight
        found = totals(held(run, (), everything=False))
        assert (found["weights"], found["patches"]) == (16 * 32 * 4 + 10 * 4, 32 * 4 * 4)

    def test_the_rest_of_the_process_is_other(self) -> None:
        run = stub()
        before = totals(held(run, (), everything=True))
        kept = [torch.empty(1000, dtype=torch.uint8)]
        after = totals(held(run, (), everything=True))
        assert after["other"] - before["other"] == 1000
        assert all(before[name] == after[name] for name in before if name != "other")
        del kept

    def test_what_is_elsewhere_does_not_count(self) -> None:
        run = stub()
        run.device = torch.device("meta")
        assert set(totals(held(run, [batch(2, 5)], everything=False)).values()) == {0}


class TestWhich:
    """Steps that are watched."""

    def watched(self, *steps: tuple[Batch, ...]) -> list[bool]:
        meter = Meter()
        return [meter._larger(step) for step in steps]

    def test_the_first_two_and_then_those_that_are_larger_than_all_since_the_second(self) -> None:
        big, little, middle = (batch(2, 10),), (batch(1, 5),), (batch(1, 8),)
        assert self.watched(big, little, little, middle, little, middle, big, big) == [
            *(True, True, False, True, False, False, True, False)
        ]

    @pytest.mark.parametrize(
        "larger",
        [batch(5, 4), batch(1, 11), batch(1, 10, labelled=2), batch(1, 10, pixels=1)],
        ids=["tokens", "length", "labelled", "pixels"],
    )
    def test_larger_in_any_way(self, larger: Batch) -> None:
        usual = (batch(1, 10),)
        assert self.watched(usual, usual, usual, (larger,), (larger,)) == [True, True, False, True, False]

    def test_the_largest_micro_batch_counts_wherever_it_is(self) -> None:
        one, two = batch(1, 10), batch(1, 12)
        assert self.watched((one, one), (one, one), (one, two), (two, one)) == [True, True, True, False]

    def test_sizes(self) -> None:
        assert sizes(batch(3, 7, labelled=2, pixels=50)) == (21, 7, 50, 2)


class TestStep:
    """A step whose every block is known."""

    def step(self, run: Any, meter: Meter, x: Tensor, batches: tuple[Batch, ...]) -> None:
        (parameter,) = run.patches["site"].parameters()
        with meter.over(run, batches):
            phase(Phase.FORWARD)
            loss = (x @ parameter.t()).sum()
            phase(Phase.BACKWARD)
            loss.backward()
            del loss
            phase(Phase.UPDATE)
            run.optimiser.step()
            run.optimiser.zero_grad()
        run.step += 1

    def test_the_peak_is_what_is_there_and_what_comes(self) -> None:
        run, meter, x = stub(), Meter(), torch.randn(1000, 4)
        batches = (batch(2, 5),)
        self.step(run, meter, x, batches)
        self.step(run, meter, x, batches)
        found = meter.event(run)
        product, gradient, one = 1000 * 32 * 4, 32 * 4 * 4, 4
        inputs = 2 * (2 * 5 * 8)
        # the product is gone once it is summed; its gradient, a one that is spread, is laid out for the multiplication
        assert found.number == 2
        assert found.phase == "backward"
        assert found.step == inputs + 2 * one + product + gradient
        assert found.gradients == gradient
        assert found.inputs == inputs
        assert found.states == 2 * gradient + 4
        assert found.watched == 2
        lasting = sum(getattr(found, name) for name in PERSISTENT)
        assert found.peak == lasting + found.step == max(found.phases.values())
        assert found.phases.keys() == {"forward", "backward", "update"}
        assert found.unwatched == ""

    def test_a_smaller_step_later_changes_nothing(self) -> None:
        run, meter = stub(), Meter()
        for rows in (100, 1000, 10):
            self.step(run, meter, torch.randn(rows, 4), (batch(2, rows),))
        assert (meter.event(run).number, meter.watched) == (2, 2)

    def test_a_step_that_fails_is_none(self) -> None:
        run, meter = stub(), Meter()
        with pytest.raises(ValueError, match="planted"), meter.over(run, (batch(2, 5),)):
            raise ValueError("planted")
        assert meter.event(run).peak is None
        assert memory(meter.event(run)).startswith("not measured in the steps: there were none")

    def test_a_profiler_is_left_alone_and_named(self) -> None:
        run, meter = stub(), Meter()
        with torch.autograd.profiler.profile(use_kineto=True):
            self.step(run, meter, torch.randn(5, 4), (batch(2, 5),))
        found = meter.event(run)
        assert (found.peak, found.step, found.watched) == (None, None, 0)
        assert found.unwatched == "a profiler is running"
        assert "not measured in the steps: a profiler is running" in memory(found)

    def test_through_a_checkpoint(self) -> None:
        run, meter = stub(), Meter()
        self.step(run, meter, torch.randn(1000, 4), (batch(2, 5),))
        after = Meter()
        after.restore(json.loads(json.dumps(meter.state())))
        self.step(run, after, torch.randn(10, 4), (batch(2, 5),))
        before, found = meter.event(run), after.event(run)
        assert (found.peak, found.number, found.batch) == (before.peak, 1, before.batch)
        assert found.watched == 2

    def test_the_process_of_every_stretch_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        meter = Meter()
        monkeypatch.setattr(meter._process, "read", lambda: 900)
        for peak in (300, 200):  # what the third one tells is not of the second alone
            after = Meter()
            after.restore(meter.state())
            monkeypatch.setattr(after._process, "read", lambda peak=peak: peak)
            meter = after
        assert meter.state()["process"] == meter.event(stub()).process == 900

    def test_parameters_without_memory_are_nobodys(self) -> None:
        lazy, run, meter = nn.LazyLinear(3), stub(), Meter()
        self.step(run, meter, torch.randn(10, 4), (batch(2, 5),))
        assert meter.watched == 1 and lazy.weight is not None

    def test_another_device_begins_anew(self) -> None:
        run, meter = stub(), Meter()
        self.step(run, meter, torch.randn(1000, 4), (batch(2, 5),))
        state = meter.state()
        state["most"]["device"] = "cuda:0"
        after = Meter()
        after.restore(state)
        self.step(run, after, torch.randn(10, 4), (batch(2, 5),))
        assert after.event(run).number == 2

    def test_its_line(self) -> None:
        run, meter = stub(), Meter()
        self.step(run, meter, torch.randn(1000, 4), (batch(2, 5),))
        said = memory(meter.event(run))
        assert "GB of tensors at most (weights 2.09e-06, patches 5.12e-07" in said
        assert "in step 1, backward" in said


class FakeCuda:
    """An allocator's counters, as ``torch.cuda`` gives them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 * self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device: object) -> None:
        self.peak = self.now

    def take(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class TestCuda:
    def test_each_phase_and_the_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda, run, meter = FakeCuda(monkeypatch), stub(), Meter()
        run.device = torch.device("cuda:0")
        cuda.take(9000)
        cuda.take(-8000)  # loading
        for most in (500, 700, 600):
            with meter.over(run, (batch(2, 5),)):
                phase(Phase.FORWARD)
                cuda.take(most)
                phase(Phase.BACKWARD)
                cuda.take(-most)
                cuda.take(50)
                phase(Phase.UPDATE)
                cuda.take(-50)
            run.step += 1
            cuda.take(4000)
            cuda.take(-4000)  # an evaluation
        found = meter.event(run)
        assert found.phases == {"forward": 1700, "backward": 1700, "update": 1050}
        assert (found.peak, found.phase, found.number) == (1700, "forward", 2)
        assert (found.allocated, found.reserved) == (9000, 18000)
        assert found.watched == 3
        assert "18000" not in memory(found) and "1.8e-05 GB reserved" in memory(found)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small.world(tmp_path_factory.mktemp("taken"))


@pytest.fixture(scope="module")
def whole(values: dict[str, Any]) -> Iterator[tuple[list[Event], list[tuple[int, int]]]]:
    """A run's events; for each watched step what lived on when it ended, and by how much all tensors had grown."""
    found = []
    usual = Meter._recorded

    class Kept:
        """A record that is still there afterwards."""

        def __init__(self, standing: Any) -> None:
            self.watching = live(standing)

        def __enter__(self) -> Live:
            self.watched = self.watching.__enter__()
            kept.append(self.watched)
            return self.watched

        def __exit__(self, *error: Any) -> None:
            self.watching.__exit__(*error)

    kept: list[Live] = []

    @contextmanager
    def recorded(self: Meter, run: Any, batches: Any) -> Iterator[dict[str, int]]:
        before = totals(held(run, batches, everything=True))
        with usual(self, run, batches) as peaks:
            yield peaks
        after = totals(held(run, batches, everything=True))
        found.append((kept[-1].line[-1][1], sum(after.values()) - sum(before.values())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taken, "live", Kept)
        patch.setattr(Meter, "_recorded", recorded)
        yield small.run(values), found


def event(events: list[Event]) -> Memory:
    (found,) = [event for event in events if isinstance(event, Memory)]
    return found


class TestRun:
    def test_all_that_lives_on_after_a_step_is_seen_by_both(self, whole: Any) -> None:
        """Torch's record and the tensors that Python finds know nothing of each other: they agree to the byte."""
        _, found = whole
        assert len(found) >= 2
        for lived_on, grown in found:
            assert lived_on == grown
        assert found[0][0] > 0  # the optimiser's states

    def test_its_event(self, values: dict[str, Any], whole: Any) -> None:
        events, watched = whole
        found = event(events)
        assert [e.kind for e in events][-2:] == ["memory", "finished"]
        assert found.peak == sum(getattr(found, name) for name in PERSISTENT) + found.step
        assert found.watched == len(watched)
        assert found.phases.keys() == {"forward", "backward", "update"}
        assert 2 <= found.number <= 8
        assert found.patches == found.gradients
        assert found.states >= 2 * found.patches
        assert found.inputs + found.gradients < found.step
        assert found.quantised == 0
        assert found.batch["batches"] == 2
        assert found.batch["tokens"] == found.batch["shapes"]["input_ids"][0] * found.batch["shapes"]["input_ids"][1]
        (finished,) = [e for e in events if isinstance(e, Finished)]
        assert finished.adapter.card["memory"]["peak"] == found.peak
        (logged,) = [e for e in read_log(Path(values["out"]) / "events.jsonl") if e["event"] == "memory"]
        assert logged == json.loads(as_json(found))

    def test_weights_are_those_of_the_files(self, values: dict[str, Any], whole: Any) -> None:
        files = Path(values["model"]).glob("*.safetensors")
        size = sum(path.stat().st_size for path in files)
        assert event(whole[0]).weights == pytest.approx(size, rel=0.05)

    def test_a_run_that_measures_nothing_has_the_same_curve(
        self, values: dict[str, Any], whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Meter, "over", lambda self, run, batches: nullcontext())
        events = small.run(values | {"out": str(tmp_path / "out")})
        assert event(events).peak is None
        assert small.curve(events) == small.curve(whole[0])
        adapters = [Path(e.folder) for ran in (events, whole[0]) for e in ran if isinstance(e, Finished)]
        first, second = ((folder / "adapter_model.safetensors").read_bytes() for folder in adapters)
        assert first == second

    def test_a_run_that_goes_on_remembers(self, values: dict[str, Any], whole: Any, tmp_path: Path) -> None:
        other = values | {"out": str(tmp_path / "out")}
        small.until(fit(small.recipe(other)), 7)
        events = small.run(other)
        found = event(events)
        assert found == event(whole[0])
        assert found.peak >= event(whole[0]).peak - event(whole[0]).other
        again = event(small.run(other))  # nothing was left to do
        assert (again.peak, again.number, again.phase) == (found.peak, found.number, found.phase)
        assert not any(isinstance(e, Notice) and "memory" in e.what for e in events)
        assert sum(isinstance(e, Step) for e in events) == 2


def test_what_a_batch_was() -> None:
    found = described((batch(1, 4), batch(2, 9, labelled=3, pixels=7)))
    assert found == {
        "batches": 2,
        "rows": 2,
        "tokens": 18,
        "labelled": 3,
        "pictures": 0,
        "shapes": {"input_ids": [2, 9], "pixel_values": [7]},
    }
