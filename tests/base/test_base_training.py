"""Both stages of the base's training on a few tiny photographs: stopped and resumed, they end in the same weights."""

from __future__ import annotations

import copy
import hashlib
import json

import numpy as np
import pytest
import torch
from base.photos import photographs

from tarsia.base import join, pictures, see, texts

SPLIT = 10_000_000
SMALL = {"photographs": 3, "digits": 1, "scenes": 2, "search": 1, "two": 1, "text": 2}
ROWS = join.held_out_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    return photographs(folder / "train.parquet", 8), photographs(folder / "test.parquet", 12)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    tower = copy.deepcopy(see.TOWER)
    tower.num_hidden_layers = 1
    monkeypatch.setattr(see, "TOWER", tower)
    monkeypatch.setattr(see, "SCENES", 6)
    monkeypatch.setattr(see, "BATCH", {"photographs": 3, "digits": 2, "scenes": 2})
    monkeypatch.setattr(join, "BATCH", SMALL)
    monkeypatch.setattr(join, "held_out_rows", lambda test, limit: ROWS(test, 2))


def run(module, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, words)])
    module.main()


def log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_both_stages_resume_bitwise_and_export(tmp_path, files, monkeypatch, capsys):
    train, test = files
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for work, stops in ((whole, ((),)), (cut, (("--stop", 2), ()))):
        for stop in stops:
            run(see, monkeypatch, "--photographs", train, "--work", work, "--steps", 4, *stop)
    assert (whole / "see.safetensors").read_bytes() == (cut / "see.safetensors").read_bytes()
    assert [line["step"] for line in log(cut / "see.jsonl")] == [2, 4]
    for work, stops in ((whole, ((),)), (cut, (("--stop", 2), ()))):
        (work / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
        for stop in stops:
            assert not (tmp_path / f"{work.name}-out").exists(), "a stopped run exports nothing"
            words = ("--photographs", train, "--test", test, "--work", work, "--out", tmp_path / f"{work.name}-out")
            run(join, monkeypatch, *words, "--steps", 4, "--lr", 0.002, "--seed", 5, "--mix", "talk=0,text=3", *stop)
    assert (whole / "join.safetensors").read_bytes() == (cut / "join.safetensors").read_bytes()
    weights = [tmp_path / f"{name}-out" / "model.safetensors" for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    check(tmp_path / "cut-out", train)


TOKENIZER = join.Path(join.__file__).parent / "mini-1" / "tokenizer.json"


def check(out, train):
    """The exported folder loads, answers, and says how it was made."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(out)
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    inputs = processor(
        text=processor.apply_chat_template(talk, add_generation_prompt=True),
        images=[pictures.scene(1)[0]],
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == join.IMAGE).sum() == 64
    trained = join.encode(processor.tokenizer, [join.Row("What is this?", "a", (np.asarray(pictures.scene(1)[0]),))])
    prompt = inputs["input_ids"][0].tolist()
    assert trained[0][0].tolist()[: len(prompt)] == prompt, "what was trained on is what the processor writes"
    assert torch.equal(inputs["pixel_values"], trained[2])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert torch.isfinite(model(**inputs).logits).all()
    card = json.loads((out / "card.json").read_text())
    assert card["sha256"] == hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert card["data"]["train.parquet"] == hashlib.sha256(train.read_bytes()).hexdigest()
    assert set(card["data"]) == {"train.parquet", "test.parquet", "digits.png"}
    assert card["seed"] == 5 and card["parameters"] == sum(p.numel() for p in model.parameters())
    commands = [(line["from_step"], line["command"].split()[2]) for line in card["commands"]]
    assert commands == [(s, f"tarsia.base.{stage}") for stage in ("see", "join") for s in (0, 2)]
    assert card["commands"][-1]["command"].endswith("--lr 0.002 --seed 5 --joint 0.6 --mix talk=0,text=3")
    assert [[line["step"] for line in card["curve"][stage]] for stage in ("see", "join")] == [[2, 4], [2, 4]]
    assert set(card["held_out_exact"]) == {
        *("photographs", "digits", "scenes", "search"),
        *("words", "refusals", "repeat", "talk"),
    }


@pytest.fixture
def drawn(monkeypatch):
    """Numbers of the scenes and rows of the digits that were drawn."""
    seen = {"scenes": set(), "digits": set()}
    for real, kind in ((pictures.scene, "scenes"), (pictures.digit, "digits")):

        def record(number, *rest, real=real, kind=kind):
            seen[kind].add(number)
            return real(number, *rest)

        monkeypatch.setattr(pictures, real.__name__, record)
    return seen


def test_training_and_held_out_rows_share_nothing(files, drawn):
    train, test = files
    for step in range(4):
        see.World(train, 1).batch(step)
    world = join.World(train, 1, SMALL)
    asked = [row.question for step in range(30) for rows in world.rows(step) for row in rows if not row.shown]
    known = {kind: set(numbers) for kind, numbers in drawn.items()}
    drawn["scenes"].clear()
    drawn["digits"].clear()
    held = ROWS(test, 10)
    assert known["digits"] <= set(pictures.digit_rows("train")) and drawn["digits"] <= set(
        pictures.digit_rows("held-out")
    )
    assert max(known["scenes"]) < SPLIT <= min(drawn["scenes"])
    said = {row.question for kind in ("words", "refusals", "talk", "repeat") for row in held[kind]}
    assert len(asked) == 60 and said and not set(asked) & said
    assert not any(map(texts.held_out, asked)) and all(map(texts.held_out, said))


def test_a_step_has_the_same_rows_whenever_it_is_asked_for(files):
    world = join.World(files[0], 1, SMALL)
    first, again, other = ([row for rows in world.rows(step) for row in rows] for step in (7, 7, 8))

    def bare(rows):
        return [(row.question, row.answer, [p.tobytes() for p in row.shown]) for row in rows]

    assert bare(first) == bare(again) != bare(other)
    assert [len(rows) for rows in world.rows(7)] == [7, 1, 2]
    stage = see.World(files[0], 1)
    assert all(torch.equal(a, b) for a, b in zip(stage.batch(3), stage.batch(3), strict=True))


def test_every_photograph_is_shown_once_an_epoch(files, monkeypatch):
    """Batches of four go through eight photographs in two steps."""
    monkeypatch.setattr(see, "BATCH", {"photographs": 4, "digits": 1, "scenes": 1})
    world = see.World(files[0], 1)
    labels = [label for step in (0, 1) for label in world.batch(step)[1].tolist()]
    assert sorted(labels) == list(range(8))


def test_labels_of_a_scene_are_by_quarter():
    things = (pictures.Thing("star", "red", "top right"), pictures.Thing("circle", "black", "bottom left"))
    assert see.scene_labels(things).tolist() == [[5, 8], [3, 0], [0, 7], [5, 8]]


def test_half_of_the_patches_are_hidden_at_first():
    patches = see.kept(0, 9, 5, 1)
    assert patches.shape == (5, 32)
    assert all(len(set(row)) == 32 and row == sorted(row) and max(row) < 64 for row in patches.tolist())
    assert torch.equal(patches, see.kept(0, 9, 5, 1)) and not torch.equal(patches, see.kept(1, 9, 5, 1))
    assert see.kept(8, 9, 5, 1) is None


def test_kept_patches_see_what_they_saw_of_the_whole():
    """Given every patch in another order, the tower returns the same features in that order."""
    torch.manual_seed(0)
    model, order = see.Seer(), torch.randperm(64)[None]
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole, _ = model(pixels, None)
        mixed, patches = model(pixels, order)
    assert torch.equal(patches, order)
    assert torch.allclose(mixed[0], whole[0, order[0]], atol=1e-4)


def test_an_answer_alone_is_learnt_from():
    tok = join.PreTrainedTokenizerFast(tokenizer_object=join.Tokenizer.from_file(str(TOKENIZER)))
    rows = [join.Row("Repeat: a", "a"), join.Row("What is red?", "a colour")]
    ids, labels, pixels = join.encode(tok, rows)
    assert pixels is None
    for row, line, learnt in zip(rows, ids, labels, strict=True):
        at = learnt != -100
        assert tok.decode(line[at]).strip() == f"{row.answer}<|end|>" and torch.equal(line[at], learnt[at])
        whole = tok.decode(line[line != join.PAD])
        assert whole == f"<|user|>{row.question}<|end|><|assistant|>{row.answer}<|end|>"


def test_a_crop_is_a_moved_mirror():
    shown = np.arange(64 * 64 * 3, dtype=np.int64).reshape(64, 64, 3)
    rng = np.random.default_rng(0)
    crops = [see.crop(shown, rng) for _ in range(20)]
    assert {crop.shape for crop in crops} == {(64, 64, 3)}
    inner = shown[16:48, 16:48, 0]
    assert all(np.isin(inner, crop[..., 0]).all() for crop in crops)
    rising = {bool(crop[32, 33, 0] > crop[32, 32, 0]) for crop in crops}
    assert rising == {True, False}, "some are mirrored, some are not"


def test_the_mix_of_a_step_is_that_asked_for(files):
    rows = list(join.World(files[0], 1, {**SMALL, "photographs": 0, "two": 2}).rows(0))
    assert [len(batch) for batch in rows] == [4, 2, 2]
    assert all(len(row.shown) == 2 for row in rows[1])
