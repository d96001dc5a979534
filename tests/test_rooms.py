"""The layers of the package: allowed imports, `analysis` without torch, `serving` without training."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "personaplug"
ROOMS = [
    *(
        "infra",
        "data",
        "analysis",
        "encoders",
        "llm",
        "plug",
        "store",
        "config_resolution",
        "run",
        "shared_run",
        "baselines",
    ),
    *("inference", "serving", "offline", "training", "methods", "evaluation", "api", "cli"),
]
GROUND = ("errors", "config", "config_parsing")
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MAX_LINES = 450


def _room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py") if parts else "__init__"


def _imports(file: Path) -> set[str]:
    """Return the rooms and ground modules that a file imports, also inside functions."""
    dotted = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "personaplug":
            dotted |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names if alias.name.split(".")[0] == "personaplug"}
    return {_room(tuple(name.split(".")[1:])) for name in dotted}


def _modules(room: str) -> list[str]:
    return [
        ".".join(("personaplug", *file.with_suffix("").parts)).removesuffix(".__init__")
        for file in FILES
        if file.parts[0] == room
    ]


def _loaded_after(modules: list[str], unwanted: tuple[str, ...]) -> str:
    """Import modules in a separate process; return the loaded modules whose names start with `unwanted`."""
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}];"
        f"print(*[name for name in sys.modules if name.startswith({unwanted!r})])"
    )
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0][:2] != "__"], ids=str)
def test_file_imports_only_rooms_above_its_own(file: Path) -> None:
    room = _room(file.parts)
    above = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else []
    assert _imports(file) <= {*GROUND, *above}


def test_house_page_lists_every_room() -> None:
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    rooms = {file.parts[0] for file in FILES if file.parts[0][:2] != "__"}
    assert {room.removesuffix(".py") for room in rooms} == {*ROOMS, *GROUND}
    assert [room for room in rooms if f"`{room}`" not in page and f"`{room}/`" not in page] == []


def test_analysis_needs_no_torch() -> None:
    assert _loaded_after(_modules("analysis"), ("torch", "transformers")) == ""


def test_serving_imports_no_training() -> None:
    unwanted = tuple(f"personaplug.{room}" for room in ("training", "methods", "evaluation", "baselines"))
    assert _loaded_after(_modules("serving"), unwanted) == ""


def test_package_has_few_top_level_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10
    assert len([path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 14


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_has_a_docstring_and_a_specific_name(file: Path) -> None:
    text = (PACKAGE / file).read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= MAX_LINES
    assert "util" not in file.name
