"""Estimates, compared with the run that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import Prompt, characters
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import ConfigError, MissingData
from personaplug.llm.base import PromptBatch
from personaplug.run import Run, open_models
from personaplug.training.cost_estimate import Estimate, _count, _planned_steps, estimate
from personaplug.training.parts import train

SETTINGS = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=2", "seeds=0,1"]


def test_estimate_counts_only_the_training_data(tmp_path: Path) -> None:
    write_simulation(SimulationConfig(users=8, queries_per_user=3, dev_users=1), tmp_path)
    reader = open_dataset(tmp_path, "train")
    estimates = {}
    for limit in (0, 6):
        config = load_config(overrides=[*SETTINGS, f"train_limit={limit}"])
        estimates[limit] = estimate(config, reader, models=open_models(config))
    assert (estimates[0].samples, estimates[6].samples) == (24, 6)
    assert estimates[6].vectors < estimates[0].vectors
    assert estimates[6].steps < estimates[0].steps


def test_estimate_counts_match_the_run_that_follows(tmp_path: Path) -> None:
    write_simulation(
        SimulationConfig(users=10, queries_per_user=3, dev_users=2, min_items=2, max_items=6), tmp_path / "d"
    )
    config = load_config(overrides=SETTINGS)
    models = open_models(config)
    reader = open_dataset(tmp_path / "d", "train", task=load_task(tmp_path / "d"))
    estimated = estimate(config, reader, models=models)
    run = Run.create(tmp_path / "run", config=config, task=reader.task)
    train(run, reader, models=models)
    assert estimated.samples == 30
    assert estimated.items == sum(len(sample.history) for sample in reader)
    assert estimated.vectors == len(run.open_vectors(models.encoder))
    assert estimated.trainings == 4
    facts = [json.loads(path.read_text()) for path in run.folder.glob("*/seed-*/fit.json")]
    assert sum(fact["steps"] > 0 for fact in facts) == estimated.trainings  # rows that only count take no steps
    table = sum(path.stat().st_size for path in run.vectors.iterdir())
    assert estimated.disk_bytes > estimated.vectors * 64
    assert table > estimated.vectors * 64
    assert estimated.memory_bytes > 10**8


def test_estimate_says_where_prompts_are_cached(tmp_path: Path) -> None:
    write_simulation(SimulationConfig(users=10, queries_per_user=3, dev_users=2, min_items=2, max_items=6), tmp_path)
    reader = open_dataset(tmp_path, "train", task=load_task(tmp_path))

    def estimated(*changes: str) -> Estimate:
        config = load_config(overrides=[*SETTINGS, *changes])
        return estimate(config, reader, models=open_models(config))

    before, behind = estimated("placement=prefix"), estimated()
    assert before.prompts == ""
    assert "prompts      cached in memory: " in behind.text()
    on_disk = estimated("prompt_cache=disk")
    assert "cached on disk" in on_disk.prompts
    assert on_disk.disk_bytes > behind.disk_bytes
    assert "not cached" in estimated("prompt_cache=nowhere").prompts
    assert "recomputed" in estimated("prompt_cache_gigabytes=0.0001").prompts


def test_estimate_steps_follow_limits_and_views(tmp_path: Path) -> None:
    write_simulation(SimulationConfig(users=10, queries_per_user=3, dev_users=2, min_items=2, max_items=6), tmp_path)
    config = load_config(overrides=SETTINGS)
    models = open_models(config)
    reader = open_dataset(tmp_path, "train", task=load_task(tmp_path))

    def steps(*changes: str) -> int:
        return estimate(load_config(overrides=changes, base=config), reader, models=models).steps

    assert steps("views=2") == pytest.approx(3 * steps(), abs=2)
    assert steps("max_steps=3") == 3
    assert steps("train_limit=15") < steps()


def test_estimate_rejects_data_of_one_user(tmp_path: Path) -> None:
    write_simulation(SimulationConfig(users=1, queries_per_user=3, dev_users=2), tmp_path)
    config = load_config(overrides=SETTINGS)
    reader = open_dataset(tmp_path, "train", task=load_task(tmp_path))
    with pytest.raises(MissingData, match=r"2 or more users.*found 1"):
        estimate(config, reader, models=open_models(config))


def test_estimate_rejects_a_config_that_train_rejects(tmp_path: Path) -> None:
    write_simulation(SimulationConfig(task="style", users=4, queries_per_user=3, dev_users=2), tmp_path)
    config = load_config(overrides=[*SETTINGS, "answer_channel=label"])
    reader = open_dataset(tmp_path, "train", task=load_task(tmp_path))
    with pytest.raises(ConfigError, match="label"):
        estimate(config, reader, models=open_models(config))


def test_timed_batches_are_full_with_the_longest_prompts_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_simulation(SimulationConfig(users=3, queries_per_user=9, dev_users=2, min_items=1, max_items=2), tmp_path)
    config = load_config(overrides=SETTINGS)
    models = open_models(config)
    reader = open_dataset(tmp_path, "train", task=load_task(tmp_path))
    batches: list[list[Prompt]] = []
    real = models.llm.loss

    def recording_loss(batch: PromptBatch, targets: list[str], **rest: Any) -> Any:
        batches.append(list(batch.prompts))
        return real(batch, targets, **rest)

    monkeypatch.setattr(models.llm, "loss", recording_loss)
    estimate(config, reader, models=models)
    *timed, _, _, last, _, _ = batches  # each part ends with its validation, with histories and without
    assert [len(batch) for batch in timed] == [4, 4, 4, 4]
    by_length = sorted((len(sample.prompt) for sample in reader), reverse=True)
    assert sum(map(characters, last)) >= 0.9 * sum(by_length[:4])
    assert len({prompt for batch in timed for prompt in batch}) > 9


def test_count_draws_samples_from_the_whole_split(tmp_path: Path) -> None:
    write_simulation(SimulationConfig(users=40, queries_per_user=3, dev_users=2, min_items=1, max_items=2), tmp_path)
    reader = open_dataset(tmp_path, "train", task=load_task(tmp_path))
    data = _count(reader, load_config(overrides=SETTINGS))
    ids = [sample.id for sample in reader]
    indices = sorted(ids.index(sample.id) for sample in data.drawn)
    assert len(set(indices)) == 17
    assert indices[-1] > 90
    assert indices[0] < 30
    lengths = sorted(len(sample.prompt) for sample in reader)
    assert sorted(len(sample.prompt) for sample in data.longest) == lengths[-4:]


def test_planned_steps_bound_the_validations() -> None:
    def planned(*changes: str) -> tuple[int, float]:
        return _planned_steps(load_config(overrides=[*SETTINGS, *changes]), 1000)

    assert planned() == pytest.approx((450, 0.4 * 9 * 25))  # 225 steps an epoch, every 56, and at the end
    assert planned("eval_steps=100") == pytest.approx((450, 0.4 * 5 * 25))
    assert planned("max_steps=3") == pytest.approx((3, 0.4 * 25))
    assert planned("max_steps=3", "eval_steps=1", "validation_limit=8") == pytest.approx((3, 0.4 * 3 * 2))


def test_text_formats_counts_sizes_and_times() -> None:
    text = Estimate(1000, 30_000, 20_000, 2 * 10**9, 3 * 10**9, 60.0, 1.5, 9000.0, 2, 3000).text()
    assert "20,000 different items" in text
    assert "2 × 3,000 steps of 1.50 s" in text
    assert "2.0 GB" in text
    assert "2.5 h" in text
