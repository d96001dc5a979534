"""Commands that train, evaluate and predict; also `quickstart`, `estimate` and `schema`.

A command parses its arguments, calls one function and prints. It imports modules when it runs, so `--help` is fast.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from personaplug.cli.options import (
    FILE,
    FOLDER,
    check_same_task,
    config_of,
    data_option,
    default_methods,
    device_of,
    methods_option,
    run_option,
    show,
    skip_bad_option,
    task_option,
    tell_read,
    train_of,
    vectors_option,
    warn_of_few_users,
    with_settings,
)
from personaplug.cli.shared_training import tell_trained, train_together
from personaplug.config import Config
from personaplug.config_parsing import json_schema, load_config
from personaplug.errors import ConfigError, StorageError
from personaplug.infra.distributed import connect, disconnect, is_main, synchronized

if TYPE_CHECKING:
    from personaplug.data.task import Reader
    from personaplug.methods import Method
    from personaplug.run import Run


def _open_run(
    folder: Path, data: Path, config_file: Path | None, settings: Sequence[str], *, base: Sequence[str] = ()
) -> tuple[Run, Config]:
    """Return a run, and its config with the command's settings.

    If several tasks share the plug, the result is the run of the data's task. Settings that the plug depends on must
    not change.
    """
    from personaplug.data import load_task
    from personaplug.run import Run
    from personaplug.shared_run import SharedRun, holds_shared_run

    run = SharedRun.open(folder).find(load_task(data).name) if holds_shared_run(folder) else Run.open(folder)
    return run, config_of(run, config_file, settings, base=base)


def _open_splits(
    run: Run, data: Path, split: str, *, rows: Sequence[Method] | None, skip_bad: int
) -> tuple[Run, Reader, Sequence[Method], Reader | None]:
    """Return the run, the reader of the split, the rows, and the training split if a row must be fitted on it.

    Args:
        rows: None = the default rows of the task.
    """
    from personaplug.data import load_task, open_dataset

    if run.task.kind == "chat":
        run = run.asked(load_task(data))
    else:
        check_same_task(data, run.task)
    max_history = run.config.plug.max_history
    reader = open_dataset(data, split, task=run.task, skip_bad=skip_bad, max_history=max_history)
    rows = default_methods(data, run=run, skip_bad=skip_bad) if rows is None else rows
    return run, reader, rows, train_of(data, rows, run=run, skip_bad=skip_bad)


@click.command()
@click.option(
    "--out",
    type=FOLDER,
    help="Folder for data, run and results.  [default: runs/quickstart, with --chat runs/quickstart-chat]",
)
@click.option("--chat", is_flag=True, help="Simulate conversations in users' manners instead of ratings of films.")
@with_settings("model", "plug", "training", "evaluation")
def quickstart(out: Path | None, chat: bool, config_file: Path | None, settings: tuple[str, ...]) -> None:
    """Simulate users, train a plug, compare it with the controls, and show users side by side.

    This takes about 5 minutes on two cores, with --chat longer. The models are real. Some default settings are smaller
    here, to save time; the command prints its settings first.
    """
    from personaplug.cli.quickstart import CHATS, RATINGS, run_quickstart

    out = out or Path("runs", "quickstart-chat" if chat else "quickstart")
    run_quickstart(out, demo=CHATS if chat else RATINGS, config_file=config_file, settings=settings)


@click.command()
@click.option(
    "--data",
    "folders",
    required=True,
    multiple=True,
    type=FILE,
    help="Folder with train_{questions,outputs}.json[.gz], and with task.json if the task is not from LaMP. Repeat the "
    "option to train one plug on several tasks.",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    type=float,
    help="Average number of times that an epoch repeats the samples; give one for each --data.  [default: 1]",
)
@click.option("--out", required=True, type=FOLDER, help="Folder of the run; an unfinished run is resumed.")
@vectors_option
@task_option
@skip_bad_option
@methods_option(
    None, "Train the parts for these rows, such as plug+bm25:1,lora.  [default: the plug and instruction-only]"
)
@with_settings("model", "plug", "training", "retrieval", "adapter")
def train(
    folders: tuple[Path, ...],
    weights: tuple[float, ...],
    out: Path,
    vectors: Path | None,
    task: str | None,
    skip_bad: int,
    methods: str | None,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Train a plug and its control without history on the train split of DATA, or the parts that --methods need.

    Several --data, one per task, train one shared user encoder and an instruction for each task. OUT then holds a run
    for each task.

    `accelerate launch --multi_gpu --num_processes N -m personaplug train …` splits each batch across N processes.
    """
    from personaplug.data import load_task, open_dataset
    from personaplug.methods import needed_parts, parse_methods
    from personaplug.run import Run, dated, open_models
    from personaplug.training.parts import train as train_run

    if len(folders) > 1:
        if task or methods is not None:
            raise ConfigError(
                "--task and --methods need exactly one --data. Declare each task in the task.json of its folder. To "
                "train parts for other rows, run `train` with --methods afterwards, on the run of a task."
            )
        train_together(
            folders,
            out,
            load_config(config_file, overrides=settings),
            weights=weights,
            vectors=vectors,
            skip_bad=skip_bad,
        )
        return
    if weights:
        raise ConfigError("--weight balances several tasks, but there is only one --data. Remove --weight.")
    data, config = folders[0], dated(load_config(config_file, overrides=settings), out)
    show(config, "model", "plug", "training", *(("retrieval", "adapter") if methods else ()))
    parts = None if methods is None else needed_parts(parse_methods(methods))
    connect(device_of(config))
    with synchronized():
        declared = load_task(data, task=task)
    run = Run.plan(out, config=config, task=declared, vectors=vectors)
    with synchronized():
        reader = open_dataset(data, "train", task=run.task, skip_bad=skip_bad, max_history=config.plug.max_history)
        models = open_models(config, readers=[reader])
    run.start()  # after data and models are open, so that a failed start leaves no files
    trained = train_run(run, reader, models=models, parts=parts)
    disconnect()
    if not is_main():
        return
    tell_trained(trained)
    tell_read(reader, "train")
    warn_of_few_users(reader.report.users)
    if config.training.train_limit:
        click.echo(f"{config.training.train_limit} of these samples were drawn (train_limit)", err=True)
    if parts == []:
        click.echo("the rows in --methods need no training", err=True)


@click.command()
@run_option
@data_option
@click.option("--split", default="dev", show_default=True, help="Split to score.")
@methods_option(
    None, "Rows, comma-separated.  [default: the plug, its controls and the task's baselines without a model]"
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the results to this file."
)
@skip_bad_option
@with_settings("evaluation")
def evaluate(
    run_folder: Path,
    data: Path,
    split: str,
    methods: str | None,
    json_file: Path | None,
    skip_bad: int,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Score table rows (methods) on one split, compare them, and print a verdict and the table.

    Rows: plain, instruction-only, paper-plug, plug and its controls wrong-user, shuffled, random-vectors, mean-persona,
    population-persona; bm25:4, recency:4, dense:4, random:4, ropg:4, each also as instruction+bm25:4 and plug+bm25:1;
    profile, profile+bm25:4; lora, lora-per-user. Every personal row has a control, such as bm25:4@wrong-user.

    Only if labels are scored: instruction+labels, instruction+neighbors. Only if answers are generated:
    plug+copy-head, instruction+copy-head.

    Without the language model: classical, classical:text, classical:history, user-median, user-mean, user-majority,
    user-words:8, copy, copy:10. The command fits these rows on the train split.
    """
    from personaplug.analysis.results_file import write_results
    from personaplug.analysis.terminal import terminal_text
    from personaplug.evaluation.evaluator import evaluate as evaluate_run
    from personaplug.methods import parse_methods
    from personaplug.run import open_models

    selected = None if methods is None else parse_methods(methods)
    run, config = _open_run(run_folder, data, config_file, settings)
    show(config, "evaluation")
    trained_on = run.task.name
    run, reader, rows, train = _open_splits(run, data, split, rows=selected, skip_bad=skip_bad)
    name = split if run.task.name == trained_on else f"{run.task.name}-{split}"
    oracle = data / f"{split}_oracle.json"
    results = evaluate_run(
        run,
        reader,
        split=name,
        methods=rows,
        config=config.evaluation,
        models=open_models(config),
        oracle=oracle if oracle.exists() else None,
        train=train,
    )
    tell_read(reader, split)
    target = json_file or run.folder / "evaluations" / f"{name}.json"
    had_results, previous = target.exists(), target.with_suffix(".previous.json")
    if had_results:
        target.replace(previous)
    try:
        write_results(target, results)
    except StorageError:
        if had_results:
            previous.replace(target)
        raise
    if had_results:
        click.echo(f"moved the previous results to {previous}", err=True)
    click.echo(terminal_text(results))
    click.echo(f"\nwritten to {target}; `personaplug report {target} --out DIR` writes the full tables")


@click.command()
@run_option
@data_option
@click.option("--split", default="test", show_default=True, help="Split to predict.")
@methods_option("plug", "Rows of a table; see `evaluate`.")
@skip_bad_option
@with_settings("evaluation")
def predict(
    run_folder: Path,
    data: Path,
    split: str,
    methods: str,
    skip_bad: int,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Write predictions for a split without reference answers, in LaMP's output format."""
    from personaplug.evaluation.evaluator import predict as predict_run
    from personaplug.methods import parse_methods
    from personaplug.run import open_models

    selected = parse_methods(methods)
    # Predict all samples unless this command sets a limit: scoring a file needs all predictions.
    run, config = _open_run(run_folder, data, config_file, settings, base=("limit=0",))
    run, reader, rows, train = _open_splits(run, data, split, rows=selected, skip_bad=skip_bad)
    models = open_models(config)
    if config.evaluation.limit:
        click.echo(f"predicting only {config.evaluation.limit} samples (limit={config.evaluation.limit})", err=True)
    paths = predict_run(run, reader, split=split, methods=rows, config=config.evaluation, models=models, train=train)
    for path in paths:
        click.echo(str(path))


@click.command()
def schema() -> None:
    """Print the JSON schema of config files (`--config`), for editors that complete and validate YAML."""
    click.echo(json.dumps(json_schema(), indent=2))


@click.command()
@data_option
@task_option
@skip_bad_option
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the estimate to this file."
)
@with_settings("model", "plug", "training")
def estimate(
    data: Path,
    task: str | None,
    skip_bad: int,
    json_file: Path | None,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Estimate the cost of `train` from a few timed steps: vectors, disk, memory and time."""
    from personaplug.data import load_task, open_dataset
    from personaplug.infra.atomic_io import write_json
    from personaplug.run import open_models
    from personaplug.training.cost_estimate import estimate as estimate_run

    config = load_config(config_file, overrides=settings)
    show(config, "model", "plug", "training")
    reader = open_dataset(
        data, "train", task=load_task(data, task=task), skip_bad=skip_bad, max_history=config.plug.max_history
    )
    costs = estimate_run(config, reader, models=open_models(config, readers=[reader]))
    tell_read(reader, "train")
    if json_file is not None:
        write_json(json_file, asdict(costs))
    click.echo(costs.text())
