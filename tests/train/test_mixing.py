"""Weighted and sampled mixing: the loss asked for is the loss that is minimised, and every report says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from train import small

from tarsia.cli.progress import Screen
from tarsia.core.errors import ConfigError, TrainingError
from tarsia.data import IGNORED, Batch
from tarsia.train.events import Finished, read_log
from tarsia.train.loop import fit
from tarsia.train.step import backward, loss_shares

ROWS = 7
MODEL, CONFIG = FAMILIES["llava"].build()
MODEL.double()


def rows(seed: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Seven rows with 0 to 2 pictures, each encoded alone, labels on its last few tokens."""
    made = []
    for row in range(ROWS):
        inputs = FAMILIES["llava"].batch(((seed + row) % 3,))
        inputs["pixel_values"] = inputs["pixel_values"].double() if "pixel_values" in inputs else None
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        count = 1 + (3 * row + seed) % 5
        labels[:, -count:] = inputs["input_ids"][:, -count:]
        made.append(({key: value for key, value in inputs.items() if value is not None}, labels))
    return made


def joined(made, numbers, sources) -> Batch:
    """Some of the rows as one padded micro-batch."""
    longest = max(made[n][1].shape[1] for n in numbers)

    def padded(value, fill):
        return torch.nn.functional.pad(value, (0, longest - value.shape[1]), value=fill)

    inputs = {
        "input_ids": torch.cat([padded(made[n][0]["input_ids"], 0) for n in numbers]),
        "attention_mask": torch.cat([padded(made[n][0]["attention_mask"], 0) for n in numbers]),
    }
    pixels = [made[n][0]["pixel_values"] for n in numbers if "pixel_values" in made[n][0]]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    labels = torch.cat([padded(made[n][1], IGNORED) for n in numbers])
    return Batch(inputs, labels, (0,) * len(numbers), tuple(sources[n] for n in numbers), tuple(numbers))


def gradients() -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in MODEL.named_parameters() if p.grad is not None}
    MODEL.zero_grad()
    return found


def naive(made, sources, weights) -> torch.Tensor:
    """The definition, row by row, each row alone: sum of lambda times the mean over the source's tokens."""
    losses = {s: [] for s in sources}
    for (inputs, labels), source in zip(made, sources, strict=True):
        logits = MODEL(**inputs).logits[:, :-1].float()
        losses[source].append(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
            )[labels[0, 1:] != IGNORED]
        )
    whole = sum(weights[s] * torch.cat(parts).mean() for s, parts in losses.items())
    whole.backward()
    return whole.detach()


@st.composite
def steps(draw):
    """A seed, a source for each row, weights, and the rows cut into micro-batches in any order."""
    sources = draw(st.permutations(["a", "b", "c", *draw(st.lists(st.sampled_from("abc"), min_size=4, max_size=4))]))
    order = draw(st.permutations(range(ROWS)))
    cuts = sorted(draw(st.sets(st.integers(1, ROWS - 1))))
    weights = draw(st.tuples(*[st.floats(0.01, 1)] * 3))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, ROWS], strict=True)]
    return draw(st.integers(0, 5)), tuple(sources), [w / sum(weights) for w in weights], parts


@settings(max_examples=25, deadline=None)
@given(steps())
def test_the_weighted_gradient_is_the_definition_in_any_partition(case):
    seed, sources, shares, parts = case
    weights = dict(zip("abc", shares, strict=True))
    made = rows(seed)
    expected_loss = naive(made, sources, weights)
    expected = gradients()
    losses = backward(MODEL, [joined(made, part, sources) for part in parts], 1, weights)
    found = gradients()

    assert losses.loss == pytest.approx(float(expected_loss), rel=1e-6)
    assert {s: losses.factors[s] * losses.tokens[s] for s in "abc"} == pytest.approx(weights)
    assert losses.loss == pytest.approx(sum(weights[s] * losses.means[s] for s in "abc"), rel=1e-9)
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-6 * scale, name


def test_the_two_modes_differ_where_answers_are_of_unequal_length():
    made, sources = rows(0), tuple("aaabbbb")
    whole = [joined(made, range(ROWS), sources)]
    sampled = backward(MODEL, whole, 1)
    gradients()
    weighted = backward(MODEL, whole, 1, {"a": 0.9, "b": 0.1})
    gradients()
    assert sampled.factors == dict.fromkeys("ab", 1 / sum(sampled.tokens.values()))
    assert sampled.means == pytest.approx(weighted.means)
    assert weighted.loss != pytest.approx(sampled.loss, abs=1e-3)


def test_loss_shares_add_up():
    assert loss_shares({"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    assert loss_shares({"a": 0.0, "b": 0.0}) == {"a": 0.0, "b": 0.0}, "a loss of exactly zero is nobody's"


def test_a_weighted_source_without_a_label_is_refused():
    made, sources = rows(0), tuple("aaaaaab")
    made[6][1].fill_(IGNORED)
    with pytest.raises(TrainingError, match="Step 9 has no labelled token of b") as caught:
        backward(MODEL, [joined(made, range(ROWS), sources)], 9, {"a": 0.5, "b": 0.5})
    assert "row 6 of b" in caught.value.given
    with pytest.raises(TrainingError, match="no labelled token of c"):
        backward(MODEL, [joined(made, range(6), sources)], 9, {"a": 0.5, "c": 0.5})
    backward(MODEL, [joined(made, range(ROWS), sources)], 9, {"a": 1.0, "b": 0.0})
    backward(MODEL, [joined(made, range(ROWS), sources)], 9)
    gradients()


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return small.world(tmp_path_factory.mktemp("mixing"))


def weighted(values, tmp_path: Path, *rows: int, **changes):
    train = [
        {**source, **({"rows": count} if count else {})}
        for source, count in zip(values["data"]["train"], rows or (0, 0), strict=True)
    ]
    return values | {"data": {"train": train, "mix": "weighted"}, "out": str(tmp_path / "out"), **changes}


def test_every_source_is_in_every_step_and_the_loss_is_weighted(values, tmp_path):
    events = small.run(weighted(values, tmp_path, steps=5))
    for step in small.curve(events):
        assert step.rows == {"task": 3, "talk": 1}
        assert step.loss == pytest.approx(0.8 * step.losses["task"] + 0.2 * step.losses["talk"])
        assert step.contributions["talk"] == pytest.approx(0.2 * step.losses["talk"])
        assert step.loss_shares["talk"] == pytest.approx(step.contributions["talk"] / step.loss)
        assert sum(step.loss_shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("mix", ["weighted", "sampled"])
def test_card_and_log_report_each_source(values, tmp_path, mix):
    values = weighted(values, tmp_path, steps=5)
    values["data"]["mix"] = mix
    events = small.run(values)
    curve = small.curve(events)
    assert isinstance(events[-1], Finished)
    card = events[-1].adapter.card
    assert card["mix"] == mix
    for name, asked in (("task", 0.8), ("talk", 0.2)):
        source = card["data"][name]
        assert source["share_asked"] == pytest.approx(asked)
        assert source["rows"] == sum(step.rows.get(name, 0) for step in curve)
        assert source["share_got"] == source["rows"] / 20
        assert source["tokens"] == sum(step.tokens_by_source.get(name, 0) for step in curve)
        assert source["token_share"] == source["tokens"] / sum(step.tokens for step in curve)
        contributed = sum(step.contributions.get(name, 0) for step in curve)
        assert source["loss_share"] == pytest.approx(contributed / sum(step.loss for step in curve))
        assert 0 < source["loss_share"] < 1
    logged = [event for event in read_log(Path(values["out"]) / "events.jsonl") if event["event"] == "step"]
    assert [event["loss_shares"] for event in logged] == [step.loss_shares for step in curve]
    assert [event["contributions"] for event in logged] == [step.contributions for step in curve]


def test_the_screen_shows_the_mix(values, tmp_path, capsys):
    events = small.run(weighted(values, tmp_path, steps=4))
    with Screen() as show:
        for event in events:
            show(event)
    said = capsys.readouterr()
    assert "trained on, weighted" in said.out
    talk = next(line for line in said.out.splitlines() if line.strip(" │|").startswith("talk"))
    share = events[-1].adapter.card["data"]["talk"]["loss_share"]
    assert "20.0%" in talk and "25.0%" in talk and f"{share:.1%}" in talk
    assert f"talk {small.curve(events)[-1].losses['talk']:.4f}" in said.err


def test_rows_of_a_step_can_be_named(values, tmp_path):
    events = small.run(weighted(values, tmp_path, 1, 3, steps=4))
    for step in small.curve(events):
        assert step.rows == {"task": 1, "talk": 3}
        assert step.loss == pytest.approx(0.8 * step.losses["task"] + 0.2 * step.losses["talk"])


def test_what_can_not_be_mixed_is_refused(values, tmp_path):
    with pytest.raises(ConfigError, match="needs a row of every source") as caught:
        small.recipe(weighted(values, tmp_path, batch=1, accumulate=1))
    assert "batch * accumulate is 2 or more" in caught.value.do
    with pytest.raises(ConfigError, match="not the rows of a step"):
        small.recipe(weighted(values, tmp_path, 3, 3))
    with pytest.raises(ConfigError, match="names its rows of a step, or none"):
        small.recipe(weighted(values, tmp_path, 3, 0))
    sampled = weighted(values, tmp_path, 3, 1)
    sampled["data"]["mix"] = "sampled"
    with pytest.raises(ConfigError, match="Only the weighted mode"):
        small.recipe(sampled)
    with pytest.raises(ConfigError, match=r"'data\.mix'"):
        small.recipe(sampled, "data.mix=both")


@pytest.mark.parametrize("stop", [2, 4])
def test_an_interrupted_weighted_run_goes_on_to_the_same_curve(values, tmp_path, stop):
    whole = weighted(values, tmp_path / "whole", steps=6)
    small.run(whole)
    parts = weighted(values, tmp_path / "parts", steps=6)
    small.until(fit(small.recipe(parts)), stop)
    small.run(parts)
    curves = []
    for out in (whole["out"], parts["out"]):
        curve = [event for event in read_log(Path(out) / "events.jsonl") if event["event"] == "step"]
        curves.append(json.dumps([{k: v for k, v in e.items() if k != "tokens_per_second"} for e in curve]))
    assert curves[0] == curves[1]


def test_what_changes_no_number_forbids_no_resume(values, tmp_path):
    ours = weighted(values, tmp_path, steps=6, save_every=2)
    small.until(fit(small.recipe(ours)), 3)
    changed = ours | {"save_every": 1, "eval_every": 2}
    changed["data"] = ours["data"] | {"eval": [{"path": ours["data"]["train"][0]["path"], "name": "held out"}]}
    events = small.run(changed, evaluator=lambda host, step: {})
    assert events[0].resumed == 2
    assert [event.step for event in events if event.kind == "evaluated"] == [2, 4, 6]
    for change in ("data.train.0.weight=0.7", "data.mix=sampled", "data.train.0.path=" + str(tmp_path / "x.jsonl")):
        with pytest.raises(ConfigError, match="another recipe") as caught:
            small.run(ours, change)
        assert change.split("=")[0] in caught.value.given
