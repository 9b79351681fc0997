"""Merges are tuned alike and measured as they are shipped; each claim of the chapter can fail."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from adapter.conftest import trained
from families import FAMILIES

from tarsia.adapter import Adapter, Host, probe, put
from tarsia.core.attach import Part, detach
from tarsia.core.errors import ConfigError
from tarsia.labs import merging, merging_tasks, merging_why
from tarsia.labs.chapters.merging import CHAPTER, Measured, chosen, compared
from tarsia.labs.frame import page
from tarsia.labs.frame.result import Result
from tarsia.labs.merging import FIRST, SUM, Choice, Merging, Tuned, beside, changed, choices, cosine, merged
from tarsia.labs.merging_tasks import COUNTS, SEEDS, TASKS
from tarsia.merge.adapters import merge
from tarsia.merge.ways import WAYS
from tarsia.methods.lora import LoRAConfig

PARTS = [Part("lora", "language.*.{q,up}; projector", LoRAConfig(rank=2, alpha=4.0))]


@pytest.fixture(scope="module")
def world():
    """A tiny host, three adapters with probes, a batch."""
    host = Host.of(FAMILIES["llava"].build()[0])
    batch = FAMILIES["llava"].batch()
    adapters = []
    for seed in range(3):
        trained(host, PARTS, "a", seed, size=0.3)
        adapters.append(Adapter.of(host, "a", PARTS, probe=probe(host, batch)))
        detach(host.model, "a")
    return host, adapters, batch


def logits(host, batch):
    with torch.no_grad():
        return host.model(**batch).logits


@pytest.mark.parametrize("way", ["task_arithmetic", "ties", "iso_c", "regmean", "knots_ties"])
def test_what_is_measured_in_memory_is_what_is_shipped(world, way):
    host, adapters, batch = world
    base = logits(host, batch)
    with changed(host, merged(WAYS[way], adapters, host), 0.6):
        inside = logits(host, batch)
    assert torch.equal(logits(host, batch), base)
    put(host, merge(adapters, [1.0] * 3, way, host, scale=0.6).adapter, "merged")
    live = logits(host, batch)
    detach(host.model, "merged")
    assert (live - base).abs().max() > 0.1
    torch.testing.assert_close(inside, live, atol=2e-5, rtol=1e-4)


def test_weights_come_back_after_an_error(world):
    host, adapters, batch = world
    base = logits(host, batch)
    own = {name: p.data_ptr() for name, p in host.model.named_parameters()}
    with pytest.raises(RuntimeError), changed(host, merged(WAYS[SUM], adapters, host), 1.0):
        raise RuntimeError
    assert torch.equal(logits(host, batch), base)
    assert {name: p.data_ptr() for name, p in host.model.named_parameters()} == own


class Fake(Merging):
    """Scores are a function of the choice and the scale, not of a model."""

    def __init__(self, out, peaks, ways):
        super().__init__(out, lambda name: None, ways)
        self.peaks, self.asked, self.strength = peaks, [], 1.0
        self._digests = {seed: ["a", "b"] for seed in SEEDS}

    def changes(self, choice, seed):
        way = "task_arithmetic" if choice.way in ("linear", "cat") else choice.way
        generator = torch.Generator().manual_seed(sum(map(ord, way + str(choice.options))))
        factor = 1 / 6 if choice.way == "linear" else 1.0
        return {"a": self.strength * factor * torch.randn(4, 4, generator=generator)}

    def scores(self, changes, scale, split, tasks=tuple(TASKS)):
        self.asked.append((scale, split))
        best = self.peaks(changes)
        right = max(0, round(40 - 20 * abs(torch.tensor(scale / best).log().item())))
        return {task: {"loss": abs(scale - best), "right": [1.0] * right + [0.0] * (50 - right)} for task in TASKS}

    def alone(self, seed, split):
        return dict.fromkeys(TASKS, 0.8)


def test_every_way_is_tried_at_the_same_scales(tmp_path):
    desk = Fake(tmp_path, lambda changes: 0.55, ("linear", SUM, "ties", "iso_c"))
    tuned = desk.tuned()
    for one in tuned.values():
        assert all(set(FIRST) <= set(curve) for curve in one.curves.values())
    assert {name: one.scale for name, one in tuned.items() if not one.like} == {SUM: 0.6, "ties": 0.6, "iso_c": 0.6}
    assert tuned["linear"].like == (SUM, pytest.approx(6.0)) and not tuned["linear"].curves
    assert [dict(choice.options)["density"] for choice in tuned["ties"].curves] == list(merging.DENSITIES)
    assert {split for _, split in desk.asked} == {"validation"}


@pytest.mark.parametrize("peak,scale", [(0.05, 0.05), (5.0, 5.6), (1.0, 1.0)])
def test_a_search_goes_on_until_the_best_has_a_worse_on_either_side(tmp_path, peak, scale):
    tuned = Fake(tmp_path, lambda changes: peak, (SUM,)).tuned()[SUM]
    curve = tuned.curves[tuned.choice]
    assert tuned.scale == scale and min(curve) < scale < max(curve)


def test_a_search_that_leaves_the_ladder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="beyond the ladder"):
        Fake(tmp_path, lambda changes: 1e3, (SUM,)).tuned()


def test_of_scales_that_are_equally_right_the_lower_loss_is_taken():
    assert beside({0.4: (50.0, -2.0), 0.6: (50.0, -1.0), 0.8: (50.0, -1.5)}, "x") == []
    assert beside({0.4: (50.0, -1.0), 0.6: (50.0, -2.0)}, "x") == [0.3]
    assert beside({0.4: (50.0, -3.0), 0.6: (50.0, -2.0)}, "x") == [0.8]


def test_a_result_of_another_merge_is_refused(tmp_path):
    """A way that computes something else than when it was measured has no result."""
    desk = Fake(tmp_path, lambda changes: 0.55, (SUM,))
    desk.tuned()
    asked = len(desk.asked)
    desk.tuned()
    assert len(desk.asked) == asked
    for other in ({"strength": 1.01}, {"_digests": {seed: ["a", "c"] for seed in SEEDS}}):
        again = Fake(tmp_path, lambda changes: 0.55, (SUM,))
        for name, value in other.items():
            setattr(again, name, value)
        with pytest.raises(ConfigError, match="another run"):
            again.tuned()


def test_options_that_are_tried_are_a_ways_own():
    assert choices(WAYS[SUM]) == [Choice(SUM)]
    assert {name for name, _ in choices(WAYS["iso_cts"])[0].options} == {"common"}
    assert len(choices(WAYS["dare_ties"])) == len(merging.DENSITIES)
    assert all(choice.taken.name == name for name, way in WAYS.items() for choice in choices(way))


def test_an_adapter_without_its_folder_is_refused(tmp_path, monkeypatch):
    learners = merging_tasks.Learners(tmp_path, lambda name: None)
    monkeypatch.setattr(learners, "kept", lambda name, told, work: {})
    with pytest.raises(ConfigError, match="no folder"):
        learners.adapter("bins", 1)


def test_what_is_kept_is_whole(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "file").write_text("new")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "old").write_text("old")
    merging_tasks.keep(tmp_path / "from", tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "to"]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_no_row_of_a_task_is_in_two_splits(task):
    drawn = {
        split: {(row[0], row[1], row[2][0].tobytes()) for row in TASKS[task](20, split)}
        for split in ("train", "validation", "held-out")
    }
    assert len(drawn["train"] & drawn["validation"]) == len(drawn["train"] & drawn["held-out"]) == 0
    assert not drawn["validation"] & drawn["held-out"]


def test_digits_that_are_validated_are_not_trained_on():
    rows = {split: [row[2][0].tobytes() for row in TASKS["digits"](COUNTS[split], split)] for split in COUNTS}
    assert [len(rows[split]) for split in COUNTS] == list(COUNTS.values())
    assert not {*rows["train"]} & {*rows["validation"]} and not {*rows["train"]} & {*rows["held-out"]}


def test_turned_changes_have_the_same_singular_values():
    change = {"a": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}
    found = merging_why.turned(change, 1)
    wanted = torch.linalg.svdvals(change["a"])
    torch.testing.assert_close(torch.linalg.svdvals(found["a"]), wanted, atol=1e-5, rtol=1e-5)
    assert abs(cosine(change, found)) < 0.9


def test_what_others_add_is_a_share_of_what_is_added():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2)})
    own = {"a": torch.tensor([[1.0, 0, 0], [0, 0, 0]])}
    other = {"a": torch.tensor([[0, 3.0, 0], [0, 0, 0]])}
    with merging_why.heard(model, own, [other]) as shares:
        model["a"](torch.tensor([[2.0, 1.0, 5.0], [2.0, 1.0, -5.0]]))
    assert shares == [{"a": pytest.approx(1.5)}]
    assert not model["a"]._forward_pre_hooks


ROWS = 100


def rights(share):
    right = round(share * ROWS)
    return {task: [1.0] * right + [0.0] * (ROWS - right) for task in TASKS}


def measured(best=0.5, rival=0.4, plain=0.3, alone=0.95, before=0.0, at_one=0.1, shipped=1.0, base=("a",), turned=0.9):
    """Ways with these held-out accuracies: the best looks at layers, the plain one at weights alone."""

    def tuned(name, validation, **curve):
        choice = choices(WAYS[name])[0]
        return Tuned(choice, 0.6, {choice: {0.4: 5.0, 0.6: 100 * validation, 1.0: 100 * at_one, **curve}})

    ways = {"regmean": best, "tsv": plain, "ties": rival, SUM: rival - 0.01}
    held = {name: [rights(share)] * len(SEEDS) for name, share in ways.items()}
    task = {"others": 3.0, "turned": 1.0, "with others": 0.0, "with turned": turned}
    why = {"each": [1.0] * 6, "sum": 2.5, "alike": 0.01, "tasks": dict.fromkeys(TASKS, task)}
    found = {name: tuned(name, share) for name, share in ways.items()}
    found["linear"] = Tuned(Choice("linear"), 1.0, {}, (SUM, 6.0))
    alones = [rights(alone)] * len(SEEDS)
    return Measured(found, held, alones, rights(before), why, shipped, frozenset(base))


@pytest.mark.parametrize(
    "changes,fails",
    [
        ({}, []),
        ({"best": 0.43}, ["the best way before TIES, points"]),
        ({"best": 0.45}, []),
        ({"best": 0.35, "rival": 0.3}, []),
        ({"at_one": 0.21}, ["the sum at scale 1, %"]),
        ({"turned": 0.69}, ["beside five turned at random, %"]),
        ({"alone": 0.89}, ["the worst adapter alone, %"]),
        ({"before": 0.31}, ["the base at most, %"]),
        ({"shipped": 0.99}, ["the best from its files, % of rows"]),
    ],
)
def test_each_bound_can_fail(changes, fails):
    found = compared(measured(**changes))
    assert [bound.what for bound in CHAPTER.bounds if bound.judge(found) == "FAIL"] == fails


def test_a_lead_that_is_not_of_all_rows_fails():
    """An interval that has 0 in it: a few rows make the lead."""
    m = measured(best=0.5, rival=0.4)
    odd = {task: ([1.0] * ROWS if task == "bins" else [0.0] * ROWS) for task in TASKS}
    other = {task: ([1.0] * (ROWS // 2) + [0.0] * (ROWS // 2) if task == "forms" else [0.0] * ROWS) for task in TASKS}
    m = Measured(
        m.tuned,
        {**m.held, "regmean": [odd] * len(SEEDS), "ties": [other] * len(SEEDS)},
        m.alone,
        m.before,
        m.why,
        1.0,
        m.bases,
    )
    row = compared(m).rows["ahead: the best"]
    assert row["points before TIES"] == pytest.approx(100 * 0.5 / 6 / 0.95, abs=0.01)
    assert row["from"] < row["points before TIES"] < row["to"]


def test_the_best_is_chosen_on_validation_rows():
    m = measured()
    held = {**m.held, "tsv": [rights(0.9)] * len(SEEDS)}
    found = compared(Measured(m.tuned, held, m.alone, m.before, m.why, 1.0, m.bases))
    assert found.rows["ahead: the best"]["way"] == "regmean" and chosen(m.tuned) == "regmean"
    assert found.rows["ahead: the best of those that look at weights alone"]["way"] == "ties"


def test_adapters_of_different_bases_are_refused():
    with pytest.raises(ConfigError, match="different bases"):
        compared(measured(base=("a", "b")))


def test_the_page_and_the_picture_are_drawn():
    result = Result("merging", compared(measured()), (), "2026-01-01", {})
    text = page.page(CHAPTER, result)
    assert "| linear | task_arithmetic | 0.1667 |" in text and "| regmean |" in text
    assert page.picture(CHAPTER, result).startswith(b"\x89PNG")


def test_the_best_from_its_files(tmp_path, world, monkeypatch):
    from tarsia.labs import merging_shipped

    host, adapters, batch = world
    seen = []
    desk = SimpleNamespace(
        learners=SimpleNamespace(
            out=tmp_path, encoded=lambda task, split: task, kept=lambda name, told, work: {**told, **work()}
        ),
        host=host,
        parents=lambda seed: dict(enumerate(adapters)),
        told=lambda *_: {},
        changes=lambda *_: {},
    )
    monkeypatch.setattr(merging_shipped, "open_base", lambda *_, **__: host)

    def score(host, task):
        seen.append(logits(host, batch))
        return {"right": [1.0, 0.0]}

    monkeypatch.setattr(merging_shipped, "score", score)
    tuned = Tuned(Choice("iso_c"), 0.7, {})
    same = merging_shipped.shipped(desk, tuned, {task: [1.0, 0.0] for task in TASKS})
    assert same == 1.0
    detach(host.model, "merged")
    with changed(host, merged(WAYS["iso_c"], adapters, host), 0.7):
        torch.testing.assert_close(seen[0], logits(host, batch), atol=2e-5, rtol=1e-4)
    assert merging_shipped.shipped(desk, tuned, {task: [1.0, 1.0] for task in TASKS}) == 0.5
    detach(host.model, "merged")
