"""The benchmarks' own arithmetic, on toy parts; what they measure is in `benchmarks/LOG.md`."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from personaplug.config import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.simulated import SimulatedConfig, write_simulation
from personaplug.recipes import build_plug
from personaplug.run import Run, open_models

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TOY = ["llm=toy", "encoder=hash:32", "dtype=float32", "persona_tokens=3", "answers=label"]


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_floor_of_speed_counts_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_simulation(SimulatedConfig(users=4, queries_per_user=2, dev_users=2, min_items=3, max_items=3), tmp_path)
    config = load_config(overrides=TOY)
    models = open_models(config)
    run = Run(tmp_path / "run", config, load_task(tmp_path), tmp_path / "vectors")
    samples = run.read_samples(open_dataset(tmp_path, "train", task=run.task), run.open_vectors(models.encoder))
    plug = build_plug(run, models, seed=0)
    speed = _module("speed")
    with_items = speed.count(models, plug, samples)
    plug.config = replace(plug.config, max_history=1)
    with_one = speed.count(models, plug, samples)
    projector = plug.projector.inner.weight.numel() + plug.projector.outer.weight.numel()
    assert with_items.train - with_one.train == pytest.approx(6 * 2 * projector)
    assert with_items.score - with_one.score == pytest.approx(2 * 2 * projector)

    def prompts_of(tokens: int) -> None:
        monkeypatch.setattr(speed, "_mean_tokens", lambda *_: tokens)

    model = models.backend.model.config
    monkeypatch.setattr(models.backend.renderer, "answers", lambda labels: [[1]] * len(labels))
    prompts_of(100)
    single = speed.count(models, plug, samples)
    prompts_of(104)
    longer = speed.count(models, plug, samples)
    prompts_of(100)
    monkeypatch.setattr(models.backend.renderer, "answers", lambda labels: [[1], [1, 2, 3], [2, 3, 4]])
    spelled = speed.count(models, plug, samples)
    pairs = 2 * model.num_hidden_layers * model.hidden_size * (108**2 - 104**2)
    # Four tokens more in the prompt, or in the labels after their first: the same layers, but for the attention.
    assert spelled.score - single.score == pytest.approx(longer.score - single.score - pairs)
    assert spelled.train == single.train


def test_the_memory_benchmark_has_short_and_long_prompts() -> None:
    memory = _module("memory")
    lengths = [len(sample.query.split()) for sample in memory.samples(50_000)]
    assert min(lengths) < 40
    assert 360 < max(lengths) <= memory.LONGEST_QUERY
    assert max(lengths[:16]) > 250
