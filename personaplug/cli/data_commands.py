"""The commands that create data sets: `import` from an app's data, `synthesize` from a small data set, `simulate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from personaplug.cli.log_options import are_conversations, log_options
from personaplug.cli.options import (
    FILE,
    FOLDER,
    data_option,
    show,
    skip_bad_option,
    task_option,
    tell_read,
    warn_of_few_users,
    with_settings,
)
from personaplug.config_parsing import load_config
from personaplug.errors import ConfigError, MissingData

if TYPE_CHECKING:
    from personaplug.data.logs.options import LogOptions
    from personaplug.data.records import Sample

_KINDS = ("rating", "style", "manners", "taste-category", "taste-keywords")


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--out", required=True, type=FOLDER, help="New folder for the data set in LaMP's layout.")
@click.option(
    "--format",
    "format_",
    help="Format of the files: openai-chat, openai-preference, trl-preference, sharegpt, aloe or log.  [default: "
    "detected]",
)
@click.option("--share", type=float, help="Share of the users that go to dev, for conversations.  [default: 0.2]")
@click.option(
    "--max-samples-per-user",
    type=int,
    metavar="N",
    help="Maximum train samples per user.  [default: 32 for conversations, 4 for logs]",
)
@skip_bad_option
@log_options(declares_task=True)
def import_command(
    files: tuple[Path, ...],
    out: Path,
    format_: str | None,
    share: float | None,
    max_samples_per_user: int | None,
    skip_bad: int,
    **options: Any,
) -> None:
    """Convert FILES, logs of an app or conversations, to a data set with a train and a dev split.

    A log (CSV, TSV, JSONL, JSON or Parquet, also .gz) has a row for each answer of a user. The command detects the
    roles of the columns and prints them; options override them. A column may hold pictures. The last row of each user
    goes to dev, earlier rows go to train.

    Conversations (JSONL, JSON, Parquet) must name their user and should have a time. They are split by user.
    """
    from personaplug.data.logs.options import LogOptions

    log_settings = LogOptions(**options)
    if are_conversations(files, log_settings, format=format_):
        _import_conversations(
            files, out, format_=format_, share=share, max_samples_per_user=max_samples_per_user, skip_bad=skip_bad
        )
        return
    if share is not None or skip_bad:
        raise ConfigError(
            "--share and --skip-bad are for conversations; remove them for a log. A log is split by time within each "
            "user, and its unusable rows are dropped and counted."
        )
    _import_log(files, out, log_settings, samples_per_user=max_samples_per_user)


def _import_conversations(
    files: Sequence[Path],
    out: Path,
    *,
    format_: str | None,
    share: float | None,
    max_samples_per_user: int | None,
    skip_bad: int,
) -> None:
    from personaplug.data.conversations import MAX_SAMPLES_PER_USER, open_conversations
    from personaplug.data.splits import split_by_user

    samples_per_user = MAX_SAMPLES_PER_USER if max_samples_per_user is None else max_samples_per_user
    reader = open_conversations(files, format=format_, max_samples_per_user=samples_per_user, skip_bad=skip_bad)
    parts = split_by_user(reader, out, share=0.2 if share is None else share)
    tell_read(reader, "read")
    click.echo(f"{out}: train {parts.train} samples of {parts.train_users} users, dev {parts.dev} of {parts.dev_users}")
    warn_of_few_users(parts.train_users)


def _import_log(files: Sequence[Path], out: Path, options: LogOptions, *, samples_per_user: int | None) -> None:
    from personaplug.data.logs.log import read_log
    from personaplug.data.logs.writing import (
        MAX_SAMPLES_PER_USER,
        describe_columns,
        describe_rows,
        describe_task,
        write_log,
    )

    log = read_log(files, options)
    click.echo("\n".join((*describe_columns(log), describe_task(log))))
    limit = MAX_SAMPLES_PER_USER if samples_per_user is None else samples_per_user
    written = write_log(log, out, samples_per_user=limit)
    click.echo("\n".join(describe_rows(log, written.train)))
    click.echo(f"{out}: train {written.train.samples:,} samples, dev {written.dev.samples:,}")
    warn_of_few_users(written.train.users)


@click.command()
@data_option
@click.option("--out", required=True, type=FOLDER, help="New folder for the data set in LaMP's layout.")
@click.option("--samples", default=100, show_default=True, metavar="N", help="Inputs to generate; 0 = none.")
@click.option("--examples", default=4, show_default=True, metavar="N", help="Real examples per prompt, 3 to 8.")
@click.option("--real", type=int, metavar="N", help="Keep only N real train samples, and keep users whole if possible.")
@click.option("--seed", default=0, show_default=True, help="Seed for real samples, histories, examples and words.")
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
    """Generate more train samples with the frozen model, and filter them. The other splits are copied unchanged.

    The model writes inputs from real examples. It then answers each input as a real user, and the sample gets this
    user's history.
    """
    from personaplug.data import load_task, open_dataset
    from personaplug.data.lamp_writer import check_new, copy_with_train
    from personaplug.data.splits import users_first
    from personaplug.run import open_models
    from personaplug.training.synthesis import SynthesisConfig, Synthesizer

    synthesis = SynthesisConfig(samples, examples, seed)
    config = load_config(config_file, overrides=settings)
    show(config, "model")
    check_new(out)
    reader = open_dataset(data, "train", task=load_task(data, task=task), skip_bad=skip_bad, max_history=sys.maxsize)
    train = list(reader)
    tell_read(reader, "train")
    train = train if real is None else users_first(train, real, seed=seed)
    written: list[Sample] = []
    if samples:
        synthesizer = Synthesizer(train, task=reader.task, models=open_models(config), config=synthesis)
        written = synthesizer.write()
        click.echo("\n".join(synthesizer.report.lines()))
        if reader.task.labels:
            click.echo(synthesizer.check_labels())
        if not written:
            raise MissingData(
                f"The filters dropped all {samples} samples, so no data set was written. Use a larger model, more "
                f"samples or more real data."
            )
    copy_with_train(data, out, [*train, *written], task=reader.task)
    click.echo(f"{out}: train {len(train)} real samples and {len(written)} synthetic samples")


@click.command()
@click.option("--out", required=True, type=FOLDER, help="Folder to write the data set to.")
@click.option("--kind", type=click.Choice(_KINDS), default="rating", show_default=True)
@click.option(
    "--users", default=400, show_default=True, help="Training users; dev gets a quarter of this number in addition."
)
@click.option(
    "--closed-share",
    default=0.0,
    show_default=True,
    help="Kind manners: share of the train questions that have one right answer (arithmetic, copying, yes or no).",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the simulation.")
def simulate(out: Path, kind: str, users: int, closed_share: float, seed: int) -> None:
    """Write a data set of simulated users, and the best score that is possible if their tastes are known.

    rating: scores of films. style: messages in a user's style. manners: chats about everyday topics, answered in a
    user's manners. Kind manners writes more folders: in OUT-instructed-length, -layout, -emoji and -casing, prompts
    tell dev users to break with a manner; OUT-closed asks questions with known answers. --closed-share adds such
    questions to train: a plug that was trained without them answers them wrongly.

    taste-category, taste-keywords: users who like things with pictures and texts (needs the extra `pictures`). Asked is
    which of 18 collections a user would choose, or the keywords of a picture that the user would like. In OUT-asked,
    prompts ask for a color that is not the user's.
    """
    from personaplug.data.simulation import SimulationConfig, write_simulation

    config = SimulationConfig(
        kind,  # type: ignore[arg-type]
        users=users,
        dev_users=max(1, users // 4),
        closed_share=closed_share,
        seed=seed,
    )
    write_simulation(config, out)
    click.echo((out / "oracle.json").read_text(encoding="utf-8"))
