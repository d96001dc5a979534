"""The commands that keep a store of histories safe: backup-store, restore-store, replay-erasures."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import click

from personaplug.cli.options import FILE, secret_option
from personaplug.cli.serving_commands import check_installed


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
