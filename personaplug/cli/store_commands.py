"""The store commands: load, list, back up and restore histories; list and set stated preferences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click

from personaplug.cli.histories import find_run, histories_of_data, histories_of_log, load_into
from personaplug.cli.log_options import log_options
from personaplug.cli.options import FILE, keep_pictures_option, keep_text_option, secret_option, seed_option
from personaplug.cli.serving_commands import check_installed
from personaplug.errors import ConfigError

_STORE = click.option(
    "--store", required=True, help="Store of histories: a file or a postgresql:// URL. A server may be using it."
)
_TENANT = click.option("--tenant", default="default", show_default=True, help="Tenant of the user.")
_MAX_WIDTH = 40  # characters of a column
_USER = click.option("--user", required=True, help="Id of the user.")


@click.command()
@click.argument("files", nargs=-1, type=FILE, metavar="[LOG]...")
@click.option("--run", "run_folder", required=True, type=FILE, help="Served run; its encoder encodes the items.")
@click.option(
    "--store", required=True, help="Store of histories: a file or a postgresql:// URL; created if it does not exist."
)
@click.option("--data", type=FILE, help="Data folder instead of LOG; the histories of all its samples are loaded.")
@secret_option
@_TENANT
@seed_option
@click.option("--task", "task_name", help="Task of LOG, if the run has several tasks.")
@keep_text_option
@keep_pictures_option
@click.option("--include-erased", is_flag=True, help="Also load users who were erased from the store.")
@log_options(declares_task=False)
def load(
    files: tuple[Path, ...],
    run_folder: Path,
    store: str,
    data: Path | None,
    secret: Path | None,
    tenant: str,
    seed: int | None,
    task_name: str | None,
    keep_text: bool,
    keep_pictures: bool,
    include_erased: bool,
    **options: Any,
) -> None:
    """Load the histories of an app's LOG, or of a data folder, into a store. A server may be using the store.

    LOG has the formats of `import`. All usable rows become items, including the last row of each user. Repeat the
    command to resume after an interruption or to add new items; stored items are skipped.
    """
    check_installed()
    from personaplug.data.logs.options import LogOptions
    from personaplug.serving.config import ServingConfig
    from personaplug.serving.persona_cache import check_fits
    from personaplug.serving.setup import open_parts, open_store

    if bool(files) == bool(data):
        raise ConfigError("Give either log files or --data with a data folder.")
    run = find_run(run_folder, data=data, task_name=task_name)
    keep_text = keep_text or run.task.name_field is not None  # concepts are texts before questions
    histories = histories_of_data(data, run) if data else histories_of_log(files, LogOptions(**options), run)
    encoder, load_plug = open_parts(run, seed=seed)
    plug = load_plug(None)
    config = ServingConfig(store, secret=secret, seed=seed, keep_text=keep_text, keep_pictures=keep_pictures)
    with closing(open_store(plug, encoder, config=config)) as opened:
        check_fits(plug, opened)
        load_into(opened, tenant, histories, include_erased=include_erased)


@click.command()
@_STORE
@secret_option
@click.option("--tenant", help="Only the users of this tenant.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def users(store: str, secret: Path | None, tenant: str | None, as_json: bool) -> None:
    """List the users of a store: id, number of items, date of the last item, number of stated preferences."""
    check_installed()
    from personaplug.store.history_store import HistoryStore
    from personaplug.store.user_list import list_users

    with closing(HistoryStore.open(store, secret=secret)) as opened:
        stored = list_users(opened, tenant=tenant)
    if as_json:
        click.echo(json.dumps([user.to_dict() for user in stored], indent=2, ensure_ascii=False))
        return
    rows = [("tenant", "user", "items", "last", "preferences")]
    for user in stored:
        counts = (f"{user.items:,}", str(user.last or "-"), str(user.preferences))
        rows.append((_id_in_table(user.tenant), _id_in_table(user.user), *counts))
    click.echo("\n".join(_table_lines(rows)))


def _id_in_table(name: str) -> str:
    """Return an id, in quotes if blanks in it would be unclear between the columns."""
    is_clear = name == " ".join(name.split()) and name[0] != '"'
    return name if is_clear else json.dumps(name, ensure_ascii=False)


def _table_lines(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table. After a cell wider than its column, the row continues on the next line."""
    widths = [max(len(cell) for cell in column if len(cell) <= _MAX_WIDTH) for column in zip(*rows, strict=True)]
    for row in rows:
        line, place = "", 0
        for cell, width in zip(row, widths, strict=True):
            place += width + 2
            if len(cell) <= width:
                line += cell.ljust(width + 2)
            else:
                yield line + cell
                line = " " * place
        yield line.rstrip()


@click.command()
@click.option("--store", required=True, help="SQLite file of the store; a server may be using it.")
@click.option("--to", "target", required=True, type=FILE, help="Backup file to create.")
@secret_option
def backup(store: str, target: Path, secret: Path | None) -> None:
    """Back up a store of histories to one file with a checksum. Back up the store's secret too, in another place."""
    check_installed()
    from personaplug.store.backup import back_up
    from personaplug.store.history_store import HistoryStore

    with closing(HistoryStore.open(store, secret=secret)) as opened:
        back_up(opened, target)
        kept = secret or opened.database.secret_file
    click.echo(f"{target} does not hold the store's secret. Keep {kept} too, because a restore needs it.", err=True)


@click.command()
@click.option("--from", "source", required=True, type=FILE, help="File from `backup`.")
@click.option("--to", "target", required=True, type=FILE, help="SQLite file to create.")
@click.option("--current", help="Store in use until now; its erasures since the backup are replayed.")
@click.option(
    "--secret",
    type=FILE,
    help="File with the secret of the store that was backed up.  [default: TO.secret; if it is missing, a copy of the "
    "secret of --current]",
)
def restore(source: Path, target: Path, current: str | None, secret: Path | None) -> None:
    """Restore a store of histories from a backup, after a check that the backup is undamaged.

    The backup does not hold the store's secret. The restored store needs it to open and to verify receipts: put the
    file at TO.secret, or name it with --secret here and in each later command.
    """
    check_installed()
    from personaplug.store import backup as backups
    from personaplug.store.history_store import HistoryStore

    with ExitStack() as stack:
        in_use = stack.enter_context(closing(HistoryStore.open(current, secret=secret))) if current else None
        backups.restore(source, target, secret=secret, current=in_use)
    own = f"{target}.secret"
    click.echo(
        f"{target} is restored. It opens and verifies receipts only with its secret {secret or own}. "
        + (f"Give --secret {secret} to each command, or copy this file to {own}." if secret else "Keep both files."),
        err=True,
    )
    if not current:
        click.echo(
            f"warning: the restored store contains users who were erased after the backup. To erase them again, run: "
            f"personaplug replay-erasures --from STORE_IN_USE_UNTIL_NOW --to {target}"
            f"{f' --secret {secret}' if secret else ''}",
            err=True,
        )


@click.command("replay-erasures")
@click.option("--from", "source", required=True, help="Store in use until now: a file or a postgresql:// URL.")
@click.option("--to", "target", required=True, help="Store restored from a backup.")
@secret_option
def replay_erasures(source: str, target: str, secret: Path | None) -> None:
    """Repeat in a restored store the erasures that another store has made since the backup."""
    check_installed()
    from personaplug.store.history_store import HistoryStore
    from personaplug.store.refill import copy_erasures

    with (
        closing(HistoryStore.open(source, secret=secret)) as current,
        closing(HistoryStore.open(target, secret=secret)) as restored,
    ):
        count = copy_erasures(current, restored)
    click.echo(f"{count} erasures replayed", err=True)


@click.command("list-preferences")
@_STORE
@secret_option
@_TENANT
@_USER
def list_preferences(store: str, secret: Path | None, tenant: str, user: str) -> None:
    """Print a user's stated preferences, oldest first. Their texts are printed only if the store keeps texts."""
    check_installed()
    from personaplug.store.history_store import HistoryStore

    with closing(HistoryStore.open(store, secret=secret)) as opened:
        items = opened.list_preferences(tenant, user)
    stated = [{"id": item.id, "arrived": item.arrived.isoformat(), **dict(item.fields)} for item in items]
    click.echo(json.dumps(stated, indent=2, ensure_ascii=False))


@click.command("set-preferences")
@click.argument("sentences", nargs=-1)
@click.option("--run", "run_folder", type=FILE, help="Served run; its encoder encodes the sentences.")
@_STORE
@secret_option
@_TENANT
@_USER
def set_preferences(
    sentences: tuple[str, ...], run_folder: Path | None, store: str, secret: Path | None, tenant: str, user: str
) -> None:
    """Replace a user's stated preferences by SENTENCES; without any, remove them. A server sees the change at once."""
    check_installed()
    from personaplug.serving.feedback import preference_items
    from personaplug.serving.setup import open_parts
    from personaplug.shared_run import open_runs
    from personaplug.store.history_store import HistoryStore

    if sentences and run_folder is None:
        raise ConfigError("SENTENCES must be encoded before they are stored. Give the served run with --run.")
    encoder = open_parts(open_runs(run_folder)[0], seed=None)[0] if sentences and run_folder else None
    with closing(HistoryStore.open(store, encoder, secret=secret, create=False)) as opened:
        items = preference_items(sentences, content_id=opened.content_id)
        result = opened.replace_preferences(opened.admit(tenant, user), items)
    click.echo(f"{result.new} new, {result.same} as before, {result.removed} removed", err=True)
