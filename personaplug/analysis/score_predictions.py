"""Score predictions in LaMP's output format against golds in the same format, joined by id.

Both files have the form `{"task": "LaMP_2", "golds": [{"id", "output"}]}`, plain or gzipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.metrics import get_metric, is_invalid
from personaplug.analysis.results_file import ResultRow, Results
from personaplug.analysis.significance import bootstrap_interval
from personaplug.analysis.trials import Provenance
from personaplug.data.json_stream import plain_or_gz, stream_values
from personaplug.data.parsing import Flaw, as_record, id_of, short_id, target_of, text_of
from personaplug.data.task import Task
from personaplug.data.task_registry import lamp_task, load_task
from personaplug.errors import ConfigError, MissingData, RecordError

_MAX_NAMED_IDS = 3


class _Outputs(NamedTuple):
    """A file of golds or predictions; `texts` has the texts by id."""

    path: Path
    task_name: str
    texts: Mapping[str, str]


def score_lamp(
    gold_file: str | Path, prediction_file: str | Path, *, resamples: int = 10_000, seed: int = 0
) -> Results:
    """Score a file of predictions against a file of golds, such as `dev_outputs.json`."""
    golds, predictions = _read(Path(gold_file)), _read(Path(prediction_file))
    task = _task_of(golds, predictions)
    _check_ids(golds, predictions)
    targets = [_target(golds, task, name) for name in golds.texts]
    texts = [predictions.texts[name] for name in golds.texts]
    groups = [str(number) for number in range(len(texts))]  # LaMP's files name no users, so each sample is a group
    intervals = {}
    metrics = [get_metric(name, labels=task.labels) for name in task.metrics]
    for metric in [metric for metric in metrics if metric.of_answers] or metrics:
        stats = metric.statistics(texts, targets)
        intervals[metric.name] = bootstrap_interval(stats, groups, metric, resamples=resamples, seed=seed)
    row = ResultRow(
        MethodInfo(Path(prediction_file).name),
        n=len(texts),
        metrics={name: interval.value for name, interval in intervals.items()},
        intervals={name: [interval.low, interval.high] for name, interval in intervals.items()},
        invalid_rate=float(np.mean([is_invalid(text, task.labels) for text in texts])),
    )
    return Results([row], [], Provenance(task=task.name, notes=_notes(golds, task)))


def _read(path: Path) -> _Outputs:
    file = plain_or_gz(path.parent, path.name)
    if file is None:
        raise MissingData(f"There is no file {path}. Give a JSON file with the keys 'task' and 'golds'.")
    task_names = [name for _, name in stream_values(file, "task", opening=b"{", unit="key") if isinstance(name, str)]
    if not task_names:
        raise RecordError(file, "the key 'task'", reason="expected the name of a task, such as LaMP_2; found no text")
    records = stream_values(file, "golds.item", opening=b"{", unit="gold")
    pairs = [_pair(file, number, record) for number, record in records]
    if not pairs:
        raise RecordError(file, "the key 'golds'", reason="expected a list of answers; found none")
    repeated = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
    if repeated:
        raise RecordError(file, "its ids", reason=f"{_named(repeated)} repeated; expected each id once")
    return _Outputs(file, task_names[0], dict(pairs))


def _pair(path: Path, number: int, record: object) -> tuple[str, str]:
    position = f"gold {number}"
    try:
        values = as_record(record)
        name = id_of(values, "id")
        position += f" (id {short_id(name)})"
        return name, text_of(values, "output")
    except Flaw as flaw:
        raise RecordError(path, position, reason=str(flaw)) from None


def _task_of(golds: _Outputs, predictions: _Outputs) -> Task:
    """Return the task of a task.json beside the golds, else the LaMP task that the golds name."""
    is_declared = (golds.path.parent / "task.json").is_file()
    try:
        task = load_task(golds.path.parent) if is_declared else lamp_task(golds.task_name)
    except ConfigError as error:
        if is_declared:
            raise
        raise ConfigError(f"{golds.path}: {error} To use another task, put its task.json beside the golds.") from None
    names = (predictions.task_name, golds.task_name, task.name)
    predicted, *expected = (name.strip().lower().replace("-", "_") for name in names)
    # Predictions may have the name of task.json even if the golds have LaMP's name.
    if predicted not in expected:
        raise ConfigError(
            f"{golds.path} has the task {short_id(golds.task_name)}, but {predictions.path} has the task "
            f"{short_id(predictions.task_name)}. Give predictions for the same task."
        )
    return task


def _check_ids(golds: _Outputs, predictions: _Outputs) -> None:
    missing = [name for name in golds.texts if name not in predictions.texts]
    unknown = [name for name in predictions.texts if name not in golds.texts]
    excess = f"{_named(unknown)} not among the golds of {golds.path}; remove the ids, or give the golds that have them"
    if missing:
        raise MissingData(
            f"{predictions.path}: of {len(golds.texts)} golds, {_named(missing)} without a prediction"
            f"{f'; {excess}' if unknown else ''}. Add the missing predictions: LaMP's scores need one for every gold."
        )
    if unknown:
        raise RecordError(predictions.path, "its ids", reason=excess)


def _named(names: Sequence[str]) -> str:
    """Return the number of ids, the first ids and a verb: `2 ids ("a", "b") are`."""
    first = ", ".join(f'"{short_id(name)}"' for name in names[:_MAX_NAMED_IDS])
    more = ", …" if len(names) > _MAX_NAMED_IDS else ""
    return f"{len(names)} id ({first}) is" if len(names) == 1 else f"{len(names)} ids ({first}{more}) are"


def _target(golds: _Outputs, task: Task, name: str) -> str:
    try:
        return target_of(task, golds.texts[name])
    except Flaw as flaw:
        raise RecordError(golds.path, f"the gold with id {short_id(name)}", reason=str(flaw)) from None


def _notes(golds: _Outputs, task: Task) -> list[str]:
    size = len(golds.texts)
    ratings = [
        "A rating that is not a number counts as the end of the scale farthest from the gold. Numbers are not clipped."
    ]
    return [
        f"Scored against {golds.path.name}: {size} samples, joined by id.",
        f"Intervals: bootstrap over {size} samples. They may be too narrow, because samples of one user are similar "
        f"and the files name no users.",
        *(ratings if task.kind == "rating" else ()),
    ]
