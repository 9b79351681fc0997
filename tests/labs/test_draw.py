"""The picture of results, and the numbers of an experiment: replay's share, what was forgotten, what is shared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
from evaluate.tiny import sample

from tarsia.evaluate import Report, Row
from tarsia.evaluate.bootstrap import interval
from tarsia.evaluate.report import Result
from tarsia.labs import demo, draw
from tarsia.labs.experiment import forgotten, mixed, shares
from tarsia.train import Recipe

BELT = Path(__file__).parents[2] / "recipes" / "belt.yaml"


def result(source, said, chosen=True):
    """Rows whose right answer is "a dog"."""
    rows = tuple(
        Row(
            row=i,
            reference="a dog",
            said=text,
            free_score=float(text == "a dog"),
            chosen="a dog" if chosen else None,
            chosen_score=1.0 if chosen else None,
            loss=0.5,
            tokens=2,
        )
        for i, text in enumerate(said)
    )
    return Result(
        source=source,
        free=interval([row.free_score for row in rows]),
        constrained=interval([1.0] * len(rows)) if chosen else None,
        loss=0.5,
        answers=("a dog",) if chosen else (),
        answers_from="given",
        rows=rows,
    )


def report(*results):
    return Report(
        base="tiny", digest="d", precision="float32", adapters=(), metric="exact", max_new_tokens=8, scoring="plain",
        seed=0, resamples=10, results=results,
    )  # fmt: skip


def test_panels_write_a_picture_whatever_a_model_says(tmp_path):
    """Dollars are no formulas, control characters are no glyphs, and a long answer is cut."""
    odd = ["a dog", "$\\frac{$", "\x06\n", "a dog " * 30]
    before, after = report(result("job", ["a cat"] * 4)), report(result("job", odd))
    rows = [sample("how much is $a_$ of it? " * (1 + i), "a dog", 1, i, "job") for i in range(4)]
    path = tmp_path / "panels.png"
    draw.panels(path, {"job": rows}, before, {"after": after})
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == (726, 1320) and pixels.std() > 0.01
    assert [file.name for file in tmp_path.iterdir()] == ["panels.png"]


def test_rows_on_which_the_models_differ_are_shown_first():
    right, wrong = "a dog", "a cat"
    one, other = (
        result("job", said).rows for said in ([right, wrong, right, wrong, wrong], [right, right, right, right, wrong])
    )
    assert draw._telling([one, other]) == [1, 3, 0]
    assert draw._telling([one[:2]]) == [0, 1]


def test_bars_stand_at_what_was_measured():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    reports = {
        "before": report(result("job", ["a dog", "a cat"]), result("rest", ["a dog"] * 2)),
        "after": report(result("job", ["a dog"] * 2), result("rest", ["a cat"] * 2)),
    }
    draw.bars(axes, reports)
    assert [bar.get_height() for bar in axes.patches] == [50, 100, 100, 0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["job", "rest"]


@pytest.mark.parametrize("replay", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 0.5)])
def test_replay_is_the_share_of_the_general_rows(tmp_path, replay, weights):
    job = {**demo.RECIPE, "data": {"train": [{"path": f"job-{i}.parquet"} for i in range(2)]}}
    general = [{"path": f"rest-{i}.parquet", "weight": weight} for i, weight in enumerate(weights)]
    made = {source.title: source.weight for source in mixed(job, general, replay, tmp_path).data.train}
    rest = [weight for name, weight in made.items() if name.startswith("rest")]
    assert sum(made.values()) == pytest.approx(1)
    assert sum(rest) == pytest.approx(replay)
    assert made["job-0"] == made["job-1"] == pytest.approx((1 - replay) / 2)
    assert rest == ([] if replay == 0 else pytest.approx([replay * weight / sum(weights) for weight in weights]))


def test_shares_are_means_over_sources():
    measured = report(
        result("a", ["a dog", "a cat"]), result("b", ["a dog"] * 2, chosen=False), result("c", ["a cat"] * 2)
    )
    assert shares(measured, ["a", "b"]) == (0.75, 1.0)
    assert shares(measured, ["c"]) == (0.0, 1.0)


def test_what_was_forgotten_is_the_mean_of_the_general_sources():
    lost = {"job": -60.0, "words": 10.0, "talk": -4.0}
    changes = [SimpleNamespace(source=name, forgetting=points) for name, points in lost.items()]
    mix = SimpleNamespace(change=SimpleNamespace(changes=changes))
    assert forgotten(mix, ("words", "talk")) == 3.0
    assert forgotten(mix, ("talk",)) == -4.0


def test_the_recipe_of_the_belt_is_that_of_the_demo():
    """What `tarsia train recipes/belt.yaml` trains is what the demo trained with replay."""
    written = Recipe.load(BELT)
    job = [{"path": source.path} for source in written.data.train if Path(source.path).stem in demo.TASK]
    made = mixed(
        {**demo.RECIPE, "data": {"train": job}}, [{"path": "x.parquet"}], demo.MIXES["10 % replay"], Path("out")
    )
    for field in ("model", "parts", "steps", "batch", "warmup", "seed"):
        assert getattr(written, field) == getattr(made, field), field
    assert [s.weight for s in written.data.train if Path(s.path).stem in demo.TASK] == [
        s.weight for s in made.data.train
    ][:-1]
