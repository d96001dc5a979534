"""Checkpoints, each written completely or not at all.

A folder holds `state-<step>` (the weights, the optimizer's moments, the counters; the newest counts) and `best-<step>`
(the weights with the best validation loss so far, which the newest state names).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personaplug.infra.atomic_io import atomic_folder

_WEIGHTS = "weights.safetensors"


@dataclass
class TrainingState:
    """The counters of a training."""

    step: int = 0  # optimizer steps done
    best_step: int = 0  # of the lowest validation loss; 0 before the first validation
    best_loss: float = float("inf")  # that loss, per token
    seconds: float = 0.0  # over all resumptions
    samples: int = 0  # augmented samples trained on


def save_state(folder: Path, state: TrainingState, *, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a state, then remove earlier states and all but the best weights."""
    with atomic_folder(folder / f"state-{state.step:08d}") as target:
        save_file(_on_cpu(module), target / _WEIGHTS)
        save_file(_optimizer_tensors(optimizer), target / "optimizer.safetensors")
        (target / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    best = _best_folder(folder, state.best_step)
    for old in _folders(folder, "state-")[:-1] + [path for path in _folders(folder, "best-") if path != best]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Restore the newest state, if there is one, into `module` and `optimizer`, and return its counters."""
    for unfinished in folder.glob(".*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    states = _folders(folder, "state-")
    if not states:
        return TrainingState()
    newest = states[-1]
    module.load_state_dict(load_file(newest / _WEIGHTS))
    _load_optimizer(optimizer, load_file(newest / "optimizer.safetensors"))
    return TrainingState(**json.loads((newest / "state.json").read_text(encoding="utf-8")))


def save_best(folder: Path, step: int, *, module: nn.Module) -> None:
    with atomic_folder(_best_folder(folder, step)) as target:
        save_file(_on_cpu(module), target / _WEIGHTS)


def load_best(folder: Path, step: int, *, module: nn.Module) -> None:
    module.load_state_dict(load_file(_best_folder(folder, step) / _WEIGHTS))


def drop_states(folder: Path) -> None:
    """Remove the checkpoints of a finished training."""
    for checkpoint in _folders(folder, "state-") + _folders(folder, "best-"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _best_folder(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}"


def _folders(folder: Path, prefix: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{prefix}*") if path.is_dir())


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().contiguous().cpu() for name, value in module.state_dict().items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": torch.as_tensor(value).contiguous().cpu()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    moments: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
