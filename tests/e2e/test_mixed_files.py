"""Files that were copied between two runs are refused, because they belong to another training."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from personaplug.cli.main import main
from personaplug.data.simulation import SimulationConfig, write_simulation

TOY = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1"]
PROMPT = "How would you rate this film: a slow western"


def _call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def _evaluate(folder: Path) -> Result:
    return _call("evaluate", "--run", folder / "run", "--data", folder / "data", "--methods", "plug", "resamples=100")


def _metrics(folder: Path) -> object:
    assert _evaluate(folder).exit_code == 0
    results = json.loads((folder / "run" / "evaluations" / "dev.json").read_text())
    return [row["metrics"] for row in results["rows"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders, each with data and a run that was trained on it, with the same settings."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for seed, folder in enumerate((one, two)):
        users = SimulationConfig(users=8, queries_per_user=2, dev_users=4, min_items=1, max_items=5, seed=seed)
        write_simulation(users, folder / "data")
        done = _call("train", "--data", folder / "data", "--out", folder / "run", *TOY)
        assert done.exit_code == 0, done.output
        assert _evaluate(folder).exit_code == 0
        shutil.rmtree(folder / "run" / "evaluations")
    return one, two


@pytest.fixture
def copy(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(folders[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_copied_run_works_like_the_original(copy: Path) -> None:
    done = _evaluate(copy)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml", "run.json", "data.json", "vectors/index.sqlite", "vectors/table.json", "vectors/checks.u64",
        "vectors/vectors.f16", "plug/seed-0/plug.safetensors", "plug/seed-0/plug.json", "plug/seed-0/fit.json",
        "plug/seed-0", "plug",
    ],
)  # fmt: skip
def test_a_file_of_another_run_is_refused(copy: Path, folders: tuple[Path, Path], name: str) -> None:
    source, target = folders[1] / "run" / name, copy / "run" / name
    if source.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    done = _evaluate(copy)
    assert (done.exit_code, "is damaged" in done.output) == (2, True), done.output


def test_item_vectors_of_another_run_are_accepted(copy: Path, folders: tuple[Path, Path]) -> None:
    before = _metrics(copy)
    shutil.rmtree(copy / "run" / "vectors")
    shutil.copytree(folders[1] / "run" / "vectors", copy / "run" / "vectors")
    shutil.rmtree(copy / "run" / "evaluations")
    assert _metrics(copy) == before


def test_second_process_refuses_to_train_in_the_same_folder(copy: Path) -> None:
    with closing(sqlite3.connect(copy / "run" / "training.lock", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        words = ("train", "--data", copy / "data", "--out", copy / "run", *TOY)
        done = _call(*words)
        assert (done.exit_code, "Another process is training in" in done.output) == (2, True), done.output
    assert _call(*words).exit_code == 0
