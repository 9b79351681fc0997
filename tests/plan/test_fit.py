"""Recipes that fit: every one is run and held to its budget; what is left out is worse; what can not be is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from train import small

from tarsia.cli import main
from tarsia.core.errors import PlanError
from tarsia.methods.lora import LoRAConfig
from tarsia.plan import proposal as proposals
from tarsia.plan import sacrifices
from tarsia.plan.fit import Found, budget, fitting
from tarsia.plan.proposal import CLEARLY, OF_DEVICE, OF_TENSORS, Figures, Nominal, Proposal, as_yaml, best, write
from tarsia.plan.rehearse import Outline
from tarsia.plan.sacrifices import Change, Known
from tarsia.plan.variants import Effort, Rehearsals
from tarsia.train.loop import fit
from tarsia.train.memory import live
from tarsia.train.recipe import Recipe
from tarsia.train.taken import storages

EFFORT = Effort(rehearsals=26, seconds=600)
SHARES = (0.7, 0.5, 0.36)
"""Budgets, as shares of what the recipe takes as it is."""


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fit")
    data = {"train": [{"path": str(small.rows(folder / "task.jsonl", 6, (2,)))}]}
    changes = {
        "model": str(small.base(folder / "base")),
        "parts": [
            {"method": "lora", "select": "language", "rank": 64, "alpha": 48, "lr": 1e-3, "dropout": 0.1},
            {"method": "full", "select": "projector", "lr": 1e-3},
        ],
        "data": data,
        "out": str(folder / "out"),
    }
    rest = {"batch": 2, "steps": 2, "warmup": 0, "threads": 1, "device": "cpu", "precision": "float32"}
    return changes | rest


@pytest.fixture(scope="module")
def as_it_is(values: dict[str, Any]) -> Found:
    return search(values, 10**12)


@pytest.fixture(scope="module")
def found(values: dict[str, Any], as_it_is: Found) -> dict[float, Found]:
    whole = as_it_is.as_it_is.figures.total
    return {share: search(values, int(share * whole)) for share in SHARES[:1]}


def search(values: dict[str, Any], size: int, effort: Effort = EFFORT) -> Found:
    return fitting(Recipe.of(values), size, need=OF_TENSORS, effort=effort)


def measured(recipe: Recipe) -> int:
    """The most bytes of tensors at once while a recipe is run, its base among them."""
    host = recipe.open()
    held = {block._cdata: block for t in (*host.model.parameters(), *host.model.buffers()) for block in storages(t)}
    there = sum(block.nbytes() for block in held.values())
    with live(held.values()) as watched:
        for _ in fit(recipe, host=host):
            pass
    return there + watched.peak


def test_a_recipe_that_fits_is_said_to_fit_before_anything_else(as_it_is: Found) -> None:
    (first,) = as_it_is.proposals
    assert first.changes == () and first.gives_up == () and as_it_is.tried == 1
    assert "as it is" in first.text
    assert as_it_is.missing < 0


def test_every_proposal_stays_within_its_budget_when_it_is_run(found: dict[float, Found]) -> None:
    hold(found)


@pytest.mark.slow
def test_every_proposal_at_three_budgets(values: dict[str, Any], as_it_is: Found) -> None:
    whole = as_it_is.as_it_is.figures.total
    found = {share: search(values, int(share * whole)) for share in SHARES}
    hold(found)
    assert all(each.proposals for each in found.values())
    assert all(p.weight for p in found[0.36].proposals)


def hold(found: dict[float, Found]) -> None:
    """Run every proposal, and hold it to its budget and its plan."""
    took = {(share, p.name): (measured(p.recipe), each.budget) for share, each in found.items() for p in each.proposals}
    assert {share for share, _ in took} == set(found)
    assert all(held <= size for held, size in took.values()), took
    # and what is planned is what was measured: no proposal is small by being wrong
    planned = {(share, p.name): p.figures.total for share, each in found.items() for p in each.proposals}
    assert all(took[key][0] == pytest.approx(planned[key], rel=0.05) for key in planned), (took, planned)


def test_the_recipe_itself_does_not_stay_within_any_of_them(found: dict[float, Found], values: dict[str, Any]) -> None:
    took = measured(Recipe.of(values | {"out": values["out"] + "-itself"}))
    assert all(took > each.budget for each in found.values())


def test_what_changes_no_number_comes_first_and_then_what_takes_less_time(found: dict[float, Found]) -> None:
    for each in found.values():
        order = [(p.weight, p.lost) for p in each.proposals]
        assert order == sorted(order)
    assert found[0.7].proposals[0].weight == 0


def test_no_proposal_beats_another(found: dict[float, Found]) -> None:
    for each in found.values():
        assert not any(a.beats(b) for a in each.proposals for b in each.proposals if a is not b)
        assert len({p.text for p in each.proposals}) == len(each.proposals) <= 6


def test_each_says_what_it_gives_up(found: dict[float, Found]) -> None:
    for p in (p for each in found.values() for p in each.proposals):
        said = "; ".join(p.gives_up)
        assert f"{p.slower:.2f} times as long" in said
        assert len(p.gives_up) > len(p.changes)
        if "micro-batch" in p.levels:
            assert "same rows a step" in said and f"{p.recipe.batch} of 2 rows" in said
        if "rank" in p.levels:
            assert "numbers are trained" in said


def test_a_search_says_how_much_it_looked_at(found: dict[float, Found]) -> None:
    for each in found.values():
        assert 1 < each.tried <= EFFORT.rehearsals and each.tried < each.all
        assert bool(each.stopped) == (each.tried == EFFORT.rehearsals)


def test_rows_of_a_step_and_the_length_of_the_run_stay(found: dict[float, Found], values: dict[str, Any]) -> None:
    for p in (p for each in found.values() for p in each.proposals):
        assert p.recipe.batch * p.recipe.accumulate == values["batch"]
        assert (p.recipe.steps, p.recipe.seed, p.recipe.data) == (2, 0, Recipe.of(values).data)


def test_what_is_written_is_the_recipe_that_was_planned(found: dict[float, Found], tmp_path: Path) -> None:
    for share, each in found.items():
        folder = tmp_path / str(share)
        files = write(each.proposals, folder, each.budget, each.basis)
        assert sorted(folder.iterdir()) == sorted(files)
        for path, p in zip(files, each.proposals, strict=True):
            assert Recipe.load(path) == p.recipe
            comments = [line for line in path.read_text(encoding="utf8").splitlines() if line.startswith("#")]
            assert all(any(text in line for line in comments) for text in (p.text, *p.gives_up))
        assert write(each.proposals, folder, each.budget, each.basis) == files


def test_what_this_process_takes_while_it_plans_is_not_the_run_s(values: dict[str, Any]) -> None:
    recipe = Recipe.of(values)
    held = Rehearsals(recipe, Outline.of(recipe.model), Nominal(), OF_DEVICE, EFFORT, lambda number, what: None)
    there = torch.ones(50_000_000)
    later = held.look(sacrifices.checkpointing(recipe).rungs, {})
    assert later is not None and there.numel()
    first = held.as_it_is.figures.parts["before the run"]
    assert later.figures.parts["before the run"] == first > 50_000_000
    assert max(later.figures.phases.values()) == later.figures.total < held.as_it_is.figures.total


def test_files_of_others_are_left_alone(as_it_is: Found, tmp_path: Path) -> None:
    each = as_it_is
    (path, *_) = write(each.proposals, tmp_path, each.budget, each.basis)
    path.write_text("mine", encoding="utf8")
    with pytest.raises(PlanError, match="in the way"):
        write(each.proposals, tmp_path, each.budget, each.basis)
    assert path.read_text(encoding="utf8") == "mine"


@pytest.mark.parametrize("name", ["1e4", "true", "a: b", "12", "null", "# x", "[", "it's"])
def test_yaml_keeps_every_text_a_text(as_it_is: Found, name: str) -> None:
    (p,) = as_it_is.proposals
    named = replace(p, values={**p.values, "variables": {"date": name}})
    assert as_yaml(named, 1, "").count("date") == 1  # it raises where the text is read as something else


@pytest.mark.slow
def test_where_nothing_fits_the_smallest_is_said_and_what_takes_it(values: dict[str, Any]) -> None:
    nothing = search(values | {"batch": 1}, 100_000)
    assert nothing.proposals == ()
    least = nothing.smallest.figures
    assert nothing.missing == least.total - int(100_000 / 1.05) > 0
    assert sum(least.parts.values()) == least.total and least.parts["weights"] > 100_000
    assert least.total < 0.7 * nothing.as_it_is.figures.total
    assert least.phase in ("forward", "backward", "update", "save")


def test_the_command_prints_and_writes_what_fits(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf8")
    folder = tmp_path / "fits"
    assert main(["plan", str(path), "--fit", "8GB", "--write", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "the recipe fits as it is" in printed.out and "1 of " in printed.out
    assert Recipe.load(folder / "1-as-it-is.yaml") == Recipe.of(values)
    assert main(["plan", str(path), "batch=1", "--fit", "1kB", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["proposals"] == [] and told["missing"] > 0


@pytest.mark.parametrize("words", [["--fit", "much"], ["--fit", "0"], ["--fit", "RTX 9999"], ["--write", "x"]])
def test_nonsense_is_refused_in_words(
    words: list[str], values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf8")
    assert main(["plan", str(path), *words]) == 2
    assert "given:" in capsys.readouterr().err


def test_a_budget_is_a_size_or_a_card() -> None:
    assert budget("24GB") == (24 * 10**9, None)
    assert budget("24GiB") == (24 * 2**30, None)
    assert budget("800 MB") == (800_000_000, None)
    size, card = budget("rtx4090")
    assert card is not None and card.name == "RTX 4090" and size == card.memory
    with pytest.raises(PlanError, match="RTX 4090"):
        budget("RTX 4091")


# --- the changes themselves, without a search


def recipe_of(values: dict[str, Any], **changes: Any) -> Recipe:
    return Recipe.of(values | changes)


def after(recipe: Recipe, *changes: Change) -> Recipe:
    return Recipe.of(proposals.applied(sacrifices.plain(recipe), changes))


KNOWN = Known(side=1000, parameters=7_000_000_000, quantised=False)


def ladder(recipe: Recipe, kind: str, known: Known = KNOWN) -> tuple[Change, ...]:
    return next((each.rungs for each in sacrifices.numbers(recipe, known) if each.kind == kind), ())


@pytest.mark.parametrize("batch", [1, 2, 6, 7, 12])
def test_a_split_goes_to_every_divisor_and_keeps_the_rows(values: dict[str, Any], batch: int) -> None:
    recipe = recipe_of(values, batch=batch, accumulate=3)
    made = [after(recipe, rung) for rung in sacrifices.split(recipe).rungs]
    assert [each.batch for each in made] == [n for n in range(batch - 1, 0, -1) if batch % n == 0]
    assert all(each.batch * each.accumulate == 3 * batch for each in made)


def test_a_split_of_packed_rows_to_single_ones_packs_nothing(values: dict[str, Any]) -> None:
    recipe = recipe_of(values, batch=4, batching="packed")
    assert [after(recipe, r).batching for r in sacrifices.split(recipe).rungs] == ["packed", "plain"]


SCALES = st.sampled_from(["lora", "rslora", "loraplus", "dora", "pissa"])


@settings(max_examples=30, deadline=None)
@given(SCALES, st.sampled_from([2, 6, 8, 24]), st.floats(0.5, 64), st.sampled_from([{}, {"*q_proj": 4}, {"*": 12}]))
def test_a_lower_rank_keeps_the_scale(method: str, rank: int, alpha: float, ranks: dict[str, int]) -> None:
    options = {"rank": rank, "alpha": alpha, "ranks": ranks, "alphas": {"*v_proj": 3.0}}
    part = {"method": method, "select": "language", "lr": 1e-4, **options}
    data = {"train": [{"path": "rows.jsonl"}]}
    recipe = Recipe.of({"model": "m", "parts": [part], "data": data, "steps": 1, "out": "o"})
    was: Any = recipe.parts[0].configure()
    rungs = ladder(recipe, "rank")
    assert len(rungs) == min(sacrifices.HALVINGS, *(int(math.log2(r & -r)) for r in (rank, *ranks.values())))
    for times, rung in enumerate(rungs, 1):
        now: Any = after(recipe, rung).parts[0].configure()
        for path in ("layers.0.q_proj", "layers.0.v_proj"):
            site: Any = _At(path)
            assert now.scale(site)[0] * 2**times == was.scale(site)[0]
            assert now.scale(site)[1] == pytest.approx(was.scale(site)[1])
            assert isinstance(now, LoRAConfig)


class _At:
    def __init__(self, path: str) -> None:
        self.path = path


def test_paging_and_8_bits_are_said_in_one_table(values: dict[str, Any]) -> None:
    recipe = recipe_of(values, optimiser="paged")
    (eight,) = ladder(recipe, "8-bit states")
    held = after(recipe, eight, sacrifices.paging(recipe, 100_000, 400_000)).optimiser
    assert held is not None and (held.bits, held.paged, held.bytes) == (8, True, 98_304)
    assert ladder(recipe_of(values, optimiser="8-bit"), "8-bit states") == ()


def test_4_bits_leave_out_what_is_trained_itself(values: dict[str, Any]) -> None:
    (both,) = ladder(recipe_of(values), "4 bits")
    assert after(recipe_of(values), both).four_bits == Recipe.of(values | {"four_bits": "nf4"}).four_bits
    full = recipe_of(values, parts=[{"method": "full", "select": "language.-2..", "lr": 1e-5}])
    (tower,) = ladder(full, "4 bits")
    four = after(full, tower).four_bits
    assert four is not None and four.select == "vision"
    everything = recipe_of(values, parts=[{"method": "full", "select": "*", "lr": 1e-5}])
    assert ladder(everything, "4 bits") == ()
    assert ladder(recipe_of(values), "4 bits", replace(KNOWN, quantised=True)) == ()
    assert ladder(recipe_of(values, four_bits="nf4"), "4 bits") == ()


def test_learning_rates_stay_in_4_bits(values: dict[str, Any]) -> None:
    recipe = recipe_of(values)
    (four,) = ladder(recipe, "4 bits")
    assert [part.rate for part in after(recipe, four).parts] == [part.rate for part in recipe.parts]


def test_pictures_shrink_from_the_side_they_have(values: dict[str, Any]) -> None:
    sides = [after(recipe_of(values), rung).resolution for rung in ladder(recipe_of(values), "resolution")]
    assert sides == [750, 500, 375, 250]
    assert ladder(recipe_of(values), "resolution", replace(KNOWN, side=0)) == ()


def test_the_side_is_that_of_the_rows_pictures(values: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (90, 30)).save(tmp_path / "wide.png")
    line = {"images": ["wide.png"], "question": "what is this?", "answer": "a line"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(line) + "\n") * 4, encoding="utf8")
    wide = values | {"data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]}}
    for limit, side in ((None, 90), (45, 45)):
        held = search(wide | {"resolution": limit}, 1, Effort(rehearsals=1))
        assert held.stopped == "1 rehearsals"
        assert held.as_it_is.recipe.resolution == limit
        rungs = _rungs(held, "resolution", side)
        assert rungs == [round(side * share) for share in sacrifices.SIDES]


def _rungs(held: Found, kind: str, side: int) -> list[int | None]:
    recipe = held.as_it_is.recipe
    assert held.side == side
    return [after(recipe, rung).resolution for rung in ladder(recipe, kind, replace(KNOWN, side=held.side))]


def test_full_training_becomes_lora_at_its_own_rate_and_loudly(values: dict[str, Any]) -> None:
    recipe = recipe_of(values)
    (rung,) = ladder(recipe, "full to LoRA")
    first, second = after(recipe, rung).parts
    assert first == recipe.parts[0]
    assert (second.method, second.select, second.rate) == ("lora", "projector", 2e-4)
    assert second.options == {"rank": 8, "alpha": 16.0}
    assert "ANOTHER METHOD" in rung.gives_up
    assert rung.weight == max(w for weights in sacrifices.WEIGHTS.values() for w in weights)


def test_what_makes_no_recipe_is_no_change(values: dict[str, Any]) -> None:
    prompt = recipe_of(values, parts=[{"method": "prompt", "select": "language", "lr": 1e-3}])
    assert sacrifices.checkpointing(prompt).rungs == ()
    assert len(sacrifices.checkpointing(recipe_of(values)).rungs) == 1
    assert sacrifices.checkpointing(recipe_of(values, checkpointing=True)).rungs == ()


# --- which of two is better


def proposal(seconds: float, **levels: int) -> Proposal:
    """One that changes nothing but in name: the kinds in capitals change numbers."""
    figures = Figures({"step": 1}, {}, seconds, 1, 1, 1, 0)
    was = replace(figures, seconds=1.0)
    changes = tuple(Change(k, k, k, "", dict, weight=level if k.isupper() else 0) for k, level in levels.items())
    return Proposal({"out": ""}, changes, levels, figures, was)


def test_numbers_are_given_up_for_time_alone() -> None:
    exact, faster, slow = proposal(2.0, split=2), proposal(1.5, RANK=1), proposal(1.95, RANK=1, BITS=1)
    assert best([slow, faster, exact]) == [exact, faster]
    assert exact.beats(slow) and not exact.beats(faster) and not faster.beats(exact)


def test_to_be_faster_than_before_is_no_gain() -> None:
    exact, faster = proposal(1.0, split=1), proposal(0.3, RANK=1)
    assert best([faster, exact]) == [exact]


def test_of_two_ways_the_one_that_is_clearly_slower_is_left_out() -> None:
    a, b, c = proposal(1.5, split=1), proposal(1.5 * CLEARLY * 1.01, checkpointing=1), proposal(1.6, paging=1)
    assert best([c, b, a]) == [a, c]


def test_more_of_the_same_is_worse_even_where_it_takes_no_time() -> None:
    a, b = proposal(1.5, split=1), proposal(1.5, split=1, checkpointing=1)
    assert best([b, a]) == [a]


@st.composite
def several(draw: st.DrawFn) -> list[Proposal]:
    kinds = ("split", "checkpointing", "RANK", "BITS")
    levels = st.fixed_dictionaries({}, optional={kind: st.integers(1, 2) for kind in kinds})
    times = st.floats(0.5, 5)
    return [proposal(draw(times), **draw(levels)) for _ in range(draw(st.integers(1, 8)))]


@given(several())
def test_something_is_always_left_and_nothing_beats_what_is(found: list[Proposal]) -> None:
    left = best(found)
    assert left
    assert not any(a.beats(b) for a in found for b in left)
