"""The commands of the evaluation protocol: experiments, reports and published data sets."""

from __future__ import annotations

import re
from pathlib import Path

import click

from personaplug.cli.options import FILE, FOLDER, methods_option, skip_bad_option, tell_read, with_settings
from personaplug.config_parsing import load_config
from personaplug.errors import ConfigError, MissingData


@click.command()
@click.argument("name")
@click.option("--data", required=True, type=FILE, help="Folder with a folder for each data set.")
@click.option("--out", type=FOLDER, default=Path("runs/bench"), show_default=True, help="Folder for the runs.")
@click.option(
    "--results", type=FOLDER, default=Path("benchmarks/results"), show_default=True, help="Folder for the results."
)
@click.option("--experiments", type=FOLDER, help="Folder with experiment files.  [default: the package's own]")
@click.option("--sets", default="", help="Only these data sets, comma-separated; run several processes to split them.")
@click.option("--seeds", default="", help="Only these seeds, comma-separated.")
@methods_option("", "Only these rows, comma-separated.")
@click.option("--config", "config_file", type=FILE, help="YAML file with settings for all tables.")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
def bench(
    name: str,
    data: Path,
    out: Path,
    results: Path,
    experiments: Path | None,
    sets: str,
    seeds: str,
    methods: str,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Run an experiment: data sets × rows × seeds. NAME is its name or a YAML file. Finished trials do not run again.

    The command writes the results of each data set to --results. `personaplug report` turns them into tables and
    figures.
    """
    from personaplug.evaluation.benchmark import Folders, run_benchmark
    from personaplug.evaluation.experiment import find_experiment, load_experiment

    numbers = _words(seeds)
    if not all(re.fullmatch("[0-9]{1,10}", number) for number in numbers):
        raise ConfigError(f"--seeds takes whole numbers, comma-separated; found {seeds!r}.")
    outcome = run_benchmark(
        load_experiment(find_experiment(name, experiments), config_file=config_file, settings=settings),
        Folders(data, out, results),
        sets=_words(sets),
        seeds=[int(number) for number in numbers],
        methods=_words(methods),
    )
    click.echo("".join(f"{path}\n" for path in outcome.written), nl=False)
    for status, reasons in (("not run", outcome.absent), ("left out", outcome.left_out), ("failed", outcome.failed)):
        for reason in reasons:
            click.echo(f"{status}: {reason}", err=True)
    if outcome.absent and not outcome.written:
        raise MissingData("No part of this experiment could run; the lines above give the reasons.")
    if outcome.failed:
        raise click.exceptions.Exit(1)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@click.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--out", required=True, type=FOLDER, help="Folder for report.html, report.md and figures.")
@click.option("--title", default="Results", show_default=True, help="Title of the report.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="Draw figures; needs matplotlib.")
@click.option("--into", type=FILE, help="Also write the overview into this Markdown file …")
@click.option(
    "--mark", default="results", show_default=True, help="… between <!-- begin MARK --> and <!-- end MARK -->."
)
def report(files: tuple[Path, ...], out: Path, title: str, figures: bool, into: Path | None, mark: str) -> None:
    """Turn results FILES (JSON) into one HTML page, with the verdict first, and into Markdown with PNG figures."""
    from personaplug.analysis.pooled import pooled_gains
    from personaplug.analysis.report import insert_between, overview_markdown, write_report
    from personaplug.analysis.results_file import load_results

    for path in write_report(files, out, title=title, with_figures=figures):
        click.echo(str(path))
    if into is not None:
        results_list = [load_results(path) for path in files]
        pooled = pooled_gains(files, results_list)
        insert_between(into, mark, overview_markdown(results_list, pooled=pooled))
        click.echo(str(into))


@click.command()
@click.option("--gold", required=True, type=FILE, help="File of reference answers, in LaMP's format.")
@click.option("--predictions", required=True, type=FILE, help="File of predictions, in the same format.")
@click.option("--json", "json_file", type=FILE, help="Also write the results to this file.")
@with_settings("evaluation")
def score(
    gold: Path, predictions: Path, json_file: Path | None, config_file: Path | None, settings: tuple[str, ...]
) -> None:
    """Score a file of predictions, in LaMP's output format, against the reference answers."""
    from personaplug.analysis.results_file import write_results
    from personaplug.analysis.score_predictions import score_lamp
    from personaplug.analysis.terminal import terminal_text

    config = load_config(config_file, overrides=settings).evaluation
    results = score_lamp(gold, predictions, resamples=config.resamples, seed=config.draw_seed)
    if json_file is not None:
        write_results(json_file, results)
    click.echo(terminal_text(results))


@click.command("split")
@click.option("--data", required=True, type=FILE, help="Folder of the data set to split.")
@click.option("--out", required=True, type=FOLDER, help="Folder for the new data set.")
@click.option("--share", default=0.2, show_default=True, help="Share of the users that go to dev.")
@click.option("--seed", default=0, show_default=True, help="Seed that draws the users.")
@skip_bad_option
def split_command(data: Path, out: Path, share: float, seed: int, skip_bad: int) -> None:
    """Split a train split by user into train and dev, to choose settings without the official dev split."""
    from personaplug.data import open_dataset
    from personaplug.data.splits import split_by_user

    reader = open_dataset(data, "train", skip_bad=skip_bad)
    parts = split_by_user(reader, out, share=share, seed=seed)
    tell_read(reader, "train")
    click.echo(f"{out}: train {parts.train} samples of {parts.train_users} users, dev {parts.dev} of {parts.dev_users}")


@click.group()
def lamp() -> None:
    """Get the official files of the LaMP benchmark."""


@lamp.command()
@click.argument("name")
@click.option("--out", required=True, type=FOLDER, help="Folder for the files; existing files are verified only.")
@click.option("--source", help="URL or local folder to copy from.  [default: the benchmark's site]")
@click.option(
    "--split",
    "splits",
    multiple=True,
    default=("train", "dev", "test"),
    show_default=True,
    help="Split to download; may be repeated.",
)
def download(name: str, out: Path, source: str | None, splits: tuple[str, ...]) -> None:
    """Download the official files of a task. NAME is lamp-1 … lamp-7 (not 6) or lamp-2-news.

    Append :time for the split by time, as in lamp-1:time.
    """
    from personaplug.data.lamp_download import BASE_URL, download_lamp

    address, folder = (source, None) if source is None or "://" in source else (None, Path(source))
    for path in download_lamp(name, out, splits=splits, base_url=address or BASE_URL, source=folder):
        click.echo(str(path))


@click.command()
@click.argument("benchmark")
@click.argument("source", type=FILE)
@click.option("--split", default="dev", show_default=True, help="Split to read and write.")
@click.option("--out", required=True, type=FOLDER, help="Folder for the data set in LaMP's layout.")
@skip_bad_option
def convert(benchmark: str, source: Path, split: str, out: Path, skip_bad: int) -> None:
    """Convert SOURCE, a file or folder of a published benchmark, to LaMP's layout.

    BENCHMARK is lamp-qa, longlamp, personal-llm, peft-u, prefeval-explicit, prefeval-choice, prefeval-persona, rap, or
    a benchmark from a plugin.
    """
    from personaplug.data import write_lamp
    from personaplug.data.benchmarks import open_benchmark

    reader = open_benchmark(benchmark, source, split, skip_bad=skip_bad)
    write_lamp(reader, out, split, task=reader.task)
    tell_read(reader, split)
