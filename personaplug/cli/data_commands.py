"""The commands that make data sets: from an app's data, and from a data set with few samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from personaplug.cli.options import (
    FILE,
    FOLDER,
    data_option,
    show,
    skip_bad_option,
    task_option,
    tell_read,
    with_settings,
)
from personaplug.config_parsing import load_config
from personaplug.errors import MissingData

if TYPE_CHECKING:
    from personaplug.data.records import Sample


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


@click.command()
@data_option
@click.option("--out", required=True, type=FOLDER, help="New folder for the data set, in LaMP's layout.")
@click.option("--samples", default=100, show_default=True, metavar="N", help="Inputs that the model writes; 0 = none.")
@click.option("--examples", default=4, show_default=True, metavar="N", help="Real examples in a request, 3 to 8.")
@click.option("--real", type=int, metavar="N", help="Keep only N real train samples, whole users first.")
@click.option("--seed", default=0, show_default=True, help="Draws real samples, histories, examples and words.")
@task_option
@skip_bad_option
@with_settings("model")
def synthesize(
    data: Path,
    out: Path,
    samples: int,
    examples: int,
    real: int | None,
    seed: int,
    task: str | None,
    skip_bad: int,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Let the frozen model write more train samples where there are few, and filter them. The other splits stay.

    The model writes inputs from real examples, then answers each as a real user, whose history the sample gets.
    """
    from personaplug.data import load_task, open_dataset
    from personaplug.data.lamp_writer import check_new, copy_with_train
    from personaplug.data.splits import users_first
    from personaplug.run import open_models
    from personaplug.training.synthesis import SynthesisConfig, Synthesizer

    chosen, config = SynthesisConfig(samples, examples, seed), load_config(config_file, overrides=settings)
    show(config, "model")
    check_new(out)
    reader = open_dataset(data, "train", task=load_task(data, task=task), skip_bad=skip_bad, max_history=sys.maxsize)
    train = list(reader)
    tell_read(reader, "train")
    train = train if real is None else users_first(train, real, seed=seed)
    written: list[Sample] = []
    if samples:
        synthesizer = Synthesizer(train, task=reader.task, models=open_models(config), config=chosen)
        written = synthesizer.write()
        click.echo("\n".join(synthesizer.report.lines()))
        if reader.task.labels:
            click.echo(synthesizer.check_labels())
        if not written:
            raise MissingData(
                f"The filters leave none of the {samples} samples, so nothing is written. Take a larger model, more "
                f"samples or more real data."
            )
    copy_with_train(data, out, [*train, *written], task=reader.task)
    click.echo(f"{out}: train {len(train)} real samples and {len(written)} synthetic ones")
