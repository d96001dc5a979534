"""The command that turns an app's data into a data set."""

from __future__ import annotations

from pathlib import Path

import click

from personaplug.cli.options import FILE, FOLDER, skip_bad_option, tell_read


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--out", required=True, type=FOLDER, help="New folder for the data set, in LaMP's layout.")
@click.option(
    "--format", "format_", help="Only this one: openai-chat, openai-preference, trl-preference, sharegpt or aloe."
)
@click.option("--share", default=0.2, show_default=True, help="Share of the users for dev.")
@click.option(
    "--max-samples-per-user", default=32, show_default=True, metavar="N", help="At most N replies of a user are asked."
)
@skip_bad_option
def import_command(
    files: tuple[Path, ...], out: Path, format_: str | None, share: float, max_samples_per_user: int, skip_bad: int
) -> None:
    """Turn FILES of conversations (JSON, JSONL, Parquet, also .gz) into a data set, split by user into train and dev.

    Each record names its user and should have a time; it tells its format itself.
    """
    from personaplug.data.conversations import open_conversations
    from personaplug.data.splits import split_by_user

    reader = open_conversations(files, format=format_, max_samples_per_user=max_samples_per_user, skip_bad=skip_bad)
    parts = split_by_user(reader, out, share=share)
    tell_read(reader, "read")
    click.echo(f"{out}: train {parts.train} samples of {parts.train_users} users, dev {parts.dev} of {parts.dev_users}")
