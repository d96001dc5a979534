"""The house: the map in docs/files.md names every file, in an order in which imports only go upward."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "personaplug"
# What stands above or beside the story: the surface of lazily loaded names, and the entry point.
APART = {"__init__.py", "__main__.py"}


def _map() -> list[str]:
    """File names in the order of the map, relative to the package."""
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    block = re.search(r"```\npersonaplug/\n(.*?)```", text, flags=re.DOTALL)
    assert block is not None, "docs/files.md has no file map"
    return re.findall(r"^ +([\w/]+\.py)\b", block.group(1), flags=re.MULTILINE)


def _modules() -> dict[str, str]:
    """Importable name by file name."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE).as_posix()
        if relative not in APART:
            dotted = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            names[relative] = f"personaplug.{dotted}"
    return names


def _imports(path: Path) -> set[str]:
    """Every module of the package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("personaplug"):
            assert node.level == 0
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("personaplug")}
    return found & set(_modules().values())


def test_the_map_names_every_file_once() -> None:
    assert sorted(_map()) == sorted(_modules())


@pytest.mark.parametrize("file", sorted(_modules()))
def test_a_file_imports_only_from_files_above_it(file: str) -> None:
    order = [_modules()[name] for name in _map()]
    above = set(order[: order.index(_modules()[file])])
    assert _imports(PACKAGE / file) <= above


@pytest.mark.parametrize("file", sorted(_modules()))
def test_a_file_says_what_lives_in_it(file: str) -> None:
    assert ast.get_docstring(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))


def test_no_file_is_a_drawer() -> None:
    sizes = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in _modules()}
    assert {file: size for file, size in sizes.items() if size > 450} == {}
    assert not [file for file in sizes if "util" in file]
