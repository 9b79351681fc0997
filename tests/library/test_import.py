"""Adapters that PEFT made, from folders and the hub, become versions with a fingerprint and an origin."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from families import FAMILIES
from huggingface_hub.errors import LocalEntryNotFoundError
from library import shelved
from safetensors.torch import load_file

from tarsia.adapter import Fingerprint, Host, load, open_base, put, save
from tarsia.core.errors import AdapterError, BaseMismatch, LibraryError
from tarsia.library import Library
from tarsia.library.arrive import ON_WORD, arrive, fetched
from tarsia.library.opening import open_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "llava-tiny"
    FAMILIES["llava"].build()[0].save_pretrained(folder)
    return folder


def made(base: Path, folder: Path, **options: Any) -> Path:
    """A folder that PEFT wrote, of an adapter that moves outputs."""
    model = FAMILIES["llava"].build()[0]
    wanted = {"r": 2, "lora_alpha": 8, "target_modules": r".*language_model.*\.(q|v)_proj", **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**wanted))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "someone/llava-tiny"}))
    return folder


@pytest.fixture(scope="module")
def theirs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(base, tmp_path_factory.mktemp("peft") / "a")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library.make(tmp_path / "library")


def logits(host: Host) -> torch.Tensor:
    with torch.no_grad():
        return host.model(**FAMILIES["llava"].batch()).logits


def test_a_folder_of_peft(library: Library, theirs: Path, base: Path) -> None:
    published = arrive(library, theirs, "cat", base=str(base), tags=["new"])
    assert published.version.reference == "cat@1" and "imported from" in published.version.note
    adapter = open_adapter(library, "cat@new")
    assert adapter.fingerprint == Fingerprint.of_folder(base) and adapter.base == str(base)
    origin = adapter.card["origin"]
    assert (origin["made_by"], origin["base_name"], origin["base"]) == ("PEFT", "someone/llava-tiny", ON_WORD)
    assert origin["source"] == str(theirs) and set(origin["sha256"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "unverified" not in json.dumps(dict(adapter.card))
    held = load_file(theirs / "adapter_model.safetensors")
    path = next(iter(adapter.patches))
    assert any(torch.equal(value, adapter.patches[path].tensors["A"]) for value in held.values())


def test_it_computes_what_it_did(library: Library, theirs: Path, base: Path) -> None:
    arrive(library, theirs, "cat", base=str(base))
    host = open_base(str(base), processor=False)
    bare = logits(host)
    put(host, open_adapter(library, "cat"), "cat")
    other = peft.PeftModel.from_pretrained(FAMILIES["llava"].build()[0], theirs).eval()
    with torch.no_grad():
        wanted = other(**FAMILIES["llava"].batch()).logits
    assert (logits(host) - bare).abs().max() > 0.1
    assert (logits(host) - wanted).abs().max() <= 1e-5


def test_a_projector_is_held_to_the_bases_weights(library: Library, base: Path, tmp_path: Path) -> None:
    folder = made(base, tmp_path / "p", modules_to_save=["multi_modal_projector"])
    arrive(library, folder, "cat", base=str(base))
    assert {patched.method for patched in open_adapter(library, "cat").patches.values()} == {"lora", "full"}


def test_without_its_base(library: Library, theirs: Path) -> None:
    with pytest.raises(LibraryError, match=r"against its base.*\n.*no tarsia.json"):
        arrive(library, theirs, "cat")
    assert library.search() == []


def test_against_a_base_of_another_name(library: Library, theirs: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    with pytest.raises(BaseMismatch, match="another name"):
        arrive(library, theirs, "cat", base=str(tmp_path / "other"))
    assert arrive(library, theirs, "cat", base=str(tmp_path / "other"), allow=["base name"]).fresh


def test_against_a_base_of_another_shape(library: Library, theirs: Path, base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "llava-tiny")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["hidden_size"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="another shape"):
        arrive(library, theirs, "cat", base=str(other))
    assert library.search() == []


def test_an_adapter_of_ours_is_published_as_it_is(library: Library, base: Path, tmp_path: Path) -> None:
    save(shelved.adapter(), tmp_path / "a")
    arrive(library, tmp_path / "a", "cat")
    assert shelved.same(open_adapter(library, "cat"), shelved.adapter())
    with pytest.raises(BaseMismatch):
        arrive(library, tmp_path / "a", "dog", base=str(base))
    (tmp_path / "a/tarsia.json").write_text((tmp_path / "a/tarsia.json").read_text().replace("owner", "opner"))
    with pytest.raises(AdapterError, match=r"tarsia\.json"):
        arrive(library, tmp_path / "a", "dog")


def test_one_of_ours_that_names_no_base_is_held_to_none(library: Library, base: Path, tmp_path: Path) -> None:
    save(replace(shelved.adapter(), fingerprint=None), tmp_path / "a")
    with pytest.raises(AdapterError, match="does not say which base"):
        arrive(library, tmp_path / "a", "cat", base=str(base))
    assert library.search() == []
    assert arrive(library, tmp_path / "a", "cat").version.weights is None


def test_a_pickle_is_never_read(library: Library, theirs: Path, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(theirs, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        arrive(library, folder, "cat", base=str(base))


@pytest.fixture
def hub(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has one repository; what was asked of it."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **how: Any) -> str:
        asked.append({"name": name, **how})
        if name != "someone/cat-lora":
            raise LocalEntryNotFoundError("no such repository, and no connection")
        place = tmp_path / "snapshots" / (how["revision"] or COMMIT)
        if not place.exists():
            shutil.copytree(theirs, place)
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_from_the_hub(library: Library, base: Path, hub: list[dict[str, Any]]) -> None:
    published = arrive(library, "someone/cat-lora", "cat", base=str(base))
    assert COMMIT in published.version.note
    origin = open_adapter(library, "cat").card["origin"]
    assert (origin["source"], origin["revision"]) == ("someone/cat-lora", COMMIT)
    patterns = hub[0]["allow_patterns"]
    assert "adapter_model.safetensors" in patterns and not any(
        "bin" in pattern or "*" in pattern for pattern in patterns
    )
    again = arrive(library, "someone/cat-lora", "cat", base=str(base))
    assert not again.fresh
    arrive(library, "someone/cat-lora", "cat", base=str(base), revision="f" * 40)
    assert hub[-1]["revision"] == "f" * 40 and open_adapter(library, "cat").card["origin"]["revision"] == "f" * 40


@pytest.mark.parametrize("source", ["someone/nothing", "nowhere", "./nowhere", "a/b/c", "~/nowhere/at-all"])
def test_what_is_nowhere(hub: list[dict[str, Any]], source: str) -> None:
    with pytest.raises(LibraryError):
        fetched(source)


def test_a_folder_has_no_revision(theirs: Path) -> None:
    with pytest.raises(LibraryError, match="no revisions"):
        fetched(theirs, "main")


def test_peft_reads_what_was_imported(library: Library, theirs: Path, base: Path) -> None:
    """And what PEFT reads of it is what it wrote."""
    version = arrive(library, theirs, "cat", base=str(base)).version
    ours, held = (
        load_file(library.folder(version) / "adapter_model.safetensors"),
        load_file(theirs / "adapter_model.safetensors"),
    )
    assert ours.keys() == held.keys() and all(torch.equal(value, held[key]) for key, value in ours.items())
    assert load(library.folder(version)).fingerprint == Fingerprint.of_folder(base)
