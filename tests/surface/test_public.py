"""The public names and the command line are what they were."""

from __future__ import annotations

import ast
import importlib

import pytest
from surface import freeze, source

CHANGE = "the surface has changed: note it in CHANGELOG.md, then run tests/surface/freeze.py"


def test_public_names() -> None:
    assert freeze.names() == freeze.NAMES.read_text(encoding="utf8"), CHANGE


def test_commands() -> None:
    assert freeze.commands() == freeze.COMMANDS.read_text(encoding="utf8"), CHANGE


@pytest.mark.parametrize("folder", source.folders(source.PACKAGE))
def test_every_folder_is_a_package(folder: str) -> None:
    assert (source.PACKAGE / folder / "__init__.py").is_file()


@pytest.mark.parametrize("folder", ["", *source.folders(source.PACKAGE)])
def test_names_in_all_exist(folder: str) -> None:
    module = importlib.import_module(".".join(filter(None, ["tarsia", folder])))
    public = list(getattr(module, "__all__", []))
    assert len(public) == len(set(public))
    for name in public:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("folder", ["", *source.folders(source.PACKAGE)])
def test_what_a_package_takes_in_is_public(folder: str) -> None:
    """A package that re-exports says so in __all__, and names nothing there that it does not hold."""
    path = source.PACKAGE / folder / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf8"))
    taken = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tarsia.")
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    module = importlib.import_module(".".join(filter(None, ["tarsia", folder])))
    assert taken - used <= set(getattr(module, "__all__", []))
