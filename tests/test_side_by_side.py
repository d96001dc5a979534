"""Tables side by side: the same results as one after the other, and one that fails takes no other with it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from personaplug.bench import Places, bench
from personaplug.cells import CellFile
from personaplug.data.simulated import SimulatedConfig, write_simulation
from personaplug.errors import BadConfig
from personaplug.experiment import Experiment, load_experiment
from personaplug.side_by_side import bench_side_by_side

TEXT = """
sets: [One, Two, Absent]
conditions: [plain, plug, wrong-user]
config:
  model: {llm: toy, encoder: "hash:32", dtype: float32, max_prompt_tokens: 400}
  training: {seeds: [0, 1], epochs: 1, batch_size: 4, validation_limit: 4, learning_rate: 0.01}
  evaluation: {limit: 8, resamples: 100}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("One", "Two")):
        shape = SimulatedConfig(users=6, queries_per_user=2, dev_users=4, min_items=2, max_items=6, seed=seed)
        write_simulation(shape, folder / name)
    return folder


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return load_experiment(path)


def _likelihoods(cells: Path) -> dict[tuple[str, int], Any]:
    return {(cell.condition, cell.seed): cell.statistics["nll"] for cell in CellFile(cells).read()[1]}


def test_side_by_side_gives_what_one_after_the_other_gives(
    tmp_path: Path, data: Path, experiment: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="personaplug")
    alone = bench(experiment, Places(data, tmp_path / "runs", tmp_path / "results"))
    before = dict(os.environ)
    both = bench_side_by_side(experiment, Places(data, tmp_path / "runs-2", tmp_path / "results-2"), processes=2)
    assert dict(os.environ) == before
    assert [path.name for path in both.written] == [path.name for path in alone.written] == ["One.json", "Two.json"]
    assert both.absent == alone.absent != []
    assert both.failed == []
    for name in ("One", "Two"):
        one, other = (tmp_path / folder / "mine" / f"{name}.cells.jsonl" for folder in ("results", "results-2"))
        alike = _likelihoods(other)
        assert len(alike) == 5
        for key, found in _likelihoods(one).items():
            assert alike[key] == pytest.approx(found, abs=1e-3)  # threads sum in another order
    assert "mine One: done" in caplog.text
    assert "plain, seed 0" in (tmp_path / "runs-2" / "mine" / "mine-One.log").read_text(encoding="utf-8")


def test_a_process_that_ends_early_fails_its_table_alone(tmp_path: Path, data: Path, experiment: Experiment) -> None:
    places = Places(data, tmp_path / "runs", tmp_path / "results")
    bench(experiment, places, sets=["One"], conditions=["plain"])
    (tmp_path / "runs" / "mine" / "mine-One.log").mkdir()  # which cannot be written to
    outcome = bench_side_by_side(experiment, places, processes=2, sets=["One", "Two"], conditions=["plain", "plug"])
    assert len(outcome.failed) == 1
    assert outcome.failed[0].startswith("mine One: its process ended with 1; finished rows are kept. See ")
    assert [path.name for path in outcome.written] == ["Two.json"]
    told = json.loads((tmp_path / "results" / "mine" / "One.json").read_text(encoding="utf-8"))
    assert [row["condition"] for row in told["rows"]] == ["plain"]


def test_what_the_experiment_lacks_is_refused_at_once(tmp_path: Path, data: Path, experiment: Experiment) -> None:
    with pytest.raises(BadConfig, match="no set of mine"):
        bench_side_by_side(experiment, Places(data, tmp_path, tmp_path), processes=2, sets=["Nope"])
    assert not (tmp_path / "mine").exists()
