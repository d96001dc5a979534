"""What `estimate` says, against what a run then is."""

from __future__ import annotations

from pathlib import Path

import pytest

from personaplug.config import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.simulated import SimulatedConfig, write_simulation
from personaplug.errors import MissingData
from personaplug.estimate import Estimate, estimate
from personaplug.run import Run, open_models
from personaplug.training import train

SETTINGS = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=2", "seeds=0,1"]


def test_counts_are_those_of_the_run_that_follows(tmp_path: Path) -> None:
    write_simulation(
        SimulatedConfig(users=10, queries_per_user=3, dev_users=2, min_items=2, max_items=6), tmp_path / "d"
    )
    config = load_config(overrides=SETTINGS)
    models = open_models(config)
    reader = open_dataset(tmp_path / "d", "train", task=load_task(tmp_path / "d"))
    told = estimate(config, reader, models=models)
    run = Run.create(tmp_path / "run", config=config, task=reader.task)
    train(run, reader, models=models)
    assert told.samples == 30
    assert told.items == sum(len(sample.history) for sample in reader)
    assert told.vectors == len(run.open_vectors(models.encoder))
    assert told.trainings == 4
    assert len(list(run.folder.glob("*/seed-*/fit.json"))) == told.trainings
    table = sum(path.stat().st_size for path in run.vectors.iterdir())
    assert told.disk_bytes > told.vectors * 64
    assert table > told.vectors * 64
    assert told.memory_bytes > 10**8


def test_limits_and_views_change_the_steps(tmp_path: Path) -> None:
    write_simulation(SimulatedConfig(users=10, queries_per_user=3, dev_users=2, min_items=2, max_items=6), tmp_path)
    config = load_config(overrides=SETTINGS)
    models = open_models(config)
    reader = open_dataset(tmp_path, "train", task=load_task(tmp_path))

    def steps(*changes: str) -> int:
        return estimate(load_config(overrides=changes, base=config), reader, models=models).steps

    assert steps("views=2") == pytest.approx(3 * steps(), abs=2)
    assert steps("max_steps=3") == 3
    assert steps("train_limit=15") < steps()


def test_one_user_is_too_few_to_time(tmp_path: Path) -> None:
    write_simulation(SimulatedConfig(users=1, queries_per_user=3, dev_users=2), tmp_path)
    config = load_config(overrides=SETTINGS)
    reader = open_dataset(tmp_path, "train", task=load_task(tmp_path))
    with pytest.raises(MissingData, match="two users"):
        estimate(config, reader, models=open_models(config))


def test_the_text_reads_well() -> None:
    text = Estimate(1000, 30_000, 20_000, 2 * 10**9, 3 * 10**9, 60.0, 1.5, 9000.0, 2, 3000).text()
    assert "20,000 different items" in text
    assert "2 × 3,000 steps of 1.50 s" in text
    assert "2.0 GB" in text
    assert "2.5 h" in text
