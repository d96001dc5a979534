"""Commands that use a trained run without a server: `generate` and `encode`, for one prompt or for Parquet files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from personaplug.cli.offline_options import OfflineOptions, offline_options, run_offline
from personaplug.cli.options import (
    FILE,
    config_of,
    device_of,
    run_option,
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
    if options.is_used:
        if data or vectors or run_folder is None:
            raise ConfigError("--input needs --run and --output, without --data and --vectors.")
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

    config = load_config(config_file, overrides=settings)
    show(config, "model", "plug")
    declared = load_task(data, task=task)
    readers = {
        split: open_dataset(data, split, task=declared, skip_bad=skip_bad, max_history=config.plug.max_history)
        for split in splits
    }
    encoder = open_encoder(config.model.encoder, device=device_of(config), engine=config.model.encoder_engine)
    table = EmbeddingStore.open(vectors, encoder)
    for split, reader in readers.items():
        old_count = len(table)
        encoded(reader, table, plug=resolved(config, declared).plug)
        tell_read(reader, split)
        click.echo(f"{split}: {len(table) - old_count:,} new vectors, {len(table):,} in {vectors}")


@click.command()
@run_option
@click.option("--prompt", help="Prompt in the wording of the run's task.")
@click.option(
    "--history",
    type=FILE,
    help="File of the user's items: a JSON object per line, with the fields of the run's task.  [default: a new user]",
)
@seed_option
@click.option("--plain", is_flag=True, help="Answer without the plug, for comparison.")
@click.option(
    "--copy-head",
    is_flag=True,
    help="Copy tokens of the prompt and of the user's past answers (a trained plug+copy-head); not with --plain.",
)
@click.option("--probabilities", is_flag=True, help="Print the answer and the probability of each label as JSON.")
@offline_options
@with_settings("evaluation")
def generate(
    run_folder: Path,
    prompt: str | None,
    history: Path | None,
    seed: int | None,
    plain: bool,
    copy_head: bool,
    probabilities: bool,
    config_file: Path | None,
    settings: tuple[str, ...],
    **offline: Any,
) -> None:
    """Answer one prompt for a user with the given history, or all rows of Parquet files.

    With --input and --output, each row has the columns prompt and history (or --store with user_id), and may have an
    id. docs/offline.md describes input and output.
    """
    options = OfflineOptions(**offline)
    if options.is_used:
        if prompt is not None or history or copy_head or probabilities:
            raise ConfigError(
                "--input takes prompts and histories from Parquet files, and writes all probabilities. Remove "
                "--prompt, --history, --copy-head and --probabilities."
            )
        from personaplug.run import Run

        run = Run.open(run_folder)
        run_offline("generate", run, config_of(run, config_file, settings), options, seed=seed, plain=plain)
        return
    if prompt is None:
        raise ConfigError("Give --prompt for one answer, or --input and --output for the rows of Parquet files.")
    from personaplug import inference
    from personaplug.llm.copied_answers import check_answers
    from personaplug.run import COPY_HEAD, open_models
    from personaplug.shared_run import open_runs

    run = inference.run_for(prompt, open_runs(run_folder))
    config = config_of(run, config_file, settings)
    if probabilities and not (run.task.labels and config.evaluation.decoding != "generate"):
        raise ConfigError(f"--probabilities needs scored labels, but answers of {run.task.name} are generated.")
    models, head = None, None
    if copy_head:
        check_answers(run.task)
        seed = run.config.training.seed_or_first(seed)
        run.check_trained(COPY_HEAD, seed=seed)  # before the models are loaded
        models = open_models(run.config)
        head = run.load_copy_head(models.llm, seed=seed)
    response = inference.generate(
        run,
        prompt,
        history=history or (),
        models=models,
        seed=seed,
        plain=plain,
        copy_head=head,
        config=config.evaluation,
    )
    if probabilities and response.distribution is not None:
        click.echo(json.dumps({"answer": response, **response.distribution.to_json()}, ensure_ascii=False))
    else:
        click.echo(response)
