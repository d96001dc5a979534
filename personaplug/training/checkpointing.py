"""Atomic checkpoints.

A folder holds `state-<step>` (weights, optimizer moments, counters) and `best-<step>` (the weights with the lowest
validation loss so far; a state names their step). A training resumes from the newest undamaged state. The state before
the newest stays as a fallback.
"""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from personaplug.errors import DamagedFile
from personaplug.infra.atomic_io import atomic_folder, write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.infra.tensor_files import Shapes, load_tensors, save_tensors, shapes_of, stored_checksum

logger = logging.getLogger(__name__)

_WEIGHTS, _MOMENTS, _COUNTERS = "weights.safetensors", "optimizer.safetensors", "state.json"
_STATES_TO_KEEP = 2


@dataclass
class TrainingState:
    """The counters of a training."""

    step: int = 0  # optimizer steps done
    best_step: int = 0  # step with the lowest validation loss; 0 before the first validation
    best_loss: float = float("inf")  # that loss, per token
    seconds: float = 0.0  # over all resumptions
    samples: int = 0  # augmented samples trained on


def save_state(
    folder: Path, state: TrainingState, *, module: nn.Module, optimizer: torch.optim.Optimizer, owner: str = ""
) -> None:
    """Write a state, then remove all but the latest two states and the latest two best weights.

    Args:
        owner: name of the training; `load_state` refuses states of other trainings.
    """
    with atomic_folder(folder / f"state-{state.step:08d}") as target:
        save_tensors(target / _WEIGHTS, module.state_dict())
        save_tensors(target / _MOMENTS, _optimizer_tensors(optimizer))
        parts = {name: stored_checksum(path, remedy="") for name, path in _tensor_files(target, state).items()}
        write_checked_json(target / _COUNTERS, {**asdict(state), "owner": owner, "parts": parts})
    for old in _folders(folder, "state-")[:-_STATES_TO_KEEP] + _folders(folder, "best-")[:-_STATES_TO_KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, owner: str = "") -> TrainingState:
    """Restore the newest undamaged state into `module` and `optimizer`, and return its counters.

    Without any state, return fresh counters.

    Raises:
        DamagedFile: if all states are damaged or belong to another training.
    """
    for unfinished in folder.glob(".*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    damage: DamagedFile | None = None
    for path in reversed(_folders(folder, "state-")):
        try:
            state, weights, moments = _read_state(path, module=module, optimizer=optimizer, owner=owner)
        except DamagedFile as error:
            logger.warning("%s Trying the previous checkpoint, if there is one.", error)
            damage = error
        else:
            module.load_state_dict(weights)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
            return state
    if damage is not None:
        raise damage
    return TrainingState()


def save_best(folder: Path, step: int, *, module: nn.Module) -> None:
    with atomic_folder(_best_folder(folder, step)) as target:
        save_tensors(target / _WEIGHTS, module.state_dict())


def load_best(folder: Path, step: int, *, module: nn.Module) -> None:
    module.load_state_dict(_load(_best_folder(folder, step), _WEIGHTS, shapes_of(module)))


def drop_states(folder: Path) -> None:
    """Remove the checkpoints of a finished training."""
    for checkpoint in _folders(folder, "state-") + _folders(folder, "best-"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _read_state(
    path: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, owner: str
) -> tuple[TrainingState, dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Return counters, weights and moments of a state; check these and its best weights for damage."""
    state, parts = _read_counters(path, owner=owner)
    weights = _load(path, _WEIGHTS, shapes_of(module))
    tensors = _load(path, _MOMENTS)
    moments = _moments(tensors, optimizer)
    if moments is None:
        raise DamagedFile(
            path / _MOMENTS,
            reason="its tensors do not fit the parameters of the optimizer",
            remedy=_remedy(path.parent),
        )
    if state.best_step:
        _load(_best_folder(path.parent, state.best_step), _WEIGHTS, shapes_of(module))
    for name, file in _tensor_files(path, state).items():
        if stored_checksum(file, remedy=_remedy(path.parent)) != parts.get(name):
            raise DamagedFile(file, reason="it belongs to another checkpoint", remedy=_remedy(path.parent))
    return state, weights, moments


def _tensor_files(path: Path, state: TrainingState) -> dict[str, Path]:
    """Return the tensor files of a state and of the best weights that it names."""
    files = {"weights": path / _WEIGHTS, "moments": path / _MOMENTS}
    return files | ({"best": _best_folder(path.parent, state.best_step) / _WEIGHTS} if state.best_step else {})


def _read_counters(path: Path, *, owner: str) -> tuple[TrainingState, dict[str, str]]:
    """Return the counters of a state, and the checksums of its files."""
    try:
        values = read_json(path / _COUNTERS, remedy=_remedy(path.parent))
    except FileNotFoundError:
        raise DamagedFile(path, reason=f"{_COUNTERS} is missing", remedy=_remedy(path.parent)) from None
    parts, state_owner = values.pop("parts", {}), values.pop("owner", "")
    best_loss = math.inf if values.get("best_loss") is None else values["best_loss"]  # JSON has no infinity
    if values.keys() != {field.name for field in fields(TrainingState)} or path.name != f"state-{values['step']:08d}":
        raise DamagedFile(path / _COUNTERS, reason="it belongs to another checkpoint", remedy=_remedy(path.parent))
    if state_owner != owner:
        raise DamagedFile(path / _COUNTERS, reason="it belongs to another training", remedy=_remedy(path.parent))
    return TrainingState(**values | {"best_loss": best_loss}), parts


def _load(path: Path, name: str, shapes: Shapes | None = None) -> dict[str, Tensor]:
    return load_tensors(path / name, remedy=_remedy(path.parent), shapes=shapes)


def _remedy(folder: Path) -> str:
    return f"Restore it, or delete {folder} and run the same command again to train from scratch."


def _best_folder(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}"


def _folders(folder: Path, prefix: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{prefix}*") if path.is_dir())


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _moments(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]] | None:
    """Return an optimizer's state by parameter; None if the tensors do not fit its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            return None
        if value.dim() and value.shape != parameters[int(index)].shape:
            return None
        moments.setdefault(int(index), {})[name] = value
    return moments
