"""The files of the wheel and of the source archive."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("personaplug", "tests", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both archives. They are built from a copy, so that the checkout gets no build folder."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=True)
    assert "would be ignored" not in done.stderr  # setuptools warns of a folder that is not a package
    return source / "dist"


def _package_files() -> set[str]:
    """Return all files of the package in the checkout, code and data."""
    paths = (ROOT / "personaplug").rglob("*")
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_wheel_contains_exactly_the_files_of_the_package(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == _package_files()
    assert {"personaplug/py.typed", "personaplug/evaluation/experiments/main-table.yaml"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_source_archive_contains_build_files_and_no_tests(built: Path) -> None:
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {member.name.partition("/")[2] for member in opened if member.isfile()}
    assert _package_files() <= names
    other_files = {name.partition("/")[0] for name in names - _package_files()}
    generated = {"PKG-INFO", "setup.cfg", "personaplug.egg-info"}
    assert other_files == {*generated, "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"}
