"""The demo and the blood cells from their first row to their picture, on a tiny random base with two steps."""

from __future__ import annotations

import io
import itertools

import matplotlib.image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from base.photos import photographs, png
from data.processors import picture
from rich.console import Console
from train import small

from tarsia.adapter import open_base
from tarsia.core.errors import ConfigError
from tarsia.evaluate import evaluate
from tarsia.labs import blood, demo, experiment, smears, sources

WRITE = sources.write


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(small.base(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture
def short(monkeypatch, tiny):
    """Two steps on the tiny base, two rows a file, two tokens an answer."""
    for lab in (demo, blood):
        monkeypatch.setattr(lab, "RECIPE", {**lab.RECIPE, "model": tiny, "steps": 2, "batch": 2, "warmup": 1})
    monkeypatch.setattr(sources, "write", lambda path, rows: WRITE(path, itertools.islice(rows, 2)))
    brief = {"batch": 50, "max_new_tokens": 2}
    monkeypatch.setattr(experiment, "evaluate", lambda host, samples, **_: evaluate(host, samples, **brief))


def check(picture_file, mixes, sources_measured):
    pixels = matplotlib.image.imread(picture_file)
    assert pixels.shape[0] > 500 and pixels.std() > 0.01
    assert [mix.name for mix in mixes] == ["no replay", "10 % replay"]
    for mix in mixes:
        assert [result.source for result in mix.report.results] == list(sources_measured)
        assert mix.drift <= 1e-4 and mix.folder.is_dir() and 0 < mix.share < 1
    assert not list(picture_file.parent.glob("*.partial*"))


def test_the_demo_runs_to_its_picture(tmp_path, short):
    said = io.StringIO()
    before, mixes = demo.run(tmp_path / "out", Console(file=said, width=200))
    check(tmp_path / "out" / "demo.png", mixes, (*demo.TASK, *demo.GENERAL))
    text = said.getvalue()
    for line in ("mini-1, before and after", "points forgotten", "Reloaded from its files", "tarsia ask mini-1"):
        assert line in text
    assert str(mixes[-1].folder) in text
    values = demo.values(before, mixes)
    assert set(values["points forgotten"]) == {"no replay", "10 % replay"}
    free, _ = experiment.shares(before, demo.TASK)
    assert values["the job, free"]["before"] == round(100 * free, 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files named and laid out as those in TARSIA_DATA."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    boxes = [
        {"label": label, "xmin": 40 + 90 * i, "xmax": 80 + 90 * i, "ymin": 100, "ymax": 140}
        for i, label in enumerate(smears.CELLS)
    ]
    rows = [{"image": {"bytes": png(picture(shade=9 * i + 1).resize((320, 240)))}, "boxes": boxes} for i in range(2)]
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows), shelf / f"bccd-{split}.parquet")
        photographs(shelf / f"cifar10-{split}.parquet", 20)
    monkeypatch.setenv("TARSIA_DATA", str(shelf))
    return shelf


@pytest.mark.slow
def test_the_blood_cells_run_to_their_picture(tmp_path, short, folder):
    before, mixes = blood.run(tmp_path / "out", Console(file=io.StringIO()))
    check(tmp_path / "out" / "blood.png", mixes, [r.source for r in before.results])
    assert {r.source for r in before.results} == {*blood.TASK, *blood.GENERAL, *blood.WATCHED}
    values = blood.values(before, mixes)
    assert set(values["dogs called cells"]) == {"before", "no replay", "10 % replay"}
    assert set(values["points forgotten, photographs"]) == {"no replay", "10 % replay"}
    assert {row.reference for r in before.results if r.source == "dog" for row in r.rows} == {"a dog"}


def test_missing_files_are_named(folder, monkeypatch):
    (folder / "bccd-test.parquet").unlink()
    with pytest.raises(ConfigError, match=r"TARSIA_DATA|bccd-test\.parquet"):
        blood.data()
    monkeypatch.delenv("TARSIA_DATA")
    with pytest.raises(ConfigError, match="not set"):
        blood.data()


def test_answers_of_blood_are_counted(tmp_path, tiny, folder):
    path = tmp_path / "dog.parquet"
    WRITE(path, smears.photographs(folder / "cifar10-test.parquet", 2, only="dog"))
    report = evaluate(open_base(tiny), experiment.samples({"dog": path}), batch=4, max_new_tokens=1)
    assert blood.cell_words(report) == 0
    (result,) = report.results
    spoken = [
        row.model_copy(update={"said": said}) for row, said in zip(result.rows, ("a platelet", "a dog"), strict=True)
    ]
    changed = report.model_copy(update={"results": (result.model_copy(update={"rows": tuple(spoken)}),)})
    assert blood.cell_words(changed) == 0.5
