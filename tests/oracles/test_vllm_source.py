"""The rules for vLLM held to vLLM's own source: TARSIA_VLLM names a folder with its ``vllm`` package (0.33.0).

Nothing of it is imported as it stands: what is needed is taken out of the files, its imports stubbed.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import FAMILIES
from merge.test_vllm_rules import BREAKS, FIELDS

from tarsia.adapter import Host
from tarsia.core.site import Kind
from tarsia.merge.served import FAMILIES as SERVED
from tarsia.merge.served import MOST_WORDS, spot
from tarsia.merge.vllm import RANKS

ROOT = Path(os.environ.get("TARSIA_VLLM", "/nowhere")) / "vllm"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="TARSIA_VLLM does not name the source of vLLM")

OURS_ALONE = {"type", "names", "some", "shapes", "family", "modules"}
"""Rules that vLLM's PEFTHelper does not look at: other code of it does, or none."""
OF_HELPER = [(rule, held) for rule, held in BREAKS if rule not in OURS_ALONE and held.fields.get("r") != 4.5]
"""A rank that is no whole number it does take."""

FILES = {
    "llava": "llava.py", "llava_next": "llava_next.py", "llava_onevision": "llava_onevision.py",
    "qwen2_vl": "qwen2_vl.py", "qwen2_5_vl": "qwen2_5_vl.py", "qwen3_vl": "qwen3_vl.py",
    "qwen3_vl_moe": "qwen3_vl.py", "idefics3": "idefics3.py", "smolvlm": "idefics3.py", "paligemma": "paligemma.py",
    "gemma3": "gemma3_mm.py", "internvl": "interns1.py", "blip_2": "blip2.py",
}  # fmt: skip


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf8"))


def run(path: str, wanted: set[str], **known: Any) -> dict[str, Any]:
    """The definitions of these names in a file, run with ``known`` in place of its imports."""
    nodes = [n for n in tree(path).body if getattr(n, "name", None) in wanted]
    space: dict[str, Any] = {"re": re, "logger": SimpleNamespace(info_once=str, warning_once=str), **known}
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *nodes], []), path, "exec"), space)
    return space


@pytest.fixture(scope="module")
def helper() -> Any:
    import math
    from dataclasses import MISSING, dataclass, field, fields

    known = {"math": math, "MISSING": MISSING, "dataclass": dataclass, "field": field, "fields": fields}
    return run("lora/peft_helper.py", {"PEFTHelper"}, **known)["PEFTHelper"]


@pytest.fixture(scope="module")
def mapper() -> Any:
    from collections.abc import Iterable, Mapping
    from dataclasses import dataclass, field, replace

    known = {"dataclass": dataclass, "field": field, "replace": replace, "Mapping": Mapping, "Iterable": Iterable}
    return run("model_executor/models/utils.py", {"WeightsMapper"}, **known)["WeightsMapper"]


def legal(helper: Any, fields: Any) -> bool:
    """Whether vLLM's own helper takes the configuration."""
    try:
        helper.from_dict(dict(fields)).validate_legal(SimpleNamespace(max_lora_rank=RANKS[-1]))
    except (ValueError, TypeError):
        return False
    return True


@pytest.mark.parametrize("rule, held", OF_HELPER)
def test_what_breaks_a_rule_of_its_helper_it_refuses(rule: str, held: Any, helper: Any) -> None:
    assert not legal(helper, held.fields)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"init_lora_weights": "eva"}, {"r": 512}])
def test_what_breaks_none_it_takes(fields: Any, helper: Any) -> None:
    assert legal(helper, {**FIELDS, **fields})


def test_its_ranks_and_its_largest_vocabulary() -> None:
    text = (ROOT / "config/lora.py").read_text(encoding="utf8")
    literal = re.search(r"MaxLoRARanks = Literal\[([\d, ]+)\]", text)
    assert literal is not None
    assert tuple(int(part) for part in literal[1].split(",")) == RANKS
    assert f"vocab_size > {MOST_WORDS}" in (ROOT / "lora/layers/logits_processor.py").read_text(encoding="utf8")


def model_class(name: str) -> ast.ClassDef:
    """vLLM's class for a family: the one that says how multimodal names are mapped."""
    for node in tree(f"model_executor/models/{FILES[name]}").body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("ForConditionalGeneration"):
            return node
    raise AssertionError(name)


def renamed(name: str, mapper: Any, key: str) -> str:
    """The module that vLLM takes a tensor for, by its own parser and the class's own mapping."""
    held = None
    for node in model_class(name).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "hf_to_vllm_mapper":
            held = eval(compile(ast.Expression(node.value), name, "eval"), {"WeightsMapper": mapper})
            held = held.get_rename_mapper()
    parse = run("lora/utils.py", {"parse_fine_tuned_lora_name"})["parse_fine_tuned_lora_name"]
    found: tuple[str, bool] = parse(key, held)
    return found[0]


@pytest.mark.parametrize("name", list(FILES))
def test_the_names_in_a_file_become_its_modules(name: str, mapper: Any) -> None:
    supports = "SupportsLoRA" in {getattr(base, "id", "") for base in model_class(name).bases}
    config = FAMILIES[name].config().to_dict()
    assert supports == (not SERVED[config["model_type"]].why)
    sites = [s for s in Host.of(FAMILIES[name].build()[0]).sites if s.kind is Kind.WEIGHT]
    spots = [found for site in sites if (found := spot(config, site.path)) is not None]
    for found in spots:
        assert renamed(name, mapper, f"base_model.model.{found.written}.lora_A.weight") == found.module
    towers = any(
        isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "supports_tower_connector_lora"
        for node in model_class(name).body
    )
    assert bool(spots) == supports
    assert any(found.tower for found in spots) == (towers and supports)


@pytest.mark.parametrize("name", [n for n in FILES if n != "llava_onevision"])
def test_towers_and_language_models_begin_as_its_mapping_says(name: str, mapper: Any) -> None:
    """What is not below one of these beginnings has no LoRA there (LoRAModelManager._get_punica_wrapper)."""
    method = next(n for n in model_class(name).body if getattr(n, "name", "") == "get_mm_mapping")
    call = next(n for n in ast.walk(method) if isinstance(n, ast.Call))
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    language = given.pop("language_model")
    rest = tuple(p for value in given.values() for p in ([value] if isinstance(value, str) else value))
    config = FAMILIES[name].config().to_dict()
    for site in Host.of(FAMILIES[name].build()[0]).sites:
        found = spot(config, site.path) if site.kind is Kind.WEIGHT else None
        if found is not None:
            assert found.module.startswith(rest if found.tower else language)


def test_mllama_is_not_there() -> None:
    assert '"MllamaForConditionalGeneration": "0.10.2"' in (ROOT / "model_executor/models/registry.py").read_text()


def test_a_planted_wrong_name_is_seen(mapper: Any) -> None:
    """The tower as Transformers names it is another module there."""
    key = "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight"
    assert renamed("llava", mapper, key) != "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
