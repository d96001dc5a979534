"""The command line. A command parses, calls one function, prints; what it does is found where it is imported from."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from personaplug.cli.benchmark_commands import bench, convert, lamp, report, score, split_command
from personaplug.cli.options import (
    FOLDER,
    check_same_task,
    data_option,
    device_of,
    methods_option,
    show,
    skip_bad_option,
    task_option,
    tell_read,
    train_of,
    vectors_option,
    with_settings,
)
from personaplug.cli.serving_commands import create_key, erase_user, explain, refill_store, serve, verify_receipt
from personaplug.config_parsing import load_config
from personaplug.errors import ConfigError, PersonaPlugError, UserError
from personaplug.infra.distributed import (
    connect,
    disconnect,
    is_main,
    is_reporter,
    is_single_cpu_launch,
    synchronized,
    world_size,
)


class _Group(click.Group):
    """Prints the errors of this package without a traceback; a caller's mistake exits with 2, the rest with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PersonaPlugError as error:
            _tell(error, f"error: {error}")
            sys.exit(2 if isinstance(error, UserError) else 1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of our output has gone, which click ends quietly
            _tell(error, f"error: the system refused a file or device: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            if is_main():
                click.echo("\nstopped; the same command goes on from the last checkpoint", err=True)
            sys.exit(130)


def _tell(error: Exception, sentence: str) -> None:
    if not is_reporter(error):
        # The launcher ends all others as soon as one has ended. The main process must not be ended before it has told
        # this; whoever is still here after a while is the only one that knows.
        time.sleep(10)
    click.echo(sentence, err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quiet", is_flag=True, help="Say nothing but results and errors.")
def main(quiet: bool) -> None:
    """Personalize a frozen language model: train a plug that turns a user's history into a few soft tokens."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("personaplug").setLevel(logging.WARNING if quiet else logging.INFO)
    # Set here and not on import: a library leaves the environment of its caller alone.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when torch loads: threads that wait for each other spin for some microseconds only, then sleep. Spinning on
    # keeps them from other work; going to sleep at once doubles a step of the many small products behind a prompt.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _settle_among_processes(click.get_current_context().invoked_subcommand)


def _settle_among_processes(command: str | None) -> None:
    """Refuse several processes to commands that cannot share their work out; let but one of them speak."""
    if world_size() > 1 and command != "train":
        raise ConfigError(
            f"`personaplug {command}` runs in one process; a launcher has started {world_size()}. Only `train` can "
            f"share its work out: run this without the launcher."
        )
    if is_single_cpu_launch():
        click.echo(
            "warning: `accelerate launch --cpu` starts one process, whatever --num_processes says, and leaves more of "
            "them to MPI. For N on this machine: accelerate launch --multi_gpu --num_processes N",
            err=True,
        )
    if not is_main():
        logging.disable()
        # The hub's client may be loaded already, too late for its environment variable.
        from huggingface_hub.utils.tqdm import disable_progress_bars

        warnings.simplefilter("ignore")
        disable_progress_bars()


@main.command()
@click.option(
    "--out",
    type=FOLDER,
    default=Path("runs/quickstart"),
    show_default=True,
    help="Where data, run and results go.",
)
@with_settings("model", "plug", "training", "evaluation")
def quickstart(out: Path, config_file: Path | None, settings: tuple[str, ...]) -> None:
    """Simulated users, real models: train, compare with the controls, show two users side by side. About 10 minutes.

    It starts from a few values of its own, to be done in that time; the settings it uses are printed first.
    """
    from personaplug.cli.quickstart import run_quickstart

    run_quickstart(out, config_file=config_file, settings=settings)


@main.command()
@click.option("--out", required=True, type=FOLDER, help="Folder for the data set.")
@click.option("--kind", type=click.Choice(["rating", "style"]), default="rating", show_default=True)
@click.option("--users", default=400, show_default=True, help="Training users; a quarter as many more for dev.")
@click.option("--seed", default=0, show_default=True)
def simulate(out: Path, kind: str, users: int, seed: int) -> None:
    """Write a data set of simulated users with known tastes, and the best score that knowing them allows."""
    from personaplug.data.simulation import SimulationConfig, write_simulation

    config = SimulationConfig(task=kind, users=users, dev_users=max(1, users // 4), seed=seed)  # type: ignore[arg-type]
    write_simulation(config, out)
    click.echo((out / "oracle.json").read_text(encoding="utf-8"))


@main.command()
@data_option
@click.option("--vectors", required=True, type=click.Path(path_type=Path), help="Folder of the item vectors.")
@click.option("--split", "splits", multiple=True, default=("train", "dev"), show_default=True, help="May be repeated.")
@task_option
@skip_bad_option
@with_settings("model", "plug")
def encode(
    data: Path,
    vectors: Path,
    splits: tuple[str, ...],
    task: str | None,
    skip_bad: int,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Encode the items of all histories once. `train` and `evaluate` do it themselves; this does it beforehand."""
    from personaplug.data import load_task, open_dataset
    from personaplug.encoders import open_encoder
    from personaplug.encoders.embedding_store import EmbeddingStore
    from personaplug.run import encoded, resolved

    config = load_config(config_file, overrides=settings)
    show(config, "model", "plug")
    declared = load_task(data, task=task)
    encoder = open_encoder(config.model.encoder, device=device_of(config), engine=config.model.encoder_engine)
    table = EmbeddingStore.open(vectors, encoder)
    for split in splits:
        reader = open_dataset(data, split, task=declared, skip_bad=skip_bad, max_history=config.plug.max_history)
        before = len(table)
        encoded(reader, table, plug=resolved(config, declared).plug)
        tell_read(reader, split)
        click.echo(f"{split}: {len(table) - before:,} new vectors, {len(table):,} in {vectors}")


@main.command()
@data_option
@click.option("--out", required=True, type=FOLDER, help="The run's folder; an unfinished run goes on.")
@vectors_option
@task_option
@skip_bad_option
@methods_option(
    None, "Train what these rows of a table need, such as plug+bm25:1,lora.  [default: the plug and instruction-only]"
)
@with_settings("model", "plug", "training", "retrieval", "adapter")
def train(
    data: Path,
    out: Path,
    vectors: Path | None,
    task: str | None,
    skip_bad: int,
    methods: str | None,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Train a plug, and the control that has no history, on DATA's train split; or whatever rows of a table need.

    Under `accelerate launch --multi_gpu --num_processes N -m personaplug train …` N processes share each batch out.
    """
    from personaplug.data import load_task, open_dataset
    from personaplug.methods import needed_parts, parse_methods
    from personaplug.run import Run, open_models
    from personaplug.training.parts import train as train_run

    config = load_config(config_file, overrides=settings)
    show(config, "model", "plug", "training", *(("retrieval", "adapter") if methods else ()))
    parts = None if methods is None else needed_parts(parse_methods(methods))
    connect(device_of(config))
    with synchronized():
        declared = load_task(data, task=task)
    run = Run.create(out, config=config, task=declared, vectors=vectors)
    with synchronized():
        reader = open_dataset(data, "train", task=run.task, skip_bad=skip_bad, max_history=config.plug.max_history)
        models = open_models(config)
    folders = train_run(run, reader, models=models, parts=parts)
    disconnect()
    if not is_main():
        return
    for folder in folders:
        fitted = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
        click.echo(
            f"{folder}: {fitted['steps']} steps, {fitted['samples']:,} samples in {fitted['seconds']:.0f} s; "
            f"kept step {fitted['best_step']} with validation loss {fitted['best_loss']:.4f} "
            f"a {fitted.get('unit', 'token')}"
        )
    tell_read(reader, "train")
    if config.training.train_limit:
        click.echo(f"of these samples {config.training.train_limit} were drawn (train_limit)", err=True)
    if parts == []:
        click.echo("these rows need no training", err=True)


@main.command()
@click.option("--run", "run_folder", required=True, type=click.Path(path_type=Path), help="A run made by `train`.")
@data_option
@click.option("--split", default="dev", show_default=True)
@methods_option("plain,instruction-only,wrong-user,shuffled,plug", "Rows of the table.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results object here too.")
@skip_bad_option
@with_settings("evaluation")
def evaluate(
    run_folder: Path,
    data: Path,
    split: str,
    methods: str,
    json_file: Path | None,
    skip_bad: int,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Score the rows of a results table on one split, compare them, print the table.

    Rows: plain, instruction-only, paper-plug, plug and its controls wrong-user, shuffled, random-vectors, mean-persona,
    population-persona; bm25:4, recency:4, dense:4, random:4, ropg:4, each also as instruction+bm25:4 and plug+bm25:1;
    profile, profile+bm25:4; lora, lora-per-user; every personal row has its control, such as
    bm25:4@wrong-user. Where labels are scored: instruction+labels. Where answers are written: plug+phrases,
    instruction+phrases, any of them with +phrases.
    Without the language model: classical, classical:text, classical:history, user-median, user-mean, user-majority,
    user-words:8, copy, copy:10; they are fitted on the train split here.
    """
    from personaplug.analysis.tables import results_table
    from personaplug.data import open_dataset
    from personaplug.evaluation.evaluator import evaluate as evaluate_run
    from personaplug.infra.atomic_io import write_json
    from personaplug.methods import parse_methods
    from personaplug.run import Run, open_models

    rows = parse_methods(methods)
    run = Run.open(run_folder)
    config = load_config(config_file, overrides=settings, base=run.config)
    run.check_unchanged(config)
    show(config, "evaluation")
    check_same_task(data, run.task)
    reader = open_dataset(data, split, task=run.task, skip_bad=skip_bad, max_history=config.plug.max_history)
    train = train_of(data, rows, run=run, skip_bad=skip_bad)
    oracle = data / f"{split}_oracle.json"
    results = evaluate_run(
        run,
        reader,
        split=split,
        methods=rows,
        config=config.evaluation,
        models=open_models(config),
        oracle=oracle if oracle.exists() else None,
        train=train,
    )
    tell_read(reader, split)
    target = json_file or run_folder / "evaluations" / f"{split}.json"
    if target.exists():
        target.replace(target.with_suffix(".previous.json"))
        click.echo(f"what was in {target} is now {target.with_suffix('.previous.json')}", err=True)
    write_json(target, results.to_json())
    click.echo(results_table(results))
    click.echo(f"\nwritten to {target}")


@main.command()
@click.option("--run", "run_folder", required=True, type=click.Path(path_type=Path), help="A run made by `train`.")
@data_option
@click.option("--split", default="test", show_default=True)
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
    """Answer a split whose right answers are hidden, in LaMP's output format, to be scored elsewhere."""
    from personaplug.data import open_dataset
    from personaplug.evaluation.evaluator import predict as predict_run
    from personaplug.methods import parse_methods
    from personaplug.run import Run, open_models

    rows = parse_methods(methods)
    run = Run.open(run_folder)
    # All samples, unless the command itself asks for fewer: whoever scores the file wants them all.
    base = load_config(overrides=["limit=0"], base=run.config)
    config = load_config(config_file, overrides=settings, base=base)
    run.check_unchanged(config)
    check_same_task(data, run.task)
    reader = open_dataset(data, split, task=run.task, skip_bad=skip_bad, max_history=config.plug.max_history)
    models = open_models(config)
    if config.evaluation.limit:
        click.echo(f"only {config.evaluation.limit} samples are answered (limit={config.evaluation.limit})", err=True)
    train = train_of(data, rows, run=run, skip_bad=skip_bad)
    paths = predict_run(run, reader, split=split, methods=rows, config=config.evaluation, models=models, train=train)
    for path in paths:
        click.echo(str(path))


@main.command()
@click.option("--run", "run_folder", required=True, type=click.Path(path_type=Path), help="A run made by `train`.")
@click.option("--prompt", required=True, help="What is asked, in the wording of the run's task.")
@click.option(
    "--history",
    type=click.Path(path_type=Path),
    help="The user's items: one JSON object a line, with the fields of the run's task. None: a new user.",
)
@click.option("--seed", default=None, type=int, help="Which of the run's training seeds.  [default: the first]")
@click.option("--plain", is_flag=True, help="Answer without the plug, to compare.")
@click.option("--phrases", is_flag=True, help="Mix the phrases of the user's own answers into what the model writes.")
@with_settings("evaluation")
def generate(
    run_folder: Path,
    prompt: str,
    history: Path | None,
    seed: int | None,
    plain: bool,
    phrases: bool,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Answer one prompt as a user with that history would like it answered."""
    from personaplug.inference import generate_one
    from personaplug.run import Run

    run = Run.open(run_folder)
    config = load_config(config_file, overrides=settings, base=run.config)
    run.check_unchanged(config)
    shown = generate_one(
        run, prompt, history=history, seed=seed, plain=plain, phrases=phrases, config=config.evaluation
    )
    click.echo(shown)


@main.command()
@data_option
@task_option
@skip_bad_option
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the estimate here too.")
@with_settings("model", "plug", "training")
def estimate(
    data: Path,
    task: str | None,
    skip_bad: int,
    json_file: Path | None,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Say beforehand what `train` will cost: vectors, disk, memory and time, from a few timed steps."""
    from personaplug.data import load_task, open_dataset
    from personaplug.infra.atomic_io import write_json
    from personaplug.run import open_models
    from personaplug.training.cost_estimate import estimate as estimate_run

    config = load_config(config_file, overrides=settings)
    show(config, "model", "plug", "training")
    reader = open_dataset(
        data, "train", task=load_task(data, task=task), skip_bad=skip_bad, max_history=config.plug.max_history
    )
    found = estimate_run(config, reader, models=open_models(config))
    tell_read(reader, "train")
    if json_file is not None:
        write_json(json_file, asdict(found))
    click.echo(found.text())


for command in (bench, report, score, lamp, convert, split_command):
    main.add_command(command)
for command in (serve, create_key, erase_user, explain, refill_store, verify_receipt):
    main.add_command(command)
