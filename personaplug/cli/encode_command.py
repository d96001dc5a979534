"""The command `encode`, which encodes items or, for Parquet files, users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from personaplug.cli.offline_options import OfflineOptions, offline_options, run_offline
from personaplug.cli.options import (
    FILE,
    config_of,
    device_of,
    seed_option,
    show,
    skip_bad_option,
    task_option,
    tell_read,
    with_settings,
)
from personaplug.config_parsing import load_config
from personaplug.errors import ConfigError


@click.command()
@click.option("--data", type=FILE, help="Data folder whose items are encoded, for `train` and `evaluate`.")
@click.option("--vectors", type=FILE, help="Folder for the item vectors of --data.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    default=("train", "dev"),
    show_default=True,
    help="Split of --data to encode; may be repeated.",
)
@task_option
@skip_bad_option
@click.option("--run", "run_folder", type=FILE, help="Run whose plug makes the personas of --input.")
@seed_option
@offline_options
@with_settings("model", "plug")
def encode(
    data: Path | None,
    vectors: Path | None,
    splits: tuple[str, ...],
    task: str | None,
    skip_bad: int,
    run_folder: Path | None,
    seed: int | None,
    config_file: Path | None,
    settings: tuple[str, ...],
    **offline: Any,
) -> None:
    """Encode histories ahead of time: items to vectors, or users to personas.

    With --data and --vectors, the items of all histories are encoded. `train` and `evaluate` otherwise encode missing
    items.

    With --run, --input and --output, the plug turns the history of each row of Parquet files into soft tokens. The
    input has a column history (or --store) and may have the columns id, user_id and prompt. docs/offline.md describes
    input and output.
    """
    options = OfflineOptions(**offline)
    if options.is_used(without=("data", "vectors", "splits", "task", "skip_bad"), jobs_only=("seed",)):
        if run_folder is None:
            raise ConfigError("--input needs --run, whose plug makes the personas.")
        from personaplug.run import Run

        run = Run.open(run_folder)
        run_offline("encode", run, config_of(run, config_file, settings), options, seed=seed)
        return
    if not (data and vectors) or run_folder:
        raise ConfigError("Give --data and --vectors to encode items, or --run, --input and --output for personas.")
    _encode_items(data, vectors, splits, task=task, skip_bad=skip_bad, config_file=config_file, settings=settings)


def _encode_items(
    data: Path,
    vectors: Path,
    splits: tuple[str, ...],
    *,
    task: str | None,
    skip_bad: int,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    from personaplug.config_resolution import resolved
    from personaplug.data import load_task, open_dataset
    from personaplug.encoders import open_encoder
    from personaplug.encoders.embedding_store import EmbeddingStore
    from personaplug.encoders.encoded_sample import encoded
    from personaplug.encoders.item_parts import check_item_parts

    config = load_config(config_file, overrides=settings)
    show(config, "model", "plug")
    declared = load_task(data, task=task)
    readers = {
        split: open_dataset(data, split, task=declared, skip_bad=skip_bad, max_history=config.plug.max_history)
        for split in splits
    }
    encoder = open_encoder(config.model.encoder, device=device_of(config), engine=config.model.encoder_engine)
    check_item_parts(encoder.identity, *readers.values())
    table = EmbeddingStore.open(vectors, encoder)
    for split, reader in readers.items():
        old_count = len(table)
        encoded(reader, table, plug=resolved(config, declared).plug)
        tell_read(reader, split)
        click.echo(f"{split}: {len(table) - old_count:,} new vectors, {len(table):,} in {vectors}")
