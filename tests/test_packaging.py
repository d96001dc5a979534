"""The files of the wheel and of the source archive, and the wheel without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("personaplug", "tests", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
WITHOUT_CHECKOUT = """
import json
from importlib.metadata import version
from pathlib import Path
import personaplug
from personaplug.data import LAMP_TASKS
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.evaluation.experiment import EXPERIMENTS, find_experiment, load_experiment
names = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
experiments = [load_experiment(find_experiment(name)).name for name in names]
write_simulation(SimulationConfig(task="manners", users=2, dev_users=2), Path("simulated"))
print(json.dumps([personaplug.__file__, version("personaplug"), experiments, sorted(LAMP_TASKS)]))
"""
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


def test_wheel_has_experiments_tasks_and_topics_without_the_checkout(built: Path, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    command, environment = [sys.executable, "-c", WITHOUT_CHECKOUT], {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    file, version, experiments, tasks = json.loads(done.stdout)
    assert file == str(site / "personaplug" / "__init__.py")
    assert f"-{version}-" in wheel.name
    assert len(experiments) == len(list((ROOT / "personaplug/evaluation/experiments").glob("*.yaml"))) > 0
    assert "LaMP_3" in tasks
    assert (tmp_path / "simulated" / "train_questions.json").is_file()
