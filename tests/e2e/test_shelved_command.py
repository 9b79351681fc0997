"""A version of the library, library:REFERENCE, wherever the command line takes an adapter's folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.made_adapters import saved
from train import small

import tarsia.cli
from tarsia.adapter import Host, load, open_base
from tarsia.cli import adapted
from tarsia.cli.export import where
from tarsia.core.attach import adapters
from tarsia.core.errors import LibraryError
from tarsia.library import Library

LORA = (("lora", "language.*.{q,v}", {"rank": 2}),)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Host]:
    folder = tmp_path_factory.mktemp("world")
    host = open_base(str(small.base(folder / "base")))
    for seed, name in enumerate(("one", "two")):
        saved(host, folder / name, LORA, seed=seed)
    return folder, host


@pytest.fixture
def library(world: tuple[Path, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """belt@1 (stable), belt@2 (current)."""
    monkeypatch.setenv("TARSIA_LIBRARY", str(tmp_path / "library"))
    made = Library.make(tmp_path / "library")
    made.publish(world[0] / "one", "belt", tags=["stable"])
    made.publish(world[0] / "two", "belt")
    return made


def opened(world: tuple[Path, Host], *words: str) -> Host:
    parser = argparse.ArgumentParser()
    adapted.options(parser)
    return adapted.opened(parser.parse_args([str(world[0] / "base"), *words]))


def spoil(library: Library, reference: str) -> None:
    path = library.folder(library.version(reference)) / "adapter_model.safetensors"
    path.chmod(0o644)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def test_it_is_opened_under_its_own_name(world: tuple[Path, Host], library: Library) -> None:
    host = opened(world, "--adapter", "library:belt@stable")
    assert list(adapters(host.model)) == ["belt"]
    two = ("--adapter", "library:belt@stable", "--adapter", "library:belt@2")
    host = opened(world, *two, "--compose", "Average(belt-stable, belt-2)")
    assert sorted(adapters(host.model)) == ["belt-2", "belt-stable"]


@pytest.mark.parametrize(
    "given, names",
    [
        (["library:belt"], ["belt"]),
        (["library:belt#e1d0"], ["belt"]),
        (["library:belt@1", "library:belt"], ["belt-1", "library-belt"]),
        (["library:belt@1", "runs/belt/adapter"], ["belt-1", "runs-belt"]),
        (["library:cats.v2@a.b", "cats-v2"], ["cats-v2-a-b", None]),
        (["library:keys"], ["library-keys"]),
    ],
)
def test_names(given: list[str], names: list[str | None]) -> None:
    """Longer only where two would have one name, or a model has a use of its own for it."""
    found = adapted.named(given)
    assert [name for name, wanted in zip(found, names, strict=True) if wanted not in (name, None)] == []
    assert len(set(found)) == len(found)


def test_it_is_exported_folded_and_merged(
    world: tuple[Path, Host], library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main: Callable[..., int] = lambda *words: tarsia.cli.main([str(word) for word in words])  # noqa: E731
    base = world[0] / "base"
    assert main("export", "library:belt@stable", "--to", "peft", "--out", tmp_path / "peft") == 0
    assert load(tmp_path / "peft").patches.keys() == load(world[0] / "one").patches.keys()
    assert main("fold", "library:belt", "--base", base, "--out", tmp_path / "folded") == 0
    assert (tmp_path / "folded" / "model.safetensors").is_file()
    capsys.readouterr()
    words = ("library:belt@stable", "library:belt@2", "--base", base, "--out", tmp_path / "merged", "--json")
    assert main("merge", *words) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["adapters"] == ["belt-stable", "belt-2"]
    assert load(tmp_path / "merged").card["names"] == ["belt-stable", "belt-2"]


def test_what_is_damaged_or_not_there_is_refused(world: tuple[Path, Host], library: Library) -> None:
    for reference in ("library:belt@9", "library:dog", "library:", "library:No Name"):
        for act in (lambda: opened(world, "--adapter", reference), lambda: where(Path(reference))):  # noqa: B023
            with pytest.raises(LibraryError):
                act()
    spoil(library, "belt")
    for act in (lambda: opened(world, "--adapter", "library:belt"), lambda: where(Path("library:belt"))):
        with pytest.raises(LibraryError, match=r"not those that were published(.|\n)*adapter_model\.safetensors"):
            act()


def test_every_verb_that_takes_an_adapter_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("ask", "eval", "forgetting", "merge", "fold", "export"):
        with pytest.raises(SystemExit):
            tarsia.cli.main([verb, "--help"])
        assert "library:REFERENCE" in "".join(capsys.readouterr().out.split("\n")).replace(" " * 24, ""), verb
