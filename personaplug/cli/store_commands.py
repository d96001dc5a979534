"""The commands about a store of histories: back it up and restore it; read and replace stated preferences."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from pathlib import Path

import click

from personaplug.cli.options import FILE, secret_option
from personaplug.cli.serving_commands import check_installed
from personaplug.errors import ConfigError

_STORE = click.option("--store", required=True, help="Histories: a file, or a postgresql:// URL. It may be in use.")
_TENANT = click.option("--tenant", default="default", show_default=True)
_USER = click.option("--user", required=True)


@click.command("backup-store")
@click.option("--store", required=True, help="Histories in a SQLite file; it may be in use.")
@click.option("--to", "target", required=True, type=FILE, help="File to make.")
@secret_option
def backup_store(store: str, target: Path, secret: Path | None) -> None:
    """Write a store of histories into one file with a checksum. Keep the store's secret too, in another place."""
    check_installed()
    from personaplug.store.backup import back_up
    from personaplug.store.history_store import HistoryStore

    with closing(HistoryStore.open(store, secret=secret)) as opened:
        back_up(opened, target)


@click.command("restore-store")
@click.option("--from", "backup", required=True, type=FILE, help="File made by `backup-store`.")
@click.option("--to", "target", required=True, type=FILE, help="SQLite file to make.")
@click.option("--current", help="Store in use until now: its erasures since the backup are repeated.")
@secret_option
def restore_store(backup: Path, target: Path, current: str | None, secret: Path | None) -> None:
    """Make a store of histories from a backup, if the backup is as it was written."""
    check_installed()
    from personaplug.store.backup import restore
    from personaplug.store.history_store import HistoryStore

    with ExitStack() as stack:
        in_use = stack.enter_context(closing(HistoryStore.open(current, secret=secret))) if current else None
        restore(backup, target, secret=secret, current=in_use)
    if not current:
        click.echo(
            f"Users erased since the backup are back. If the store in use until now is at hand: "
            f"personaplug replay-erasures --from STORE --to {target}",
            err=True,
        )


@click.command("replay-erasures")
@click.option("--from", "source", required=True, help="Store in use until now: a file, or a postgresql:// URL.")
@click.option("--to", "target", required=True, help="Store restored from a backup.")
@secret_option
def replay_erasures(source: str, target: str, secret: Path | None) -> None:
    """Erase from a restored store the users that were erased from another one since the backup."""
    check_installed()
    from personaplug.store.history_store import HistoryStore
    from personaplug.store.refill import copy_erasures

    with (
        closing(HistoryStore.open(source, secret=secret)) as current,
        closing(HistoryStore.open(target, secret=secret)) as restored,
    ):
        count = copy_erasures(current, restored)
    click.echo(f"{count} erasures repeated", err=True)


@click.command("list-preferences")
@_STORE
@secret_option
@_TENANT
@_USER
def list_preferences(store: str, secret: Path | None, tenant: str, user: str) -> None:
    """Print the preferences that a user states, oldest first; their texts only if the store keeps texts."""
    check_installed()
    from personaplug.store.history_store import HistoryStore

    with closing(HistoryStore.open(store, secret=secret)) as opened:
        items = opened.list_preferences(tenant, user)
    stated = [{"id": item.id, "arrived": item.arrived.isoformat(), **dict(item.fields)} for item in items]
    click.echo(json.dumps(stated, indent=2, ensure_ascii=False))


@click.command("set-preferences")
@click.argument("sentences", nargs=-1)
@click.option("--run", "run_folder", type=FILE, help="The run that is served; its encoder reads the sentences.")
@_STORE
@secret_option
@_TENANT
@_USER
def set_preferences(
    sentences: tuple[str, ...], run_folder: Path | None, store: str, secret: Path | None, tenant: str, user: str
) -> None:
    """Make SENTENCES the only preferences that a user states; without any, remove all. A server sees it at once."""
    check_installed()
    from personaplug.serving.feedback import preference_items
    from personaplug.serving.setup import open_parts
    from personaplug.shared_run import open_runs
    from personaplug.store.history_store import HistoryStore

    if sentences and run_folder is None:
        raise ConfigError("Sentences are encoded before they are stored: give --run, the run that is served.")
    encoder = open_parts(open_runs(run_folder)[0], seed=None)[0] if sentences and run_folder else None
    with closing(HistoryStore.open(store, encoder, secret=secret, create=False)) as opened:
        items = preference_items(sentences, content_id=opened.content_id)
        result = opened.replace_preferences(opened.admit(tenant, user), items)
    click.echo(f"{result.new} new, {result.same} as before, {result.removed} removed", err=True)
