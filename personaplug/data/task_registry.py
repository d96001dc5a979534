"""Which tasks there are: LaMP's (but LaMP-6, which is not public), and those that a folder declares in its task.json.

Where a folder's task comes from is in `load_task`; the folder's name means nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from personaplug.data.json_stream import existing_folder, stream_values
from personaplug.data.parsing import Flaw, as_name
from personaplug.data.task import Task, TaskKind, template_parts
from personaplug.errors import ConfigError, MissingData, nearest

# ---- the built-in tasks

_MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
    "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip

# The candidates stand between fixed words, so quotes inside a title do not end it.
_CANDIDATES = r'without explanation\. \[1\]: "(.*?)" \[2\]: "(.*)"\s*\Z'

_BUILT_IN = (
    Task("LaMP_1", "label", ("title", "abstract"), None, ("accuracy", "f1"),
         labels=("[1]", "[2]"), max_new_tokens=6, query_pattern=_CANDIDATES,
         item_template='"{title}"', history_after="title"),
    Task("LaMP_2", "label", ("description", "tag"), "tag", ("accuracy", "f1"),
         labels=_MOVIE_TAGS, query_after="description: ", max_new_tokens=12,
         item_template='the tag for the movie: "{description}" is "{tag}"'),
    Task("LaMP_3", "rating", ("text", "score"), "score", ("mae", "rmse", "accuracy"),
         labels=("1", "2", "3", "4", "5"), query_after="review: ", max_new_tokens=4,
         item_template='{score} is the score for "{text}"'),
    Task("LaMP_4", "text", ("title", "text"), "title", ("rouge_1", "rouge_l"), query_after="article: ",
         item_template='"{title}" is the title for "{text}"'),
    Task("LaMP_5", "text", ("title", "abstract"), "title", ("rouge_1", "rouge_l"), query_after="paper: ",
         item_template='"{title}" is a title for "{abstract}"',
         history_template="{history}. Following the given patterns {input}"),
    Task("LaMP_7", "text", ("text",), "text", ("rouge_1", "rouge_l"), query_after=": ",
         item_template='"{text}"',
         history_template="{history} are written by a person. Following the given patterns {input}"),
)  # fmt: skip

LAMP_TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _BUILT_IN})
"""LaMP's tasks by canonical name. LaMP_6 is not among them: its data is not public."""


def lamp_task(name: str) -> Task:
    """Return one of LaMP's own tasks; `LaMP-1` is the same as `LaMP_1`.

    Raises:
        ConfigError: if there is no such task, or it is LaMP_6.
    """
    known = {task.lower(): task for task in LAMP_TASKS}
    wanted = name.strip().lower().replace("-", "_")
    if wanted == "lamp_6":
        raise ConfigError("LaMP_6 rests on the Avocado mails, which are not public, so it is not built in.")
    if wanted not in known:
        raise ConfigError(f"There is no built-in task {name!r}; {nearest(name, LAMP_TASKS)}")
    return LAMP_TASKS[known[wanted]]


# ---- a folder's own task

_KEYS = ("name", "kind", "labels", "query_after", "query_pattern", "item_fields", "answer_field", "metrics",
         "max_new_tokens", "item_template", "item_joint", "history_template", "history_after")  # fmt: skip
_METRICS = {
    "label": ("accuracy", "f1"),
    "rating": ("mae", "rmse", "accuracy"),
    "text": ("rouge_1", "rouge_l"),
}
_LENGTHS = {"label": 16, "rating": 4, "text": 128}


def load_task(folder: str | Path, *, task: str | None = None) -> Task:
    """Find out which task a folder holds.

    Asked in this order: `task` (a built-in name, or the name in the folder's task.json), the folder's
    `task.json`, the key "task" in its `*_outputs.json[.gz]`.

    Raises:
        MissingData: if the folder is not there, or nothing in it says which task it is.
        ConfigError: if the task is unknown or wrongly declared, or two files name different ones.
        RecordError: if a file that should say it is not valid JSON.
    """
    folder = existing_folder(folder)
    own = folder / "task.json"
    if task is not None:
        return _named_task(own, task)
    if own.is_file():
        return read_task(own)
    return _task_of_outputs(folder)


def _named_task(own: Path, name: str) -> Task:
    if own.is_file():
        declared = read_task(own)
        if declared.name == name:
            return declared
    return lamp_task(name)


def read_task(path: Path) -> Task:
    """Read a task.json.

    Raises:
        ConfigError: if it is not valid JSON, or declares the task wrongly.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold one JSON object that declares a task, found {type(values).__name__}.")
    return parse_task(values, source=str(path))


def parse_task(values: Mapping[str, Any], *, source: str = "task.json") -> Task:
    """Make a task of a declaration: all its keys, or `like` with those that differ.

    Raises:
        ConfigError: for an unknown key (with the nearest known one), a missing one, a wrong type or value.
    """
    for key in values:
        if key not in (*_KEYS, "like"):
            raise ConfigError(f"{source}: unknown key {key!r}; {nearest(key, (*_KEYS, 'like'))}")
    merged = {**_inherited(values, source), **{key: values[key] for key in values if key != "like"}}
    for key in ("name", "kind", "item_fields"):
        if key not in merged:
            raise ConfigError(f'{source}: the key {key!r} is missing; give it, or inherit a task by "like": "LaMP_4".')
    return _checked(_built(merged, source), source)


def _inherited(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    if "like" not in values:
        return {}
    if not isinstance(values["like"], str):
        raise ConfigError(f"{source}: 'like' should be the name of a built-in task.")
    inherited = asdict(lamp_task(values["like"]))
    # One way of finding the query replaces the other; both at once would contradict each other.
    if "query_after" in values and "query_pattern" not in values:
        inherited["query_pattern"] = ""
    if "query_pattern" in values and "query_after" not in values:
        inherited["query_after"] = ""
    # What follows from the kind is inherited only with the kind.
    if values.get("kind", inherited["kind"]) != inherited["kind"]:
        for key in ("labels", "metrics", "max_new_tokens"):
            inherited.pop(key)
    # What is worded for certain fields is inherited only with them.
    own = {**inherited, **values}
    same_fields = own["item_fields"] in (inherited["item_fields"], list(inherited["item_fields"]))
    if not same_fields or own["answer_field"] != inherited["answer_field"]:
        inherited.update(item_template="", history_after="")
    return inherited


def _built(values: Mapping[str, Any], source: str) -> Task:
    kind = values["kind"]
    if kind not in get_args(TaskKind):
        raise ConfigError(f"{source}: 'kind' should be one of {', '.join(get_args(TaskKind))}; found {kind!r}.")
    answer = values.get("answer_field")
    return Task(
        name=_string(values, "name", source),
        kind=kind,
        item_fields=_strings(values["item_fields"], "item_fields", source),
        answer_field=None if answer is None else _string(values, "answer_field", source),
        metrics=_strings(values.get("metrics", _METRICS[kind]), "metrics", source),
        labels=_labels(values.get("labels", ()), source),
        query_after=_string(values, "query_after", source),
        max_new_tokens=_whole(values.get("max_new_tokens", _LENGTHS[kind]), "max_new_tokens", source),
        query_pattern=_string(values, "query_pattern", source),
        item_template=_string(values, "item_template", source),
        item_joint=_string(values, "item_joint", source, default=Task.item_joint),
        history_template=_string(values, "history_template", source, default=Task.history_template),
        history_after=_string(values, "history_after", source),
    )


def _string(values: Mapping[str, Any], key: str, source: str, *, default: str = "") -> str:
    value = values.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"{source}: {key!r} should be a string, found {type(value).__name__}.")
    return value


def _strings(value: object, key: str, source: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in value):
        raise ConfigError(f"{source}: {key!r} should be a list of non-empty strings.")
    if len(set(value)) < len(value):
        raise ConfigError(f"{source}: {key!r} names something twice.")
    return tuple(value)


def _labels(value: object, source: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{source}: 'labels' should be a list, found {type(value).__name__}.")
    try:
        labels = [as_name(label, "a label") for label in value]
    except Flaw as flaw:
        raise ConfigError(f"{source}: {flaw}.") from None
    if any(label != label.strip() for label in labels):
        raise ConfigError(f"{source}: a label has blanks at its ends; answers are compared without them.")
    return _strings(labels, "labels", source)


def _whole(value: object, key: str, source: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{source}: {key!r} should be a whole number of at least 1.")
    return value


def _checked(task: Task, source: str) -> Task:
    if not task.name.strip():
        raise ConfigError(f"{source}: 'name' is empty.")
    if not task.item_fields or not task.metrics:
        raise ConfigError(f"{source}: 'item_fields' and 'metrics' need at least one entry.")
    if "nll" in task.metrics:
        raise ConfigError(f"{source}: leave 'nll' out of 'metrics'; it is a column wherever a language model answers.")
    if {"id", "date"} & set(task.field_names) or task.answer_field == "":
        raise ConfigError(f"{source}: a field of an item needs a name, and other than 'id' and 'date'.")
    if (task.kind == "text") == bool(task.labels):
        raise ConfigError(f"{source}: the kinds 'label' and 'rating' need 'labels', and 'text' has none.")
    if task.kind == "rating":
        _check_scale(task.labels, source)
    _check_query(task, source)
    _check_wording(task, source)
    return task


def _check_scale(labels: Sequence[str], source: str) -> None:
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        raise ConfigError(f"{source}: the labels of a rating should be numbers, found {list(labels)}.") from None
    if not all(low < high for low, high in pairwise(numbers)) or not all(abs(n) < 1e9 for n in numbers):
        raise ConfigError(f"{source}: the labels of a rating should be finite and rise, found {list(labels)}.")


def _check_query(task: Task, source: str) -> None:
    if task.query_after and task.query_pattern:
        raise ConfigError(f"{source}: give 'query_after' or 'query_pattern', not both.")
    try:
        groups = re.compile(task.query_pattern).groups
    except re.error as error:
        raise ConfigError(f"{source}: 'query_pattern' is not a regular expression: {error}.") from None
    if task.query_pattern and not groups:
        raise ConfigError(f"{source}: 'query_pattern' needs a group (…) around what is the query.")


def _check_wording(task: Task, source: str) -> None:
    named = template_parts(task.item_template)[1::2]
    for name in named:
        if name not in task.field_names:
            raise ConfigError(f"{source}: 'item_template' names {{{name}}}; {nearest(name, task.field_names)}")
    if task.item_template and not named:
        raise ConfigError(f"{source}: 'item_template' shows nothing of an item; name a field of it in braces.")
    if sorted(template_parts(task.history_template)[1::2]) != ["history", "input"]:
        raise ConfigError(f"{source}: 'history_template' should hold {{history}} and {{input}}, each once.")


def _task_of_outputs(folder: Path) -> Task:
    found: dict[str, str] = {}
    for path in sorted((*folder.glob("*_outputs.json"), *folder.glob("*_outputs.json.gz"))):
        for _, name in stream_values(path, "task", opening=b"{", unit="key"):
            found.setdefault(str(name).replace("-", "_"), path.name)
            break
    if len(found) > 1:
        raise ConfigError(f"{folder}: its files name different tasks: {found}. Say which one is meant by `task`.")
    if not found:
        raise MissingData(
            f"{folder} does not say which task it holds: there is no task.json and no "
            f'*_outputs.json[.gz] with a "task". Name one of {", ".join(LAMP_TASKS)} by `task`, or '
            "write a task.json."
        )
    name, file = next(iter(found.items()))
    try:
        return lamp_task(name)
    except ConfigError as error:
        raise ConfigError(f"{folder / file}: {error} A task of one's own needs a task.json in the folder.") from None
