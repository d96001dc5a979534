"""Options and helpers that several commands share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from personaplug.config import Config
from personaplug.config_parsing import changed_settings, describe, load_config
from personaplug.errors import ConfigError, MissingData, UserError

if TYPE_CHECKING:
    from personaplug.data.task import Reader, Task
    from personaplug.methods import Method
    from personaplug.run import Run

Command = TypeVar("Command", bound=Callable[..., Any])

logger = logging.getLogger(__name__)

FILE, FOLDER = click.Path(path_type=Path), click.Path(file_okay=False, path_type=Path)
RESUME_POINT = "personaplug.resume_point"
"""Key in click's `meta` of the point from which the command would resume after Ctrl-C."""

FEW_USERS = 100
"""Training with fewer users prints a warning."""

_SETTINGS_HELP = "Give settings as key=value words (learning_rate=3e-4) or in a YAML file. The words override the file."


def with_settings(*sections: str) -> Callable[[Command], Command]:
    """Add --config and key=value words to a command, and describe the settings in its help."""

    def decorate(command: Command) -> Command:
        command.__doc__ = "\n\n".join([cleandoc(command.__doc__ or ""), _SETTINGS_HELP, "\b\n" + describe(sections)])
        command = click.option("--config", "config_file", type=FILE, help="YAML file with settings.")(command)
        return click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")(command)

    return decorate


keep_text_option = click.option("--keep-text", is_flag=True, help="Store the texts of items, if the store is new.")
keep_pictures_option = click.option(
    "--keep-pictures", is_flag=True, help="Store the pictures of items, if the store is new."
)
data_option = click.option(
    "--data",
    required=True,
    type=FILE,
    help="Folder with {train,dev,test}_{questions,outputs}.json[.gz], and with task.json if the task is not from LaMP.",
)
task_option = click.option("--task", help="Task, if the folder does not declare it: LaMP_1 … LaMP_7.")
skip_bad_option = click.option(
    "--skip-bad",
    default=0,
    show_default=True,
    metavar="N",
    help="Skip at most N broken records, and print their number.",
)
run_option = click.option("--run", "run_folder", required=True, type=FILE, help="Folder of a run from `train`.")
seed_option = click.option("--seed", type=int, help="Training seed of the run.  [default: the run's first seed]")
engine_option = click.option(
    "--engine",
    default="local",
    show_default=True,
    help="`local`, `llamacpp` (with --gguf), or the address of a vLLM server: http://…",
)
gguf_option = click.option(
    "--gguf", default="", metavar="FILE", help="GGUF file of the engine llamacpp, or package:NAME.", show_default=False
)
secret_option = click.option(
    "--secret", type=FILE, help="File with the store's secret.  [default: next to the SQLite file]"
)
vectors_option = click.option(
    "--vectors", type=FILE, help="Folder for the item vectors; several runs can share it.  [default: RUN/vectors]"
)


def methods_option(default: str | None, help: str) -> Callable[[Command], Command]:
    """Add --methods, the rows of the results table, to a command."""
    return click.option("--methods", default=default, show_default=bool(default), help=help)


def device_of(config: Config) -> str:
    from personaplug.llm.loading import choose_device

    return choose_device(config.model.device)


def config_of(run: Run, config_file: Path | None, settings: Sequence[str], *, base: Sequence[str] = ()) -> Config:
    """Return a run's config, overridden by `base` and then by the command's settings."""
    config = load_config(config_file, overrides=settings, base=load_config(overrides=base, base=run.config))
    run.check_unchanged(config)
    return config


def show(config: Config, *sections: str) -> None:
    """Log the settings that differ from the defaults, in one line."""
    logger.info("settings: %s", changed_settings(config, *sections))


def check_same_task(data: Path, task: Task) -> None:
    """Refuse a folder if its answers differ in kind or labels from the task; warn if only the names differ."""
    from personaplug.data import load_task

    try:
        declared = load_task(data)
    except UserError:
        return  # the folder declares no task
    if (declared.kind, declared.labels) != (task.kind, task.labels):
        raise ConfigError(
            f"{data} contains {declared.name}, but the run was trained on {task.name}, which has other answers. Give "
            f"data of {task.name}, or train a run on {declared.name}."
        )
    if declared.name != task.name:
        click.echo(
            f"{data} contains {declared.name}; reading it as {task.name}, because the run was trained on that task",
            err=True,
        )


def train_of(data: Path, rows: Sequence[Method], *, run: Run, skip_bad: int) -> Reader | None:
    """Return the training split if a row must be fitted on it, else None."""
    from personaplug.data import open_dataset

    if not any(row.needs_train_split for row in rows):
        return None
    return open_dataset(data, "train", task=run.task, skip_bad=skip_bad, max_history=run.config.plug.max_history)


def default_methods(data: Path, *, run: Run, skip_bad: int) -> list[Method]:
    """Return the default rows of the task.

    Rows that are fitted on the training split are included only if the folder has the training split of the run.
    """
    from personaplug.data.splits import drawn
    from personaplug.methods import default_rows
    from personaplug.training.parts import trained_counting

    trained = trained_counting(run)
    rows = default_rows(run.task, trained=trained)
    users: set[str | None] | None = None
    with suppress(MissingData):
        train = train_of(data, rows, run=run, skip_bad=skip_bad)
        if train is None:
            return rows
        users = {sample.user_id for sample in drawn(train, limit=run.config.training.train_limit, seed=0)} - {None}
    if users is not None and run.users_trained_on(users) == len(users):
        return rows
    reason = "has no train split" if users is None else "does not have the train split that the run was trained on"
    click.echo(f"{data} {reason}; leaving out the rows that must be fitted on it", err=True)
    return default_rows(run.task, has_train_split=False, trained=trained)


def tell_read(reader: Any, split: str) -> None:
    report = reader.report
    click.echo(f"{split}: {report.summary()}", err=True)
    for problem in report.problems[:10]:
        click.echo(f"  skipped: {problem}", err=True)


def warn_of_few_users(count: int) -> None:
    """Warn if there are too few users to learn how users differ; a count of 0 means that the files name no users."""
    if 0 < count < FEW_USERS:
        click.echo(
            f"warning: the data has only {count} users. A plug learns how users differ; with fewer than {FEW_USERS} "
            f"users it may not generalize to new ones. Run `personaplug evaluate` and compare the rows plug and "
            f"wrong-user. If plug is not better, collect data of more users.",
            err=True,
        )
