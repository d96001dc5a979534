"""Checkpoints: resumption from the newest undamaged state, and errors for damaged files."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from personaplug.config import Config
from personaplug.errors import DamagedFile
from personaplug.infra.atomic_io import JsonLines, write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.infra.config_file import read_config, write_config
from personaplug.infra.tensor_files import load_tensors, save_tensors
from personaplug.training.checkpointing import TrainingState, load_best, load_state, save_best, save_state


class Training:
    """A small module and its optimizer, trained for some steps with checkpoints."""

    def __init__(self, *, width: int = 3) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(width, 2)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)

    def step(self, folder: Path, step: int, *, best_step: int) -> None:
        self.module(torch.ones(1, self.module.in_features)).sum().backward()
        self.optimizer.step()
        if best_step == step:
            save_best(folder, step, module=self.module)
        state = TrainingState(step=step, best_step=best_step, best_loss=1 / step, seconds=0.5, samples=step)
        save_state(folder, state, module=self.module, optimizer=self.optimizer)

    def resume(self, folder: Path) -> TrainingState:
        return load_state(folder, module=self.module, optimizer=self.optimizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    training = Training()
    for step, best_step in ((1, 1), (2, 1), (3, 3), (4, 3)):
        training.step(tmp_path, step, best_step=best_step)
    return tmp_path


def test_keeps_the_two_newest_states_and_their_best_weights(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "best-00000001",
        "best-00000003",
        "state-00000003",
        "state-00000004",
    ]
    training = Training()
    assert training.resume(folder) == TrainingState(step=4, best_step=3, best_loss=0.25, seconds=0.5, samples=4)
    assert {int(values["step"]) for values in training.optimizer.state.values()} == {4}
    load_best(folder, 3, module=training.module)


def test_rejects_states_of_another_training(tmp_path: Path) -> None:
    training = Training()
    options: dict[str, Any] = {"module": training.module, "optimizer": training.optimizer}
    save_state(tmp_path, TrainingState(step=1), owner="run a, plug", **options)
    assert load_state(tmp_path, owner="run a, plug", **options).step == 1
    with pytest.raises(DamagedFile, match="another training"):
        load_state(tmp_path, owner="run b, plug", **options)


@pytest.mark.parametrize("name", ["state-00000004/weights", "state-00000004/optimizer", "best-00000003/weights"])
def test_rejects_tensors_of_another_training(folder: Path, tmp_path: Path, name: str) -> None:
    other = Training()
    other.module.weight.data += 1
    other.module(torch.ones(1, 3)).sum().backward()  # so that the moments differ too
    for step in range(1, 5):
        other.step(tmp_path / "other", step, best_step=3 if step > 2 else 1)
    shutil.copy(tmp_path / "other" / f"{name}.safetensors", folder / f"{name}.safetensors")
    if name.startswith("state"):
        assert Training().resume(folder).step == 3
    else:
        with pytest.raises(DamagedFile, match="another checkpoint"):
            Training().resume(folder)


def test_state_before_the_first_validation_has_an_infinite_best_loss(tmp_path: Path) -> None:
    training = Training()
    save_state(tmp_path, TrainingState(step=1), module=training.module, optimizer=training.optimizer)
    assert training.resume(tmp_path) == TrainingState(step=1, best_loss=float("inf"))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "{}"])
def test_warns_of_a_damaged_state_and_resumes_from_the_previous_one(
    folder: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "state-00000004" / name
    content = path.read_bytes()
    middle = bytearray(content)
    middle[len(content) // 2] ^= 4
    damaged = {"flipped": bytes(middle), "cut": content[:-9], "empty": b"", "{}": b"{}"}
    path.unlink() if damage == "missing" else path.write_bytes(damaged[damage])
    training = Training()
    with caplog.at_level(logging.WARNING):
        assert training.resume(folder).step == 3
    assert f"state-00000004/{name} is damaged" in caplog.text or "state-00000004 is damaged" in caplog.text


def test_raises_and_changes_nothing_if_all_states_are_damaged(folder: Path) -> None:
    for path in folder.glob("state-*/state.json"):
        path.write_text("{}")
    training = Training()
    before = training.module.weight.clone()
    with pytest.raises(DamagedFile, match=r"Restore it, or delete .* to train from scratch"):
        training.resume(folder)
    assert torch.equal(training.module.weight, before)
    assert not training.optimizer.state


def test_rejects_states_whose_best_weights_are_missing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(folder / "best-00000003")
    with pytest.raises(DamagedFile, match=r"best-00000003/weights\.safetensors"):
        Training().resume(folder)
    assert "best-00000003" in caplog.text


def test_skips_a_state_with_counters_of_another_step(folder: Path) -> None:
    shutil.copy(folder / "state-00000003" / "state.json", folder / "state-00000004" / "state.json")
    assert Training().resume(folder).step == 3


def test_rejects_a_state_with_weights_of_another_shape(folder: Path) -> None:
    with pytest.raises(DamagedFile, match=r"weight should have shape \[2, 4\]; found \[2, 3\]"):
        Training(width=4).resume(folder)


def _write_forever(folder: Path) -> None:
    torch.set_num_threads(1)
    training, config = Training(), Config()
    for step in count(1):
        training.step(folder / "states", step, best_step=step)
        write_config(folder / "config.yaml", config, unchecked=())
        write_checked_json(folder / "fit.json", {"steps": step, "note": "x" * step})
        save_tensors(folder / "w.safetensors", {"w": torch.full((step,), float(step))})
        JsonLines(folder / "lines.jsonl").append({"step": step})


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("milliseconds", [0, 7, 20, 45, 90])
def test_files_are_complete_after_a_kill_at_any_time(tmp_path: Path, milliseconds: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_write_forever, args=(tmp_path,))
    process.start()
    while not (tmp_path / "lines.jsonl").exists():
        time.sleep(0.001)
    time.sleep(milliseconds / 1000)
    process.kill()
    process.join()
    steps = read_json(tmp_path / "fit.json", remedy="")["steps"]
    weights = load_tensors(tmp_path / "w.safetensors", remedy="")["w"]
    assert len(weights) == weights[0]
    assert abs(len(weights) - steps) <= 1
    assert read_config(tmp_path / "config.yaml", unchecked=()) == Config()
    lines = [line["step"] for line in JsonLines(tmp_path / "lines.jsonl")]
    assert lines == list(range(1, len(lines) + 1))
    assert abs(len(lines) - steps) <= 1
    assert abs(Training().resume(tmp_path / "states").step - steps) <= 1


def test_state_file_has_every_counter(folder: Path) -> None:
    values = json.loads((folder / "state-00000004" / "state.json").read_text())
    assert set(values) == {"step", "best_step", "best_loss", "seconds", "samples", "owner", "parts", "checksum"}
