"""Read users' histories from a log, from conversations or from a data folder, and load them into a store."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from personaplug.cli.log_options import are_conversations
from personaplug.cli.options import check_same_task
from personaplug.errors import ConfigError, MissingData

if TYPE_CHECKING:
    from personaplug.data.logs.options import LogOptions
    from personaplug.data.records import HistoryItem
    from personaplug.run import Run
    from personaplug.store.history_store import HistoryStore

    Histories = Mapping[str, Sequence[HistoryItem]]


def find_run(folder: Path, *, data: Path | None, task_name: str | None) -> Run:
    """Return the run whose task the histories have: in a run of several tasks, the one of the data or of this name."""
    from personaplug.data import load_task
    from personaplug.shared_run import SharedRun, holds_shared_run, open_runs

    if not holds_shared_run(folder):
        run = open_runs(folder)[0]
        if data:
            check_same_task(data, run.task)
        return run
    shared = SharedRun.open(folder)
    name = load_task(data).name if data else task_name
    if name is None:
        raise ConfigError(f"{folder} has several tasks: {', '.join(shared.names)}. Name the log's by --task.")
    return shared.find(name)


def histories_of_data(folder: Path, run: Run) -> Histories:
    """Return all items of each user in the samples of a data folder."""
    from itertools import chain

    from personaplug.data import open_dataset
    from personaplug.data.lamp import splits_in
    from personaplug.store.loading import histories_of

    splits = splits_in(folder)
    if not splits:
        raise MissingData(f"{folder} holds no {{train,dev,test}}_questions.json[.gz].")
    order = sorted(splits, key=lambda split: (split != "train", split))  # train has the earlier items
    readers = [open_dataset(folder, split, task=run.task, max_history=sys.maxsize) for split in order]
    return histories_of(chain.from_iterable(readers))


def histories_of_log(files: Sequence[Path], options: LogOptions, run: Run) -> Histories:
    """Return all items of each user in the files of a log or of conversations; print how a log was read."""
    from personaplug.data.conversations import open_conversations
    from personaplug.data.logs.log import read_log
    from personaplug.data.logs.writing import describe_columns, describe_rows
    from personaplug.data.task_registry import CHAT

    if are_conversations(files, options, format=None):
        if run.task.kind != "chat" or run.task.field_names != CHAT.field_names:
            raise ConfigError(f"The files hold conversations, and items of {run.task.name} are of another form.")
        return dict(open_conversations(files).histories())
    log = read_log(files, options, task=run.task)
    click.echo("\n".join(describe_columns(log)), err=True)
    reader = log.reader()
    histories = dict(reader.histories())
    click.echo("\n".join(describe_rows(log, reader.report)), err=True)
    return histories


def histories_to_serve(sources: Sequence[Path], run_folder: Path) -> Histories:
    """Return the histories of a log's files or of a data folder, without options about columns."""
    from personaplug.data.logs.options import LogOptions

    folders = [source for source in sources if source.is_dir()]
    if folders and len(sources) > 1:
        raise ConfigError("--load takes the files of one log, or one data folder; found a folder among several paths.")
    try:
        if folders:
            return histories_of_data(folders[0], find_run(run_folder, data=folders[0], task_name=None))
        return histories_of_log(sources, LogOptions(), find_run(run_folder, data=None, task_name=None))
    except ConfigError as error:
        raise ConfigError(
            f"{error} `serve --load` takes no options about a log: run `personaplug load` with them, then `serve` "
            f"without --load."
        ) from None


def load_into(store: HistoryStore, tenant: str, histories: Histories, *, include_erased: bool = False) -> None:
    """Load histories into a store, and print the numbers of users and items."""
    from personaplug.infra.progress import Progress
    from personaplug.store.loading import load_histories

    with Progress("load", total=len(histories), unit="users") as progress:
        result = load_histories(store, tenant, histories, include_erased=include_erased, progress=progress.advance)
    new, replaced, same = result.items
    click.echo(f"loaded: {result.users:,} users; {new:,} items new, {replaced:,} replaced, {same:,} as before")
    if result.erased:
        click.echo(
            f"{result.erased:,} users were erased from this store and are left out; `personaplug load "
            f"--include-erased` loads them",
            err=True,
        )
