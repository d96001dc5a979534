"""A run with a toy model, and Parquet files as the input of offline jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_settings import new_run, write_small_data

from personaplug.data import load_task, open_dataset
from personaplug.data.parsing import record_of
from personaplug.offline.job import Job, plan_job
from personaplug.run import Run
from personaplug.training.parts import train

Rows = Sequence[Mapping[str, Any]]


def trained_run(folder: Path) -> tuple[Run, list[dict[str, Any]]]:
    """Train a plug for two steps; return the run and the rows of its dev users."""
    data = write_small_data(folder / "data")
    run, models = new_run(folder / "run", data, "controls=false", "max_steps=2")
    train(run, open_dataset(data, "train", task=run.task), models=models)
    rows = [
        {"id": s.id, "user_id": s.user_id, "prompt": s.prompt, "history": [record_of(item) for item in s.history]}
        for s in open_dataset(data, "dev", task=load_task(data))
    ]
    return run, rows


def write_parquet(path: Path, rows: Rows, **options: Any) -> Path:
    """Write rows to a Parquet file."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(list(rows)), path, **options)
    return path


def read_output(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that a reader of the whole folder finds."""
    dataset = pytest.importorskip("pyarrow.dataset")
    rows: list[dict[str, Any]] = dataset.dataset(folder).to_table().to_pylist()
    return rows


def planned(run: Run, source: Path, output: Path, **changes: Any) -> Job:
    """Plan a job that answers prompts, three rows at a time."""
    arguments: dict[str, Any] = {"command": "generate", "config": run.config, "shard_rows": 3, **changes}
    command, config = arguments.pop("command"), arguments.pop("config")
    return plan_job(command, run, config, source=source, output=output, **arguments)
