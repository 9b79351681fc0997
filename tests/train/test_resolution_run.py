"""A run on smaller pictures is the run on smaller files: steps, evaluations, probe, cache; and asking goes on so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data.processors import made
from PIL import Image
from train import small
from train.test_recipe import VALUES

from tarsia.adapter import load, save
from tarsia.cli import main
from tarsia.cli.train import evaluator
from tarsia.core.errors import ConfigError
from tarsia.data import Encoder, Source, read
from tarsia.train.events import Evaluated, Finished, Notice
from tarsia.train.loop import _in_vain, fit
from tarsia.train.recipe import Recipe
from tarsia.train.store import Store

RESOLUTION = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe whose rows show pictures of 40 x 24, and beside them files of the same rows that were shrunk."""
    folder = tmp_path_factory.mktemp("resolution")
    values = small.world(folder)
    (folder / "small").mkdir()
    lines = []
    for i in range(6):
        image = Image.frombytes("RGB", (40, 24), torch.randint(256, (2880,), dtype=torch.uint8).numpy().tobytes())
        image.save(folder / f"{i}.png")
        image.resize((RESOLUTION, 6), Image.Resampling.LANCZOS).save(folder / "small" / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": "what is this?", "answer": small.ANSWERS[i]})
    for place in (folder, folder / "small"):
        (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    return values | sources(folder) | {"steps": 3, "warmup": 0, "eval_every": 2, "resolution": RESOLUTION}


def sources(folder: Path) -> dict[str, Any]:
    held = {"path": str(folder / "rows.jsonl"), "name": "task"}
    return {"data": {"train": [held], "eval": [held]}}


def beside(world: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The recipe on the shrunk files, without a resolution."""
    folder = Path(world["data"]["train"][0]["path"]).parent
    return world | sources(folder / "small") | {"resolution": None} | changes


def ran(values: dict[str, Any]) -> list[Any]:
    return list(fit(small.recipe(values), evaluator(small.recipe(values))))


@pytest.fixture(scope="module")
def events(world: dict[str, Any]) -> list[Any]:
    return ran(world)


def told(events: list[Any], kind: type) -> Iterator[Any]:
    return (event for event in events if isinstance(event, kind))


def losses(events: list[Any]) -> list[tuple[float, float]]:
    return [(step.loss, step.grad_norm) for step in small.curve(events)]


def test_it_is_the_run_on_smaller_files_to_the_bit(world: dict[str, Any], events: list[Any], tmp_path: Path) -> None:
    wanted = ran(beside(world, out=str(tmp_path / "small")))
    assert losses(events) == losses(wanted)
    assert losses(events) != losses(ran(world | {"resolution": None, "out": str(tmp_path / "large")}))
    found, others = ([e.results["results"] for e in told(all_, Evaluated)] for all_ in (events, wanted))
    assert len(found) == 2 and found == others, "evaluations see what training sees"
    assert {e.results["resolution"] for e in told(events, Evaluated)} == {RESOLUTION}
    (ours,), (theirs,) = ([e.adapter for e in told(all_, Finished)] for all_ in (events, wanted))
    assert torch.equal(ours.probe.inputs["pixel_values"], theirs.probe.inputs["pixel_values"])
    assert ours.card["recipe"]["resolution"] == RESOLUTION


def test_a_base_that_was_opened_for_another_size_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    host = small.recipe(world | {"resolution": None}).open()
    with pytest.raises(ConfigError, match="pictures of another size") as caught:
        next(fit(small.recipe(world | {"out": str(tmp_path / "out")}), host=host))
    assert (caught.value.given, caught.value.allowed) == ("resolution None", f"resolution {RESOLUTION}")


def test_the_cache_of_features_knows_a_shrunk_picture_from_the_whole_one(world: dict[str, Any], tmp_path: Path) -> None:
    """Runs at two resolutions share a folder, and each has the curve that it has with a folder of its own."""
    frozen = world | {"parts": [part for part in world["parts"] if "vision" not in part["select"]]}
    kept, curves, pictures = str(tmp_path / "kept"), [], []
    for resolution, folder in ((None, kept), (RESOLUTION, kept), (RESOLUTION, str(tmp_path / "own"))):
        values = frozen | {"resolution": resolution, "features": {"path": folder}}
        curves.append(losses(small.run(values | {"out": str(tmp_path / str(len(curves)))})))
        pictures.append(Store(Path(folder), 10**9).size()[1])
    assert curves[0] != curves[1] == curves[2]
    assert pictures == [6, 12, 6]


def test_the_hash_is_that_of_before_there_was_a_resolution() -> None:
    """Literally: what was begun goes on. And another resolution is another run."""
    ours = "b572c25e22017283b783676e1204c68b15b62046688be7ec1ca4292ffef3109f"
    assert Recipe.of(VALUES).hash == Recipe.of(VALUES | {"resolution": None}).hash == ours
    hashes = {Recipe.of(VALUES | {"resolution": r}).hash for r in (None, 224, 448)}
    assert len(hashes) == 3
    for wrong, do in ((0, "give more than 0"), ("448", "without quotes"), (2.5, "whole number")):
        with pytest.raises(ConfigError, match="'resolution'") as caught:
            Recipe.of(VALUES | {"resolution": wrong})
        assert do in (caught.value.do or "")


def test_where_it_saves_nothing_the_run_says_so(world: dict[str, Any], events: list[Any]) -> None:
    said = [event.what for event in told(events, Notice)]
    assert any(f"resolution {RESOLUTION} saves nothing for row" in text for text in said)
    rows = read(Source(path=world["data"]["train"][0]["path"]))

    def notices(family: str, resolution: int) -> tuple[str, ...]:
        recipe = small.recipe(world | {"resolution": resolution})
        encoder = Encoder(made(family, "chatml"), resolution=resolution)
        return _in_vain(SimpleNamespace(recipe=recipe, encoder=encoder, mixture=[*rows, *rows]))  # type: ignore[arg-type]

    assert notices("llava", 10) and not notices("llava", 40), "nothing is shrunk by 40"
    assert not notices("qwen", 10)


def test_asking_shows_pictures_as_training_did(
    world: dict[str, Any], events: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished,) = told(events, Finished)
    folder = Path(world["data"]["train"][0]["path"]).parent
    large, little = str(folder / "0.png"), str(folder / "small" / "0.png")

    def asked(image: str, *more: str, adapters: tuple[str, ...] = (finished.folder,)) -> tuple[int, Any, str]:
        named = [word for adapter in adapters for word in ("--adapter", adapter)]
        words = ("--image", image, "--json", "--precision", "float32", "--device", "cpu", "--max-new-tokens", "2")
        code = main(["ask", world["model"], *named, *words, *more, "what is this?"])
        out, err = capsys.readouterr()
        return code, json.loads(out)["adapters"] if out else None, err

    code, found, err = asked(large)
    assert code == 0 and f"at most {RESOLUTION} pixels" in err
    chosen = asked(little, "--resolution", "none")
    assert chosen[:2] == (0, found) and "was trained at resolution 10, and is shown pictures at none" in chosen[2]
    whole = asked(large, "--resolution", "none")[1]
    assert whole != found
    assert asked(large, "--resolution", "10") == (0, found, ""), "what is chosen is as trained: nothing to tell"
    code, _, err = asked(large, "--resolution", "much")
    assert code == 2 and "That is no resolution" in err
    other = tmp_path / "another"
    adapter = load(finished.folder)
    card = {**adapter.card, "recipe": {**adapter.card["recipe"], "resolution": None}}
    save(type(adapter)(**{**vars(adapter), "card": card}), other)
    code, _, err = asked(large, adapters=(finished.folder, str(other)))
    assert code == 2 and "trained on pictures of different sizes" in err and "--resolution none" in err
    assert asked(large, adapters=(str(other),))[2] == ""
