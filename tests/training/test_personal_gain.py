"""The personal gain of a training so far: the control `wrong-user` on held-out users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_settings import new_run, write_small_data

from personaplug.data import open_dataset
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.encoders.strangers import with_strangers_items
from personaplug.methods.context import assign_histories, with_assigned_items
from personaplug.training import trainer
from personaplug.training.batching import spaced, user_split
from personaplug.training.objectives import PlugObjective
from personaplug.training.parts import build_plug, train
from personaplug.training.trainer import FitReport, fit, mean_loss

SETTINGS = ("validation_share=0.4", "epochs=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("data"))


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _fitted(folder: Path, data: Path, *settings: str) -> tuple[FitReport, PlugObjective, list[EncodedSample]]:
    run, models = new_run(folder / "run", data, *SETTINGS, *settings)
    table = run.open_vectors(models.encoder)
    samples = run.read_samples(open_dataset(data, "train", task=run.task), table)
    objective = PlugObjective(build_plug(run, models, seed=0), models.llm, table=table)
    report = fit(objective, samples=samples, config=run.config.training, seed=0, folder=folder / "fit")
    _, held_out = user_split(samples, share=0.4, limit=256, seed=0)
    return report, objective, held_out


@pytest.mark.parametrize("bound", [64, 4])
def test_gain_is_the_wrong_user_control_on_held_out_users(
    tmp_path: Path, data: Path, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_GAIN_SAMPLES", bound)
    report, objective, held_out = _fitted(tmp_path, data)
    (gain,) = (
        line["personal_gain"]
        for line in _log(tmp_path / "fit")
        if "validation_loss" in line and line["step"] == report.best_step
    )
    shown = [np.arange(len(sample.rows)) for sample in held_out]
    assignments = assign_histories("wrong-user", [sample.owner for sample in held_out], shown, seed=0)
    wrong, chosen = with_assigned_items(held_out, assignments), spaced(len(held_out), bound)
    loss_of_wrong, loss_of_own = (
        mean_loss(objective, [samples[index] for index in chosen], max_tokens=0) for samples in (wrong, held_out)
    )
    assert abs(loss_of_wrong - loss_of_own) > 1e-4
    assert gain == pytest.approx(loss_of_wrong - loss_of_own, abs=1e-5)


def test_measuring_the_gain_changes_neither_weights_nor_losses(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, objective, _ = _fitted(tmp_path / "with", data, "drop_history_prob=0.3")
    monkeypatch.setattr(trainer._Trainer, "_samples_of_strangers", lambda _: [])
    other_report, other, _ = _fitted(tmp_path / "without", data, "drop_history_prob=0.3")
    lines, other_lines = _log(tmp_path / "with" / "fit"), _log(tmp_path / "without" / "fit")
    assert any("personal_gain" in line for line in lines)
    assert not any("personal_gain" in line for line in other_lines)
    for key in ("loss", "validation_loss", "gradient_norm"):
        assert [line.get(key) for line in lines] == [line.get(key) for line in other_lines]
    assert (report.best_step, report.best_loss) == (other_report.best_step, other_report.best_loss)
    weights, other_weights = objective.module.state_dict(), other.module.state_dict()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_parts_without_a_history_have_no_gain(tmp_path: Path, data: Path) -> None:
    run, models = new_run(tmp_path / "run", data, *SETTINGS, "label_prior=none")
    train(run, open_dataset(data, "train", task=run.task), models=models)
    has_gain = {
        name: [line for line in _log(run.plug_folder(name, seed=0)) if "personal_gain" in line] != []
        for name in ("instruction-only", "plug")
    }
    assert has_gain == {"instruction-only": False, "plug": True}


def test_one_held_out_user_has_no_gain(tmp_path: Path, data: Path) -> None:
    _fitted(tmp_path, data, "validation_share=0.01", "max_steps=2")
    assert [line["step"] for line in _log(tmp_path / "fit") if "validation_loss" in line] == [2]
    assert not any("personal_gain" in line for line in _log(tmp_path / "fit"))


def test_resumed_training_measures_the_same_gains(tmp_path: Path, data: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    _fitted(unbroken, data, "save_steps=1")
    run, models = new_run(broken, data, *SETTINGS, "save_steps=1")
    table = run.open_vectors(models.encoder)
    samples = run.read_samples(open_dataset(data, "train", task=run.task), table)
    steps = iter(range(8))

    def stop() -> None:
        if next(steps) == 7:
            raise KeyboardInterrupt

    for on_step in (stop, None):
        objective = PlugObjective(build_plug(run, models, seed=0), models.llm, table=table)
        try:
            fit(
                objective,
                samples=samples,
                config=run.config.training,
                seed=0,
                folder=broken / "fit",
                on_step=on_step,
            )
        except KeyboardInterrupt:
            assert on_step is not None
    gains = [
        [(line["step"], line["personal_gain"]) for line in _log(folder) if "personal_gain" in line]
        for folder in (unbroken / "fit", broken / "fit")
    ]
    assert gains[0] == gains[1] != []


def test_strangers_items_come_whole_from_another_user(data: Path, tmp_path: Path) -> None:
    run, models = new_run(tmp_path / "run", data)
    table = run.open_vectors(models.encoder)
    samples = run.read_samples(open_dataset(data, "train", task=run.task), table)
    histories = {(tuple(sample.rows.tolist()), sample.owner) for sample in samples}
    for sample, other in zip(samples, with_strangers_items(samples, seed=3), strict=True):
        assert (other.id, other.query, other.owner) == (sample.id, sample.query, sample.owner)
        rows = tuple(other.rows.tolist())
        assert any(rows == own_rows and owner != sample.owner for own_rows, owner in histories)
        assert len(other.rows) == len(other.label_ids) == len(other.kind_ids)
