"""Settings and data for a training that takes a second."""

from __future__ import annotations

from pathlib import Path

from personaplug.config_parsing import load_config
from personaplug.data import load_task
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.run import Models, Run, open_models

TINY = (
    "llm=toy",
    "encoder=hash:32",
    "batch_size=4",
    "epochs=2",
    "save_steps=3",
    "eval_steps=5",
    "learning_rate=0.01",
    "dtype=float32",
)


def write_small_data(folder: Path) -> Path:
    """Write simulated ratings of twelve users, and return the folder."""
    write_simulation(
        SimulationConfig(users=12, queries_per_user=3, dev_users=6, min_items=0, max_items=6, cold_share=0.3), folder
    )
    return folder


def new_run(folder: Path, data: Path, *settings: str) -> tuple[Run, Models]:
    """Create a run with `TINY` settings, and load its models."""
    config = load_config(overrides=[*TINY, *settings])
    return Run.create(folder, config=config, task=load_task(data)), open_models(config)
