"""The registry of rows, and the grammar of their names.

A name is a base, extensions after `+`, and a control after `@`: `plug+bm25:1@wrong-user`. The text after a
colon is the argument of the part before it. `rows.py` registers the rows of this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from personaplug.analysis.method_info import SHUFFLED, WRONG_USER
from personaplug.data.task import Task
from personaplug.errors import ConfigError, nearest
from personaplug.infra.plugins import load_plugins, register
from personaplug.methods.base import Method
from personaplug.training.parts import COUNTING
from personaplug.training.trainings import TrainedPart

_EXAMPLE_LIST = f"plain,instruction-only,{WRONG_USER},plug"
_FREE_BASELINES = ("user-mean", "user-median", "user-majority", "classical", "copy", "user-words")
_BOUNDS = ("reference@wrong-user", "reference")  # floor and ceiling of measures of texts

MethodFactory = Callable[[str], Method]
"""Makes a row from the argument after the colon of its name ("" without a colon)."""

Extension = Callable[[str, str, str], Method]
"""Makes a row from its name, the name before the `+` ("" if there is none) and the argument after the colon."""

_METHODS: dict[str, MethodFactory] = {}
_EXTENSIONS: dict[str, Extension] = {}
_EXAMPLES: list[str] = []
_ALIASES = {WRONG_USER: f"plug@{WRONG_USER}", SHUFFLED: f"plug@{SHUFFLED}"}
_GAIN = "how much of {}'s gain another user's history gives too; the rest is the personal gain"
_ORDER = "whether the order of the items matters to {}"


def register_method(name: str, factory: MethodFactory) -> None:
    """Register a row under its name."""
    register(_METHODS, name, factory, kind="row")
    _EXAMPLES.append(name)


def register_extension(name: str, extension: Extension, *, examples: Sequence[str] = ()) -> None:
    """Register a part of names that stands after a `+`, or first with a number.

    Args:
        examples: names with the extension, for error messages.
    """
    register(_EXTENSIONS, name, extension, kind="extension of rows")
    _EXAMPLES.extend(examples)


def known_methods() -> list[str]:
    """Return the registered names, and the short names of the plug's controls."""
    return [*_METHODS, *_ALIASES]


def default_rows(task: Task, *, has_train_split: bool = True, trained: Collection[str] = ()) -> list[Method]:
    """Return the default rows for a task: the plug, its controls, and the rivals that cost nothing.

    Tasks with free text also have the right answers as a row, and those of another user.

    `shuffled` is left out, because the plug ignores the order of the items. `instruction+labels` and
    `instruction+neighbors` are left out unless the run has trained them.

    Args:
        has_train_split: whether rows can be fitted on the training split.
        trained: names of the run's trained parts.
    """
    counts = [part.name for part in COUNTING if part.name in trained]
    baselines = [find_method(name) for name in (*_FREE_BASELINES, *counts, *_BOUNDS)]
    suitable = [row for row in baselines if _fits(row, task) and (has_train_split or not row.needs_train_split)]
    first, last = ("plain", "instruction-only"), (WRONG_USER, "plug")
    return [*map(find_method, first), *suitable, *map(find_method, last)]


def parse_methods(text: str) -> list[Method]:
    """Return the rows of a comma-separated list.

    Raises:
        ConfigError: for an unknown, repeated or missing name.
    """
    methods = [find_method(name.strip()) for name in text.split(",") if name.strip()]
    if not methods or len({method.name for method in methods}) < len(methods):
        raise ConfigError(
            f"Rows must be different names, separated by commas, such as {_EXAMPLE_LIST}; found {text!r}."
        )
    return methods


def find_method(name: str) -> Method:
    """Return the row of a name.

    Raises:
        ConfigError: if there is no such row.
    """
    body, at, control = _ALIASES.get(name, name).partition("@")
    if at:
        return _control(name, find_method(body), control)
    before, plus, last = body.rpartition("+")
    part, _, argument = last.partition(":")
    if not {body, part} & {*_METHODS, *_EXTENSIONS}:
        load_plugins()
    if body in _METHODS:
        return _METHODS[body]("")
    if part in _EXTENSIONS and (before or not plus):
        return _EXTENSIONS[part](name, before, argument)
    if part in _METHODS and argument and not plus:
        return _METHODS[part](argument)
    raise unknown_method(name)


def needed_parts(methods: Sequence[Method]) -> list[TrainedPart]:
    """Return the parts that must be trained for these rows, each once, in order."""
    return list(dict.fromkeys(part for method in methods for part in method.requires))


def unknown_method(name: str) -> ConfigError:
    """Return the error for a name that is no row, with the nearest names that are."""
    return ConfigError(f"There is no row {name!r}; {nearest(name, [*_EXAMPLES, *_ALIASES])}")


def number_after(name: str, argument: str) -> int:
    """Return the number after a colon in a row's name.

    Raises:
        ConfigError: unless it is a whole number from 1 to 999999999 without leading zeros, so that a row has one name.
    """
    if not re.fullmatch("[1-9][0-9]{0,8}", argument):
        raise unknown_method(name)
    return int(argument)


def _fits(row: Method, task: Task) -> bool:
    """Return whether a baseline can be evaluated on a task."""
    if task.labels and not (task.has_labelled_items or task.has_options):
        return False  # neither answers to count nor options to compare
    try:
        row.check(task)
    except ConfigError:
        return False
    return True


def _control(name: str, method: Method, history: str) -> Method:
    is_personal = method.info.history == "own" and not method.info.is_control
    if not is_personal or not (history == WRONG_USER or (history == SHUFFLED and method.can_be_shuffled)):
        raise ConfigError(
            f"A control must be ROW@{WRONG_USER} or ROW@{SHUFFLED}. ROW must use the user's own history and, for "
            f"{SHUFFLED}, may depend on its order. Found {name!r}."
        )
    short_names = {target: alias for alias, target in _ALIASES.items()}
    info = replace(
        method.info,
        name=short_names.get(name, name),
        history=history,  # type: ignore[arg-type]  # one of two literals, as just checked
        control_of=method.name,
        parents=(),
    )
    return replace(method, info=info, rationale=(_GAIN if history == WRONG_USER else _ORDER).format(method.name))
