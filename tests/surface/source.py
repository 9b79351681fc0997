"""What the tests of the surface read: the package's source, parsed and never imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "tarsia"


def files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def folders(package: Path) -> list[str]:
    """Folders of the package that hold code."""
    return sorted({f.relative_to(package).parts[0] for f in files(package) if f.parent != package})


def imports(path: Path) -> Iterator[str]:
    """Full dotted names that a file imports, wherever in it; those for the type checker alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno} imports relatively")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner(package: Path) -> dict[str, set[str]]:
    """For each folder, the names within the package that it imports, its own left out: "core.errors.TarsiaError"."""
    found: dict[str, set[str]] = {name: set() for name in folders(package)}
    for path in files(package):
        parts = path.relative_to(package).parts
        if len(parts) == 1:
            continue
        for name in imports(path):
            head, _, rest = name.partition(".")
            if head == package.name and rest.partition(".")[0] in found and rest.partition(".")[0] != parts[0]:
                found[parts[0]].add(rest)
    return found


def code_lines(path: Path) -> int:
    """Lines that are neither empty nor a comment alone."""
    lines = (line.strip() for line in path.read_text(encoding="utf8").splitlines())
    return sum(1 for line in lines if line and not line.startswith("#"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length in lines of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1
