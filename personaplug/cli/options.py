"""What several commands share: options, settings and what they say of themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from personaplug.config import Config
from personaplug.config_parsing import changed_settings, describe
from personaplug.errors import ConfigError, MissingData, UserError

if TYPE_CHECKING:
    from personaplug.data.task import Reader, Task
    from personaplug.methods import Method
    from personaplug.run import Run

Command = TypeVar("Command", bound=Callable[..., Any])

logger = logging.getLogger(__name__)

FILE, FOLDER = click.Path(path_type=Path), click.Path(file_okay=False, path_type=Path)
FEW_USERS = 100
"""A plug for fewer users is trained with a warning."""

_SETTINGS_HELP = "Settings are given as key=value words (learning_rate=3e-4) or in a YAML file; the words win."


def with_settings(*sections: str) -> Callable[[Command], Command]:
    """Give a command --config and key=value words, and teach their meaning in its help."""

    def decorate(command: Command) -> Command:
        command.__doc__ = "\n\n".join([cleandoc(command.__doc__ or ""), _SETTINGS_HELP, "\b\n" + describe(sections)])
        command = click.option("--config", "config_file", type=FILE, help="YAML file of settings.")(command)
        return click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")(command)

    return decorate


data_option = click.option(
    "--data",
    required=True,
    type=FILE,
    help="Folder with {train,dev,test}_{questions,outputs}.json[.gz], and a task.json for other tasks than LaMP's.",
)
task_option = click.option("--task", help="Task, where the folder does not say it: LaMP_1 … LaMP_7.")
skip_bad_option = click.option(
    "--skip-bad",
    default=0,
    show_default=True,
    metavar="N",
    help="Pass over at most N broken records; prints the number.",
)
run_option = click.option("--run", "run_folder", required=True, type=FILE, help="A run made by `train`.")
seed_option = click.option("--seed", type=int, help="Which of the run's training seeds.  [default: the first]")
secret_option = click.option("--secret", type=FILE, help="File of the store's secret.  [default: beside SQLite's file]")
vectors_option = click.option(
    "--vectors", type=FILE, help="Folder of the item vectors, to share between runs.  [default: RUN/vectors]"
)


def methods_option(default: str | None, help: str) -> Callable[[Command], Command]:
    """Give a command the option that names rows of a table."""
    return click.option("--methods", default=default, show_default=bool(default), help=help)


def device_of(config: Config) -> str:
    from personaplug.llm.loading import choose_device

    return choose_device(config.model.device)


def show(config: Config, *sections: str) -> None:
    """Log the settings of some sections that differ from the defaults, in a line."""
    logger.info("settings: %s", changed_settings(config, *sections))


def check_same_task(data: Path, task: Task) -> None:
    """Refuse a folder whose answers are of another kind than a task's; warn if only the name is another."""
    from personaplug.data import load_task

    try:
        declared = load_task(data)
    except UserError:
        return  # the folder declares no task
    if (declared.kind, declared.labels) != (task.kind, task.labels):
        raise ConfigError(
            f"{data} holds {declared.name}, whose answers are of another kind than those of {task.name}, which the run "
            f"was trained on. Give data of {task.name}, or train a run on {declared.name}."
        )
    if declared.name != task.name:
        click.echo(f"{data} holds {declared.name}; it is read as {task.name}, which the run was trained on", err=True)


def train_of(data: Path, rows: Sequence[Method], *, run: Run, skip_bad: int) -> Reader | None:
    """Return the training split if some rows are fitted on it when the table is filled."""
    from personaplug.data import open_dataset

    if not any(row.needs_train_split for row in rows):
        return None
    return open_dataset(data, "train", task=run.task, skip_bad=skip_bad, max_history=run.config.plug.max_history)


def default_methods(data: Path, *, run: Run, skip_bad: int) -> list[Method]:
    """Return the rows of a table if none are named.

    Rows that are fitted on the training split are among them only if the folder holds that of the run.
    """
    from personaplug.data.splits import drawn
    from personaplug.methods import default_rows

    rows = default_rows(run.task)
    users: set[str | None] | None = None
    with suppress(MissingData):
        train = train_of(data, rows, run=run, skip_bad=skip_bad)
        if train is None:
            return rows
        users = {sample.user_id for sample in drawn(train, limit=run.config.training.train_limit, seed=0)} - {None}
    if users is not None and run.users_trained_on(users) == len(users):
        return rows
    reason = "has no train split" if users is None else "has another train split than the run was trained on"
    click.echo(f"{data} {reason}, so the rows that are fitted on it are left out", err=True)
    return default_rows(run.task, has_train_split=False)


def tell_read(reader: Any, split: str) -> None:
    report = reader.report
    click.echo(f"{split}: {report.summary()}", err=True)
    for problem in report.problems[:10]:
        click.echo(f"  skipped: {problem}", err=True)


def warn_of_few_users(count: int) -> None:
    """Warn if a training has so few users that a plug can hardly learn how they differ; 0 = files name no users."""
    if 0 < count < FEW_USERS:
        click.echo(
            f"warning: {count} users are few. A plug learns from the differences between users, and those of fewer "
            f"than {FEW_USERS} may not hold for the next user. `personaplug evaluate` shows whether the row plug is "
            f"better than wrong-user; if it is not, collect more users.",
            err=True,
        )
