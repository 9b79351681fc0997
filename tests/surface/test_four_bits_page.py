"""docs/four-bits.md: its recipe trains mini-1 over 4 bits, its commands run, its files open with bitsandbytes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image
from surface import source

import tarsia.cli
from tarsia.base import resolve
from tarsia.cli.parser import parser
from tarsia.core.errors import ConfigError
from tarsia.quant import native
from tarsia.train import Recipe

PAGE = (source.ROOT / "docs" / "four-bits.md").read_text(encoding="utf8")
SHORT = ("steps=2", "batch=2", "warmup=0", "threads=1", "device=cpu")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Each command of the page, without what stands before it of the environment."""
    return [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's recipe, and rows as it says that they may be."""
    folder = tmp_path_factory.mktemp("page")
    (row,) = (json.loads(text) for text in re.findall(r"`(\{\"images.*?\})`", PAGE))
    Image.new("RGB", (64, 64), (30, 120, 90)).save(folder / row["images"][0])
    lines = [{**row, "answer": answer} for answer in (row["answer"], "metal", "paper", "glass")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    (folder / "recipe.yaml").write_text(blocks("yaml")[0], encoding="utf8")
    return folder


@pytest.mark.slow
def test_the_commands_run_in_their_order(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        resolve("mini-1")
    except ConfigError:
        pytest.skip("mini-1 is not in this checkout")
    monkeypatch.chdir(world)
    seen = []
    for words in commands():
        with monkeypatch.context() as environment:
            while "=" in words[0]:
                environment.setenv(*words.pop(0).split("=", 1))
            program, verb, *rest = words
            assert program == "tarsia"
            code = tarsia.cli.main([verb, *rest, *(SHORT if verb == "train" else ())])
        out, err = capsys.readouterr()
        assert code == 0 or verb == "doctor", err
        seen.append((verb, out, err))
    trained = next(out for verb, out, _ in seen if verb == "train")
    assert "in 4 bits (nf4, scales nested)" in trained and "adapter: runs/first/adapter" in trained
    assert "as asked for" in next(err for verb, _, err in seen if verb == "ask" and "another form" in err)
    if native.library() is not None:
        assert "portable (TARSIA_KERNEL asks for it)" in [out for verb, out, _ in seen if verb == "doctor"][-1]
    described = json.loads((world / "runs/first/adapter/tarsia.json").read_text(encoding="utf8"))
    assert "nf4" in json.dumps(described["fingerprint"])
    _opened_by_bitsandbytes()


def _opened_by_bitsandbytes() -> None:
    """The page's Python, in the folder where the commands have run."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the page's files are opened with bitsandbytes")
    (block,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(block, "four-bits.md", "exec"), names)
    classes = {name: type(module) for name, module in names["model"].named_modules()}  # type: ignore[attr-defined]
    assert classes["model.language_model.layers.0.self_attn.q_proj"] is bitsandbytes.nn.Linear4bit
    assert classes["model.multi_modal_projector.linear_1"] is not bitsandbytes.nn.Linear4bit


def test_every_block_of_yaml_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(blocks("yaml")[0], encoding="utf8")
    assert Recipe.load(path).four_bits is not None
    others = [yaml.safe_load(block) for block in blocks("yaml")[1:]]
    assert others
    for other in others:
        Recipe.load(path, [f"{key}={json.dumps(value)}" for key, value in other.items()])


def test_every_command_is_one() -> None:
    found = [[word for word in words if not word.startswith("TARSIA_")] for words in commands()]
    assert {words[0] for words in found} == {"tarsia"}
    assert {parser().parse_args(words[1:]).run.__module__.rpartition(".")[2] for words in found} == {
        *("train", "ask", "evaluate", "quantise", "doctor")
    }


def test_every_kernel_has_its_word() -> None:
    (table,) = re.findall(r"^\| `TARSIA_KERNEL` .*?(?=\n\n)", PAGE, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", table)) - {"TARSIA_KERNEL"} == set(native.CHOICES)


def test_every_link_leads_somewhere() -> None:
    wanted = re.findall(r"\]\(([^)#]+)", PAGE)
    assert wanted and not [path for path in wanted if not (source.ROOT / "docs" / path).is_file()]


def test_the_readme_links_it() -> None:
    assert "(docs/four-bits.md)" in (source.ROOT / "README.md").read_text(encoding="utf8")
