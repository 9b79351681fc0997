"""Imports run one way: held by reading them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from surface import source

BELOW = {
    "core": set(),
    "base": {"core.errors"},
    "anatomy": {"core"},
    "methods": {"core"},
    "quant": {"core"},
    "data": {"core"},
    "adapter": {"core", "anatomy", "methods", "quant", "data", "base.resolve"},
    "evaluate": {"core", "anatomy", "methods", "quant", "data", "adapter"},
    "train": {"core", "anatomy", "methods", "quant", "data", "adapter"},
    "merge": {"core", "methods", "quant", "data", "adapter"},
    "library": {"core", "adapter"},
    "plan": {"core", "anatomy", "methods", "quant", "data", "adapter", "evaluate", "train"},
    "serve": {"core", "anatomy", "methods", "quant", "data", "adapter", "evaluate", "train", "merge", "library"},
    "labs": {
        *("core", "anatomy", "methods", "quant", "data", "adapter", "evaluate", "train", "merge", "library", "plan"),
        "base",
        "serve",
    },
    "cli": {
        *("core", "anatomy", "methods", "quant", "data", "adapter", "evaluate", "train", "merge", "library", "plan"),
        "base",
        "serve",
        *("labs.demo", "labs.sources", "labs.chapters", "labs.frame"),
    },
}
"""Folder: what it may import of the others (a folder, or a name in it). Nothing imports cli; only cli imports labs."""

OUTSIDE = {"core": {"torch", "transformers"}, "methods": {"torch"}, "quant": {"torch", "triton"}}
"""Folder: all that it may import besides the standard library and Tarsia."""


def upward(package: Path) -> list[str]:
    """Imports that BELOW does not allow."""
    return [
        f"{folder} imports {name}"
        for folder, names in source.inner(package).items()
        for name in sorted(names)
        if not any(name == low or name.startswith(f"{low}.") for low in BELOW.get(folder, set()))
    ]


def mutual(package: Path) -> list[tuple[str, str]]:
    """Pairs of folders that import each other."""
    graph = {folder: {name.partition(".")[0] for name in names} for folder, names in source.inner(package).items()}
    return sorted((a, b) for a in graph for b in graph[a] if a < b and a in graph[b])


def foreign(package: Path) -> list[str]:
    """Imports from outside that OUTSIDE does not allow."""
    allowed = sys.stdlib_module_names | {package.name}
    return [
        f"{folder} imports {name}"
        for folder, extra in OUTSIDE.items()
        for path in source.files(package / folder)
        for name in source.imports(path)
        if name.partition(".")[0] not in allowed | extra
    ]


def test_every_folder_has_a_place() -> None:
    assert set(source.folders(source.PACKAGE)) <= set(BELOW)


def test_imports_run_one_way() -> None:
    assert upward(source.PACKAGE) == []


def test_no_two_folders_import_each_other() -> None:
    assert mutual(source.PACKAGE) == []


def test_the_lower_layers_need_torch_alone() -> None:
    assert foreign(source.PACKAGE) == []


def plant(root: Path, **files: str) -> Path:
    package = root / "tarsia"
    for name, text in files.items():
        path = package / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")
    return package


@pytest.mark.parametrize(
    "line",
    ["import tarsia.cli.x", "from tarsia import cli", "from tarsia.cli import x", "def f():\n    import tarsia.cli"],
)
def test_an_upward_import_is_seen(tmp_path: Path, line: str) -> None:
    assert upward(plant(tmp_path, core__a=line, cli__x="")) != []


def test_an_import_for_the_type_checker_does_not_count(tmp_path: Path) -> None:
    text = "if typing.TYPE_CHECKING:\n    from tarsia import cli\nelse:\n    import tarsia.data.b\n"
    assert upward(plant(tmp_path, core__a=text, cli__x="", data__b="")) == ["core imports data.b"]


def test_one_module_can_be_allowed_without_its_folder(tmp_path: Path) -> None:
    text = "from tarsia.core.errors import TarsiaError\nfrom tarsia.core.site import Site\n"
    assert upward(plant(tmp_path, base__a=text, core__errors="")) == ["base imports core.site.Site"]


def test_a_mutual_import_is_seen(tmp_path: Path) -> None:
    assert mutual(plant(tmp_path, a__a="import tarsia.b.b", b__b="import tarsia.a.a")) == [("a", "b")]


def test_a_foreign_import_is_seen(tmp_path: Path) -> None:
    assert foreign(plant(tmp_path, core__a="import json, torch, numpy")) == ["core imports numpy"]


def test_a_relative_import_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relatively"):
        upward(plant(tmp_path, core__a="from . import b"))
