"""A shared run: one run for each of several tasks. Their plugs share all parameters that do not belong to one task.

OUT/tasks.json    names and sampling weights of the tasks, in order
OUT/TASK/         the run of a task
OUT/shared/       the shared training: log.jsonl and, until it ends, checkpoints to resume from
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaplug.config import Config
from personaplug.config_parsing import with_values
from personaplug.config_resolution import with_rates
from personaplug.data.task import Task
from personaplug.errors import ConfigError, DamagedFile, MissingData, RunConflict
from personaplug.infra.atomic_io import storage_errors, write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.infra.distributed import main_first, on_main
from personaplug.infra.links import check_links
from personaplug.run import SHARED_TRAINING, TASKS_FILE, Run, dated

_REMEDY = "Restore it, or train again in a new folder."
_MAX_WEIGHT = 1000.0
_MAX_NAME_BYTES = 200  # file systems take 255


@dataclass(frozen=True)
class SharedRun:
    """The runs of several tasks, in order.

    Attributes:
        weights: average number of times that an epoch repeats the samples of each task, in the order of the runs.
    """

    folder: Path
    runs: tuple[Run, ...]
    weights: tuple[float, ...]

    @classmethod
    def plan(
        cls,
        folder: str | Path,
        *,
        config: Config,
        tasks: Sequence[Task],
        weights: Sequence[float] = (),
        vectors: str | Path | None = None,
    ) -> SharedRun:
        """Return a shared run for `start`, without writing files.

        Args:
            tasks: two or more.
            weights: one for each task; empty = 1 each.
        Raises:
            ConfigError: if tasks have the same name, or a setting does not apply to several tasks.
            RunConflict: if the folder contains other files, or a training of other tasks or weights.
        """
        folder, names = Path(folder), [task.name for task in tasks]
        task_weights = _checked_weights(weights, names)
        _check_names(names)
        config = dated(_shared_config(config, tasks), folder / _folder_name(names[0]))
        main_first(lambda: _check_folder(folder, names=names, weights=task_weights))
        labels = tuple(dict.fromkeys(label for task in tasks for label in task.labels))
        runs = [
            Run.plan(folder / _folder_name(task.name), config=config, task=task, vectors=vectors, shared_labels=labels)
            for task in tasks
        ]
        return cls(folder, tuple(runs), task_weights)

    def start(self) -> None:
        """Write the list of tasks, and the description of each run."""
        on_main(self._write)
        for run in self.runs:
            run.start()

    @classmethod
    def open(cls, folder: str | Path) -> SharedRun:
        """Open an existing shared run.

        Raises:
            MissingData: if the folder is not a shared run, or lacks a run of a task.
            DamagedFile: if a file was changed.
            RunConflict: if a link leads out of the folder.
        """
        folder = Path(folder)
        check_links(folder)
        about = _read(folder)
        runs = tuple(Run.open(folder / _folder_name(name)) for name in about["tasks"])
        return cls(folder, runs, tuple(map(float, about["weights"])))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(run.task.name for run in self.runs)

    @property
    def owner(self) -> str:
        """Unique name of the training, for its files."""
        return f"{_read(self.folder)['id']} {SHARED_TRAINING}"

    def training_folder(self, *, seed: int) -> Path:
        """Return the folder with the checkpoints and the log of the shared training, for one seed."""
        return self.folder / SHARED_TRAINING / f"seed-{seed}"

    def find(self, name: str) -> Run:
        """Return the run of a task.

        Raises:
            ConfigError: if the task has no run; the message lists the tasks.
        """
        for run in self.runs:
            if run.task.name == name:
                return run
        raise ConfigError(
            f"{self.folder} was trained on {', '.join(self.names)}; found data of {name}. Give data of one of these "
            f"tasks, or give the run of a single task in that folder."
        )

    def _write(self) -> None:
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        name = _read(self.folder)["id"] if holds_shared_run(self.folder) else secrets.token_hex(8)
        about = {"id": name, "tasks": list(self.names), "weights": list(self.weights)}
        write_checked_json(self.folder / TASKS_FILE, about)


def holds_shared_run(folder: str | Path) -> bool:
    """Return whether a folder is a shared run."""
    return Path(folder, TASKS_FILE).is_file()


def open_runs(folder: str | Path) -> tuple[Run, ...]:
    """Open the runs of a folder: one for each task of a shared run, or the single run."""
    return SharedRun.open(folder).runs if holds_shared_run(folder) else (Run.open(folder),)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / TASKS_FILE
    if not path.is_file():
        raise MissingData(f"{folder} is not a run of several tasks: {TASKS_FILE} is missing.")
    about = read_json(path, remedy=_REMEDY)
    names, weights = about.get("tasks"), about.get("weights")
    if not isinstance(names, list) or not isinstance(weights, list) or len(names) != len(weights):
        raise DamagedFile(path, reason="it does not list tasks and weights", remedy=_REMEDY)
    return about


def _folder_name(task: str) -> str:
    """Return the name of a task's folder: the task's name, with hyphens for characters that folders should not have."""
    return re.sub(r"[^\w-]+", "-", task).strip("-")


def _check_names(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise ConfigError(f"A shared plug needs two or more tasks; found {len(names)}.")
    folders = [_folder_name(name).casefold() for name in names]  # some file systems ignore case
    if duplicates := [name for name, folder in zip(names, folders, strict=True) if folders.count(folder) > 1]:
        raise ConfigError(
            f"Tasks that share a plug need different names; found {' and '.join(duplicates)}. Change the name in the "
            f"task.json of a folder."
        )
    for name, folder in zip(names, folders, strict=True):
        if folder in ("", SHARED_TRAINING) or len(folder.encode()) > _MAX_NAME_BYTES:
            raise ConfigError(
                f"The task name {name[:40]!r} cannot be used for a folder. Give the task another name of at most "
                f"{_MAX_NAME_BYTES} bytes in the task.json of its folder."
            )


def _checked_weights(weights: Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
    if weights and len(weights) != len(names):
        raise ConfigError(f"Give a weight for each of the {len(names)} tasks, in their order; found {len(weights)}.")
    if invalid := [weight for weight in weights if not (math.isfinite(weight) and 0 < weight <= _MAX_WEIGHT)]:
        raise ConfigError(f"A weight must be a number above 0, at most {_MAX_WEIGHT:g}; found {invalid[0]:g}.")
    return tuple(map(float, weights)) or (1.0,) * len(names)


def _shared_config(config: Config, tasks: Sequence[Task]) -> Config:
    """Return the config of each run. All tasks encode items in the same way, so that one store can serve all tasks."""
    if config.plug.answer_channel not in ("auto", "all"):
        raise ConfigError(
            f"Tasks that share a plug need answer_channel=all; found {config.plug.answer_channel}. Remove this setting."
        )
    if config.plug.label_prior not in ("auto", "none"):
        raise ConfigError("A label prior works for one task only; tasks that share a plug need label_prior=none.")
    return with_rates(with_values(config, {"plug.answer_channel": "all", "plug.label_prior": "none"}), tasks)


def _check_folder(folder: Path, *, names: Sequence[str], weights: Sequence[float]) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunConflict(f"{folder} is a file; a run needs a folder. Choose another --out.")
    if not holds_shared_run(folder):
        if folder.exists() and any(folder.iterdir()):
            raise RunConflict(f"{folder} is neither empty nor a run of several tasks. Choose another --out.")
        return
    about = _read(folder)
    is_begun = any(folder.glob(f"{SHARED_TRAINING}/seed-*/*"))
    if about["tasks"] != list(names) or (is_begun and about["weights"] != list(weights)):
        pairs = zip(about["tasks"], about["weights"], strict=True)
        tasks = ", ".join(f"{name} (weight {weight:g})" for name, weight in pairs)
        raise RunConflict(
            f"{folder} was started on the tasks {tasks}. Give the same tasks in this order, or choose another --out."
        )
