"""Anyone's predictions in LaMP's output format, scored against golds in the same format.

Both files hold `{"task": "LaMP_2", "golds": [{"id", "output"}]}`, plain or gzipped. They are joined by id, and nothing
is guessed: an id that is missing, unknown or there twice is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from personaplug.analysis.metrics import get_metric, is_invalid
from personaplug.analysis.significance import bootstrap_interval
from personaplug.data.json_stream import plain_or_gz, stream_values
from personaplug.data.parsing import Flaw, as_name, as_record, as_text, short_id, target_of, value_of
from personaplug.data.task import Task
from personaplug.data.task_registry import lamp_task, load_task
from personaplug.errors import ConfigError, MissingData, RecordError

_NAMED_IDS = 3


def score_lamp(
    gold: str | Path,
    predicted: str | Path,
    *,
    task: Task | None = None,
    fallback: str = "lamp",
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score a file of predictions, and return a results object as `report.results_table` prints it.

    Args:
        gold: the right answers, such as `dev_outputs.json`; `LaMP-2` is the same as `LaMP_2`.
        predicted: the predictions, with the golds' ids in any order.
        task: which task it is; by default what a task.json beside the golds declares, else the one they name.
        fallback: how a rating that is no number is scored, "lamp" or "pplug".
        resamples: draws of the bootstrap over samples.
        seed: draws them.

    Raises:
        MissingData: if a file is not there, or golds have no prediction.
        RecordError: if a file is broken, its ids are not the golds' or not unique, or an answer is no text or number.
        ConfigError: if the files are of different tasks, or the task or a setting is unknown.
    """
    golds, answers = _read(Path(gold)), _read(Path(predicted))
    task = task or _task_of(golds)
    _check_same_task(golds, answers, task)
    _check_ids(golds, answers)
    meant = [_target(golds, task, name) for name in golds.outputs]
    said = [answers.outputs[name] for name in golds.outputs]
    row = {"condition": Path(predicted).name, "n": len(said)}
    row |= _scores(said, meant, task, fallback=fallback, resamples=resamples, seed=seed)
    notes = _notes(golds, task, fallback=fallback)
    return {"task": task.name, "split": None, "rows": [row], "pairs": [], "notes": notes}


@dataclass(frozen=True)
class _Outputs:
    """A file of answers: where it is, the task it names, and its answers by id."""

    path: Path
    task_name: str
    outputs: Mapping[str, str]


# ---- reading


def _read(path: Path) -> _Outputs:
    found = plain_or_gz(path.parent, path.name)
    if found is None:
        raise MissingData(f"There is no file {path}. Give a JSON file with the keys 'task' and 'golds'.")
    task_name = _task_name(found)
    pairs = [_pair(found, number, record) for number, record in _records(found)]
    if not pairs:
        raise RecordError(found, "the key 'golds'", reason="it should hold a list of answers, and none were found")
    twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
    if twice:
        raise RecordError(found, "its ids", reason=f"{_named(twice)} more than once; each should be there once")
    return _Outputs(found, task_name, dict(pairs))


def _records(path: Path) -> Iterable[tuple[int, Any]]:
    return stream_values(path, "golds.item", opening=b"{", unit="gold")


def _task_name(path: Path) -> str:
    for _, name in stream_values(path, "task", opening=b"{", unit="key"):
        if isinstance(name, str):
            return name
    raise RecordError(
        path, "the key 'task'", reason="it should name the task, such as LaMP_2, and is missing or no text"
    )


def _pair(path: Path, number: int, record: object) -> tuple[str, str]:
    where = f"gold {number}"
    try:
        values = as_record(record)
        name = as_name(value_of(values, "id"), "its 'id'")
        where = f"gold {number} (id {short_id(name)})"
        return name, as_text(value_of(values, "output"), "its 'output'")
    except Flaw as flaw:
        raise RecordError(path, where, reason=str(flaw)) from None


# ---- whether the two files fit together


def _task_of(golds: _Outputs) -> Task:
    if (golds.path.parent / "task.json").is_file():
        return load_task(golds.path.parent)
    try:
        return lamp_task(golds.task_name)
    except ConfigError as error:
        raise ConfigError(f"{golds.path}: {error} A task of one's own needs a task.json beside the golds.") from None


def _check_same_task(golds: _Outputs, answers: _Outputs, task: Task) -> None:
    # The older LaMP-2 files say LaMP_2, and a run on them writes the name that the folder's task.json gives the task.
    if _canonical(answers.task_name) not in (_canonical(golds.task_name), _canonical(task.name)):
        raise ConfigError(
            f"{golds.path} is of the task {short_id(golds.task_name)} and {answers.path} of "
            f"{short_id(answers.task_name)}. Give predictions for the same task."
        )


def _canonical(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _check_ids(golds: _Outputs, answers: _Outputs) -> None:
    missing = [name for name in golds.outputs if name not in answers.outputs]
    unknown = [name for name in answers.outputs if name not in golds.outputs]
    other = f"{_named(unknown)} not among the golds of {golds.path}" if unknown else ""
    if missing:
        raise MissingData(
            f"{answers.path}: of {len(golds.outputs)} golds, {_named(missing)} without a prediction"
            f"{'; ' if other else ''}{other}. Every gold needs one, and LaMP knows no score of a part."
        )
    if unknown:
        raise RecordError(answers.path, "its ids", reason=f"{other}; remove them, or give the golds they belong to")


def _named(names: list[str]) -> str:
    """How many, and which the first of them are, with the verb: `2 ids ("a", "b") are`."""
    shown = ", ".join(f'"{short_id(name)}"' for name in names[:_NAMED_IDS])
    more = ", …" if len(names) > _NAMED_IDS else ""
    return f"{len(names)} {'id' if len(names) == 1 else 'ids'} ({shown}{more}) {'is' if len(names) == 1 else 'are'}"


def _target(golds: _Outputs, task: Task, name: str) -> str:
    try:
        return target_of(task, golds.outputs[name])
    except Flaw as flaw:
        raise RecordError(golds.path, f"the gold with id {short_id(name)}", reason=str(flaw)) from None


# ---- scoring


def _scores(
    said: list[str], meant: list[str], task: Task, *, fallback: str, resamples: int, seed: int
) -> dict[str, Any]:
    values, intervals = {}, {}
    # LaMP's files name no users: each sample stands for itself.
    groups = [str(number) for number in range(len(said))]
    for name in task.metrics:
        metric = get_metric(name, labels=task.labels, fallback=fallback)
        stats = metric.statistics(said, meant)
        interval = bootstrap_interval(stats, groups, metric, resamples=resamples, seed=seed)
        values[name], intervals[name] = interval.value, [interval.low, interval.high]
    invalid = float(np.mean([is_invalid(text, kind=task.kind, labels=task.labels) for text in said]))
    return {"metrics": values, "intervals": intervals, "invalid_rate": invalid}


def _notes(golds: _Outputs, task: Task, *, fallback: str) -> list[str]:
    size = len(golds.outputs)
    notes = [
        f"Scored against {golds.path.name}: {size} samples, joined by id.",
        f"Intervals: bootstrap over {size} samples. The files name no users, and samples of one user resemble each "
        f"other, so intervals may be too narrow.",
    ]
    if task.kind == "rating":
        notes.append(f"A rating that is no number is scored by the rule {fallback!r}; other numbers are not clipped.")
    return notes
