"""The embedded base as it is shipped: small, documented, loadable without Tarsia, and as right as its card says."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tarsia import base
from tarsia.adapter import open_base
from tarsia.core.errors import ConfigError
from tarsia.data import Source, read
from tarsia.evaluate.generate import generate
from tarsia.labs import sources

FOLDER = Path(base.__file__).parent / "mini-1"
CARD = json.loads((FOLDER / "card.json").read_text())
ASK = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What digit is this?"}]}]
prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
inputs = processor(text=prompt, images=[Image.open(picture)], return_tensors="pt")
said = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
print(sum(p.numel() for p in model.parameters()), tokens, any(name.startswith("tarsia") for name in sys.modules))
print(processor.decode(said, skip_special_tokens=True))
"""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_card_is_of_these_weights():
    assert CARD["name"] == "mini-1"
    assert CARD["sha256"] == digest(FOLDER / "model.safetensors")
    assert CARD["data"]["digits.png"] == digest(FOLDER.parent / "digits.png")


def test_the_card_says_how_it_was_made():
    stages = [line["command"].split()[2] for line in CARD["commands"]]
    assert stages == sorted(stages, reverse=True) and {"tarsia.base.see", "tarsia.base.join"} == set(stages)
    assert all(f"--seed {CARD['seed']}" in line["command"] for line in CARD["commands"])
    assert set(CARD["data"]) == {"cifar10-train.parquet", "cifar10-test.parquet", "digits.png"}
    for stage in ("see", "join"):
        steps = [line["step"] for line in CARD["curve"][stage]]
        last = [line["command"] for line in CARD["commands"] if f"base.{stage} " in line["command"]][-1]
        assert steps == sorted(set(steps)) and 0 < steps[-1] <= int(last.split("--steps ")[1].split()[0])


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 20e6
    assert CARD["parameters"] <= 8e6


def test_its_name_is_known_and_another_is_left_alone(tmp_path, monkeypatch):
    assert base.resolve("mini-1") == str(FOLDER)
    assert base.resolve("owner/model") == "owner/model"
    (tmp_path / "mini-1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base.resolve("mini-1") == "mini-1", "a folder of that name comes first"


def test_an_installation_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ConfigError, match="not in this installation"):
        base.resolve("mini-1")


@pytest.mark.slow
def test_it_answers_without_tarsia(tmp_path):
    """A process that has only Transformers: 64 image tokens a picture, as many parameters as the card says."""
    _, said, (shown,) = next(sources.digits(1, "held-out"))
    shown.save(tmp_path / "digit.png")
    unset = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ASK, str(FOLDER), str(tmp_path / "digit.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=unset, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == [f"{CARD['parameters']} 64 False", said]


def test_it_is_as_right_as_its_card_says(tmp_path):
    """Held-out rows of each source; the bar is four standard errors and one row below what the card states."""
    host = open_base("mini-1")
    for name, count in (("digits", 16), ("scenes", 16), ("words", 12), ("refusals", 4)):
        path = tmp_path / f"{name}.parquet"
        sources.write(path, sources.WORLD[name](count, "held-out"))
        rows = read(Source(path=str(path), name=name))
        said = generate(host, rows, max_new_tokens=8 if name in ("digits", "scenes") else 20, batch=16)
        right = sum(a == row.messages[-1].text for a, row in zip(said, rows, strict=True)) / count
        stated = CARD["held_out_exact"][name]
        assert right >= stated - 4 * (stated * (1 - stated) / count) ** 0.5 - 1 / count, (name, right, stated)
