"""Files and functions stay small, one version, and a README that says what is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from surface import source

import tarsia

CODE = [*source.files(source.PACKAGE), *source.files(source.ROOT / "tests"), *source.files(source.ROOT / "bench")]


def too_long(paths: list[Path], lines: int = 600, function: int = 60) -> list[str]:
    found = [f"{p.name}: {n} lines" for p in paths if (n := source.code_lines(p)) > lines]
    return found + [f"{p.name}:{name}: {n} lines" for p in paths for name, n in source.functions(p) if n > function]


def tree(readme: str) -> list[str]:
    """Folders of the package in README's tree, in order."""
    block = readme.split("src/tarsia/", 1)[1].split("```", 1)[0]
    return re.findall(r"^    (\w+)/ ", block, re.MULTILINE)


def test_files_and_functions_are_small() -> None:
    assert too_long(CODE) == []


def test_a_long_file_and_a_long_function_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + "    x = 1\n" * 60 + "# only a remark\n" * 600, encoding="utf8")
    assert too_long([path]) == ["long.py:f: 61 lines"]
    path.write_text("x = 1\n" * 601, encoding="utf8")
    assert too_long([path]) == ["long.py: 601 lines"]


def test_one_version() -> None:
    project = tomllib.loads((source.ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    changes = (source.ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    top = re.search(r"^## (\S+)", changes, re.MULTILINE)
    assert top is not None
    assert project["version"] == top[1] == tarsia.__version__


def test_readme_names_every_folder() -> None:
    readme = (source.ROOT / "README.md").read_text(encoding="utf8")
    assert sorted(tree(readme)) == source.folders(source.PACKAGE)


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md", "CONTRIBUTING.md", "LOG.md", "CHANGELOG.md"])
def test_links_between_documents_lead_somewhere(name: str) -> None:
    text = (source.ROOT / name).read_text(encoding="utf8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (source.ROOT / link).exists()] == []
