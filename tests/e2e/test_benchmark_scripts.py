"""The calculations of the benchmark scripts, with toy models; `benchmarks/LOG.md` has their results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import memory
import pytest
import speed
import synthetic
import torch
from click.testing import CliRunner
from plugs import head_of

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.results_file import load_results
from personaplug.analysis.trials import EvalSamples, Provenance, Trial, TrialFile
from personaplug.cli.main import main
from personaplug.config import PAPER, Config
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import MissingData, RunConflict
from personaplug.evaluation.benchmark import Folders, run_benchmark
from personaplug.evaluation.experiment import load_experiment
from personaplug.run import Models, Run, open_models
from personaplug.training.objectives import PlugObjective
from personaplug.training.parts import build_plug

TOY = ["llm=toy", "encoder=hash:32", "dtype=float32", "persona_tokens=3", "answer_channel=label"]


def _speed_stage(folder: Path, *settings: str) -> tuple[Run, Models, list[EncodedSample]]:
    write_simulation(SimulationConfig(users=4, queries_per_user=2, dev_users=2, min_items=3, max_items=3), folder)
    config = load_config(overrides=[*TOY, *settings], base=Config(plug=PAPER))  # as in the benchmarks
    models = open_models(config)
    run = Run(folder / "run", config, load_task(folder), folder / "vectors")
    samples = run.read_samples(open_dataset(folder, "train", task=run.task), run.open_vectors(models.encoder))
    return run, models, samples


def test_speed_lower_bound_counts_only_used_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, models, samples = _speed_stage(tmp_path)
    plug = build_plug(run, models, seed=0)
    model = models.llm.model.config

    def work(tokens: int, *, kept: bool, labels: tuple[str, ...] = ()) -> float:
        monkeypatch.setattr(speed, "_mean_tokens", lambda *_: tokens)
        return float(speed.work(models, plug, samples, cached=kept, labels=labels))

    linear = sum(p.numel() for n, p in models.llm.model.named_parameters() if speed._linear(n, p))
    width = model.num_hidden_layers * model.hidden_size
    soft, target = 4, 2  # one instruction and three persona tokens; a digit and the end-of-text token
    live = soft + target - 1
    # A longer cached prompt only adds attention to it; without a cache, it adds a pass of the whole model.
    assert work(104, kept=True) - work(100, kept=True) == pytest.approx(2 * 4 * width * live * 4)
    longer = 4 * linear * 4 + 3 * 4 * width * ((104 + live) ** 2 - (100 + live) ** 2) / 2
    assert work(104, kept=False) - work(100, kept=False) == pytest.approx(longer)
    # A label without the end-of-text token saves one position and one row of the output layer.
    head = 2 * model.vocab_size * model.hidden_size
    shorter = 4 * linear + 2 * head + 2 * 4 * width * (100 + (live**2 - (live - 1) ** 2) / 2)
    without_end = work(100, kept=True, labels=run.task.labels)
    assert work(100, kept=True) - without_end == pytest.approx(shorter)
    # The inner layer runs once per item, the outer layer once per user.
    with_items = work(100, kept=True)
    plug.config = replace(plug.config, max_history=1)
    assert with_items - work(100, kept=True) == pytest.approx(6 * 2 * head_of(plug).projector.inner.weight.numel())


def test_reference_step_has_the_same_loss_as_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, models, samples = _speed_stage(tmp_path, "answer_channel=text")
    monkeypatch.setattr(speed, "PROMPT", 700)  # no prompt is truncated
    table = run.open_vectors(models.encoder)
    steps = []
    for kind in (speed.ReferenceObjective, PlugObjective):
        plug = build_plug(run, models, seed=0)
        loss: Any
        loss, tokens = kind(plug, models.llm, table=table, labels=run.task.labels).loss(samples)
        loss.backward()
        assert head_of(plug).projector.inner.weight.grad is not None
        steps.append((float(loss.detach()), int(tokens), head_of(plug).projector.inner.weight.grad))
    assert steps[0][:2] == pytest.approx(steps[1][:2], rel=1e-4)
    torch.testing.assert_close(steps[0][2], steps[1][2], rtol=1e-3, atol=1e-4)


def test_the_memory_benchmark_has_short_and_long_prompts() -> None:
    lengths = [len(sample.query.split()) for sample in memory.samples(50_000)]
    assert min(lengths) < 40
    assert 360 < max(lengths) <= memory.LONGEST_QUERY
    assert max(lengths[:16]) > 250


def _few(folder: Path) -> None:
    """Write a small set with the name from the packaged experiment, and a larger set instead of a synthetic one."""
    whole = folder / "whole"
    write_simulation(SimulationConfig(users=12, queries_per_user=2, dev_users=5, min_items=2, max_items=4), whole)
    for name, samples in (("Critic_rating-50", 8), ("Critic_rating-50+synthetic", 16)):
        words = ["synthesize", "--data", str(whole), "--out", str(folder / name), "--real", str(samples)]
        result = CliRunner().invoke(main, [*words, "--samples", "0"])
        assert result.exit_code == 0, result.output


def test_joined_table_has_rows_with_and_without_synthetic_samples(tmp_path: Path) -> None:
    _few(tmp_path)
    words = ("llm=toy", "encoder=hash:32", "dtype=float32", "epochs=1", "seeds=0,1", "resamples=100")
    experiment = load_experiment(synthetic.EXPERIMENT, settings=words)
    folders = Folders(tmp_path, tmp_path / "runs", tmp_path / "results")
    outcome = run_benchmark(experiment, folders, sets=["Critic_rating-50", "Critic_rating-50+synthetic"])
    assert (outcome.failed, len(outcome.written)) == ([], 2)
    alone = [load_results(file).by_name["plug"].metrics["mae"] for file in outcome.written]

    both = synthetic.joined(experiment, "Critic_rating-50", data=tmp_path, results=folders.results)
    assert [row.name for row in both.rows][:3] == ["instruction-only", "plug", "wrong-user"]
    assert [both.by_name[name].metrics["mae"] for name in ("plug", "plug+synthetic")] == pytest.approx(alone)
    pair = next(p for p in both.pairs if {p.a, p.b} == {"plug", "plug+synthetic"} and p.metric == "mae")
    better = alone[0] - alone[1] if pair.a == "plug+synthetic" else alone[1] - alone[0]
    assert pair.difference == pytest.approx(better, abs=1e-6)
    assert both.is_personal_gain("plug+synthetic", "wrong-user+synthetic")


def test_tables_of_different_dev_samples_are_not_joined(tmp_path: Path) -> None:
    for name, groups in (("A", [0, 1]), (f"A{synthetic.ENDING}", [0, 0])):
        file = TrialFile(tmp_path / "mine" / f"{name}.trials.jsonl")
        file.start(EvalSamples(groups, [1, 1], Provenance()))
        file.append(Trial(MethodInfo("plug"), 0, {}, invalid_rate=0.0))
    path = tmp_path / "mine.yaml"
    path.write_text("sets: [A]\nmethods: [plug]\n", encoding="utf-8")
    with pytest.raises(RunConflict, match="different dev samples"):
        synthetic.joined(load_experiment(path), "A", data=tmp_path, results=tmp_path)
    with pytest.raises(MissingData, match="no trials in"):
        synthetic.joined(load_experiment(path), "B", data=tmp_path, results=tmp_path)
