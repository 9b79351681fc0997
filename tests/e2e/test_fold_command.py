"""``tarsia fold`` from an adapter's folder to a folder that plain Transformers loads, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merge.fold_world import LORA, saved, trained

import tarsia.cli
from tarsia.adapter import FourBits, save
from tarsia.base import resolve
from tarsia.core.attach import Part
from tarsia.core.method import METHODS
from tarsia.labs import folding
from tarsia.merge.fold import RECORD


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """mini-1, which has a processor, an adapter on it, and rows."""
    folder = tmp_path_factory.mktemp("mini")
    adapter = folding.moved("lora", {"rank": 4}, "language.*.{q,v}", folder)
    save(adapter, folder / "adapter")
    return folder


def fold(*arguments: object) -> int:
    return tarsia.cli.main(["fold", *map(str, arguments)])


def test_a_run_is_folded_and_loads_with_plain_transformers(world, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    rows = world / "shown.parquet"
    assert fold(world / "adapter", "--base", "mini-1", "--out", tmp_path / "out", "--rows", rows, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["proof"]["rows"] == 8, "four of the probe, four of the rows"
    assert told["proof"]["pictures"] and told["proof"]["difference"] <= told["proof"]["allowed"]
    assert told["base"]["name"] == "mini-1" and len(told["adapters"][0]["sha256"]) == 64
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not any(report.values())
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor is not None
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == {k: v for k, v in told.items() if k != "out"}
    assert (tmp_path / "out/model.safetensors").stat().st_size == (
        Path(resolve("mini-1")) / "model.safetensors"
    ).stat().st_size


def test_in_words(world, tmp_path, capsys):
    assert fold(world / "adapter", "--out", tmp_path / "out") == 0
    out = capsys.readouterr()
    assert "of the change is there" in out.out and "same likeliest token" in out.out and "pictures among" in out.out
    assert "tarsia: writing model.safetensors" in out.err
    assert fold(world / "adapter", "--base", "mini-1", "--out", tmp_path / "out") == 2
    assert "there already" in capsys.readouterr().err


@pytest.mark.slow
def test_over_four_bits_it_asks(tmp_path, capsys):
    base = saved(tmp_path / "base")
    save(trained(base, (LORA,), form=FourBits(), size=0.02), tmp_path / "adapter")
    arguments = (tmp_path / "adapter", "--base", base, "--out", tmp_path / "out")
    assert fold(*arguments) == 2
    said = capsys.readouterr().err
    assert "dequantised:" in said and "original:" in said
    assert fold(*arguments, "--onto", "dequantised", "--requantise", "nf4") == 2
    assert "would be left" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert fold(*arguments, "--onto", "dequantised") == 0
    assert json.loads((tmp_path / "out" / RECORD).read_text())["onto"] == "dequantised"


@pytest.mark.parametrize("wrong,says", [(["--keep", "2"], "between 0 and 1"), (["--onto", "both"], "onto")])
def test_wrong_options(wrong, says, world, tmp_path, capsys):
    assert fold(world / "adapter", "--base", "mini-1", "--out", tmp_path / "out", *wrong) == 2
    assert says in capsys.readouterr().err


def test_what_does_not_fold_and_what_is_not_there(tmp_path, capsys):
    base = saved(tmp_path / "base")
    part = Part("houlsby", "language", METHODS["houlsby"].config())
    save(trained(base, (part,)), tmp_path / "adapter")
    assert fold(tmp_path / "adapter", "--base", base, "--out", tmp_path / "out") == 2
    assert "houlsby" in capsys.readouterr().err
    assert fold(tmp_path / "nothing", "--base", base, "--out", tmp_path / "out") == 2
    assert "no such adapter" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_that_peft_made_is_proved_on_rows(world, tmp_path, capsys):
    import shutil

    from tarsia.adapter.files import OURSELVES, PROBE

    shutil.copytree(world / "adapter", tmp_path / "peft")
    for name in (OURSELVES, PROBE):
        (tmp_path / "peft" / name).unlink()
    arguments = (tmp_path / "peft", "--base", "mini-1", "--out", tmp_path / "out", "--json")
    assert fold(*arguments) == 2
    assert "no rows to prove" in capsys.readouterr().err
    assert fold(*arguments, "--rows", world / "shown.parquet") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["proof"]["pictures"] and json.loads(told.out)["over"] == "unknown"
    assert "is not known" in told.err and "files' own numbers" in told.err
    assert fold(*arguments[:-2], tmp_path / "two", "--over", "nf4", "--rows", world / "shown.parquet") == 2
    assert "into which numbers" in capsys.readouterr().err
