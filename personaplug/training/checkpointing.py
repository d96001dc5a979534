"""Checkpoints: what a stopped training goes on from, written whole or not at all.

A folder holds `state-<step>` (the plug, the optimizer's moments, the counters; the newest counts) and
`best-<step>` (the plug with the best validation so far, the one that the newest state names).
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


@dataclass
class TrainingState:
    """The counters of a training.

    Attributes:
        step: optimizer steps done.
        best_step: when the validation loss was lowest; 0 before the first validation.
        best_loss: that loss, per token.
        worse: validations since then.
        seconds: time spent so far, over all resumptions.
        samples: samples (views) trained on so far.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    worse: int = 0
    seconds: float = 0.0
    samples: int = 0


def save_state(folder: Path, state: TrainingState, *, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a state, then drop what it makes superfluous.

    Raises:
        StorageError: if it cannot be written; what was there before stays.
    """
    with atomic_folder(folder / f"state-{state.step:08d}") as place:
        save_file(_plain(module.state_dict()), place / "weights.safetensors")
        save_file(_moments(optimizer), place / "optimizer.safetensors")
        (place / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    for old in _folders(folder, "state-")[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    for old in _folders(folder, "best-"):
        if old.name != f"best-{state.best_step:08d}":
            shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Restore the newest state into `module` and `optimizer`; a fresh TrainingState if there is none."""
    _drop_attempts(folder)
    found = _folders(folder, "state-")
    if not found:
        return TrainingState()
    place = found[-1]
    module.load_state_dict(load_file(place / "weights.safetensors"))
    _restore(optimizer, load_file(place / "optimizer.safetensors"))
    return TrainingState(**json.loads((place / "state.json").read_text(encoding="utf-8")))


def save_best(folder: Path, step: int, *, module: nn.Module) -> None:
    """Keep the plug of this step as the best so far.

    Raises:
        StorageError: if it cannot be written.
    """
    with atomic_folder(folder / f"best-{step:08d}") as place:
        save_file(_plain(module.state_dict()), place / "weights.safetensors")


def load_best(folder: Path, step: int, *, module: nn.Module) -> None:
    """Load the best plug, as named by a state."""
    module.load_state_dict(load_file(folder / f"best-{step:08d}" / "weights.safetensors"))


def drop_states(folder: Path) -> None:
    """Remove what only an unfinished training needs."""
    for place in _folders(folder, "state-") + _folders(folder, "best-"):
        shutil.rmtree(place, ignore_errors=True)


def _drop_attempts(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for place in folder.glob(".*.tmp"):
        shutil.rmtree(place, ignore_errors=True)


def _folders(folder: Path, prefix: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{prefix}*") if path.is_dir()) if folder.is_dir() else []


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous().cpu() for name, value in state.items()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        tensors.update({f"{index}.{name}": torch.as_tensor(value).contiguous().cpu() for name, value in values.items()})
    return tensors


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**whole, "state": moments})
