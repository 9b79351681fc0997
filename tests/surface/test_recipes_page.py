"""docs/recipes.md says every key with its default, and its rows are read as what their heading says."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from surface import source

import tarsia.methods  # noqa: F401 (registers every method)
from tarsia.core.method import METHODS
from tarsia.data import Source, read
from tarsia.data.formats import FORMATS, Place, Row, read_row
from tarsia.data.samples import Sample
from tarsia.train.recipe import (
    DataRecipe,
    FeatureRecipe,
    FourBitsRecipe,
    OptimiserRecipe,
    PartRecipe,
    Recipe,
    TrainSource,
)

PAGE = (source.ROOT / "docs" / "recipes.md").read_text(encoding="utf8")
MODELS: tuple[type[BaseModel], ...] = (
    *(Recipe, PartRecipe, DataRecipe, Source, TrainSource),
    *(FeatureRecipe, FourBitsRecipe, OptimiserRecipe),
)
CONFIGS = sorted({method.config for method in METHODS.values()}, key=lambda config: str(config.__name__))


def section(title: str, level: str = "##") -> str:
    """What stands below a heading, up to the next of its level."""
    (found,) = re.findall(rf"^{level} {re.escape(title)}\n(.*?)(?=^{level} |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def blocks(text: str) -> list[Any]:
    return [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def said(name: str) -> dict[str, str]:
    """Keys and defaults in the table below the heading that begins with a class's name."""
    table = re.findall(rf"^### `{name}`.*?\n(.*?)(?=^#|\Z)", section("Keys"), re.DOTALL | re.MULTILINE)
    assert len(table) == 1, name
    return dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]+ \|$", table[0], re.MULTILINE))


def shown(value: object) -> str:
    return f"`{json.dumps(value)}`"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_stands_there_with_its_default(model: type[BaseModel]) -> None:
    inherited = set(Source.model_fields) if model is TrainSource else set()
    assert said(model.__name__) == {
        key: "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        for key, field in model.model_fields.items()
        if key not in inherited
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_option_stands_there_with_its_default(config: Any) -> None:
    names = {name for name, method in METHODS.items() if method.config is config}
    (heading,) = re.findall(rf"^### `{config.__name__}`: options of (.*)$", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", heading)) == names
    defaults = {field.name: shown(getattr(config(), field.name)) for field in dataclasses.fields(config)}
    assert said(config.__name__) == defaults


ROWS = [
    (heading, name, row)
    for heading, name, text in re.findall(
        r"^### (`([^`]+)`.*?)\n(.*?)(?=^### |\Z)", section("Rows"), re.DOTALL | re.MULTILINE
    )
    for row in blocks(text)
]


def test_every_format_has_an_example_and_every_heading_a_row() -> None:
    assert {name for _, name, _ in ROWS} == set(FORMATS)
    assert len({heading for heading, _, _ in ROWS}) == section("Rows").count("\n### ")


@pytest.mark.parametrize("name, row", [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_an_example_is_read_in_its_format(name: str, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for key, found in list(FORMATS.items()):

        def reader(row: Row, place: Place, key: str = key, read: Any = found.read) -> Sample:
            asked.append(key)
            return read(row, place)  # type: ignore[no-any-return]

        monkeypatch.setitem(FORMATS, key, dataclasses.replace(found, read=reader))
    sample = read_row(row, Place("page", 0, Path("/folder")))
    assert asked == [name]
    assert sample.messages[-1].role == "assistant" and sample.messages[-1].learnt


def test_the_entry_reads_its_row(tmp_path: Path) -> None:
    entries, row = blocks(section("Entries of dataset_info.json"))
    (name,) = entries
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf8")
    (tmp_path / entries[name]["file_name"]).write_text(json.dumps([row]), encoding="utf8")
    (sample,) = read(Source(path=str(tmp_path / "dataset_info.json"), entry=name))
    assert [m.role for m in sample.messages] == ["user", "assistant"]
    assert [p.content for p in sample.pictures] == [tmp_path / row["images"][0]]


def test_the_readme_links_it() -> None:
    assert "(docs/recipes.md)" in (source.ROOT / "README.md").read_text(encoding="utf8")
