"""The command `generate`, which answers one prompt or, for Parquet files, all rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from personaplug.cli.offline_options import OfflineOptions, offline_options, run_offline
from personaplug.cli.options import FILE, config_of, engine_option, gguf_option, run_option, seed_option, with_settings
from personaplug.cli.serving_commands import check_installed
from personaplug.errors import ConfigError

if TYPE_CHECKING:
    from personaplug.config import Config, EvaluationConfig
    from personaplug.inference import Answer
    from personaplug.llm.copy_head import CopyHead
    from personaplug.run import Models, Run


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
@engine_option
@gguf_option
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
    engine: str,
    gguf: str,
    probabilities: bool,
    config_file: Path | None,
    settings: tuple[str, ...],
    **offline: Any,
) -> None:
    """Answer one prompt for a user with the given history, or all rows of Parquet files.

    With --engine, the answer is decoded without beams.

    With --input and --output, each row has the columns prompt and history (or --store with user_id), and may have an
    id. docs/offline.md describes input and output.
    """
    options = OfflineOptions(**offline)
    if options.is_used(without=("prompt", "history", "copy_head", "engine", "gguf", "probabilities")):
        _answer_rows(run_folder, options, seed=seed, plain=plain, config_file=config_file, settings=settings)
        return
    if prompt is None:
        raise ConfigError("Give --prompt for one answer, or --input and --output for the rows of Parquet files.")
    from personaplug import inference
    from personaplug.shared_run import open_runs

    run = inference.run_for(prompt, open_runs(run_folder))
    with_engine = engine != "local" or bool(gguf)
    config = config_of(run, config_file, settings, base=("num_beams=1",) if with_engine else ())
    _check(run, config, with_engine=with_engine, copy_head=copy_head, probabilities=probabilities)
    ask: dict[str, Any] = {"prompt": prompt, "history": history or (), "seed": seed, "plain": plain}
    ask["evaluation"] = config.evaluation
    if with_engine:
        response = _answer_with_engine(run, **ask, engine=engine, gguf=gguf, probabilities=probabilities)
    else:
        response = _answer_here(run, **ask, copy_head=copy_head)
    if probabilities and response.distribution is not None:
        click.echo(json.dumps({"answer": response, **response.distribution.to_json()}, ensure_ascii=False))
    else:
        click.echo(response)


def _answer_rows(
    run_folder: Path,
    options: OfflineOptions,
    *,
    seed: int | None,
    plain: bool,
    config_file: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Answer all rows of Parquet files."""
    from personaplug.run import Run

    run = Run.open(run_folder)
    run_offline("generate", run, config_of(run, config_file, settings), options, seed=seed, plain=plain)


def _check(run: Run, config: Config, *, with_engine: bool, copy_head: bool, probabilities: bool) -> None:
    """Refuse what the task or the engine does not support."""
    beams = config.evaluation.num_beams
    if probabilities and not (run.task.labels and config.evaluation.decoding != "generate"):
        raise ConfigError(f"--probabilities needs scored labels, but answers of {run.task.name} are generated.")
    if with_engine and copy_head:
        raise ConfigError("--copy-head needs --engine local. Remove one of the two options.")
    if with_engine and beams > 1:
        raise ConfigError(f"--engine decodes without beams; found num_beams={beams}. Set num_beams=1.")


def _answer_with_engine(
    run: Run,
    *,
    prompt: str,
    history: Path | tuple[()],
    evaluation: EvaluationConfig,
    seed: int | None,
    plain: bool,
    engine: str,
    gguf: str,
    probabilities: bool,
) -> Answer:
    """Answer one prompt with an engine of the server."""
    check_installed()
    from personaplug.serving.config import ServingConfig
    from personaplug.serving.one_answer import answer_once

    config = ServingConfig(store="", engine=engine, gguf=gguf, seed=seed, max_rows=1)
    return answer_once(
        run, prompt, history=history, config=config, evaluation=evaluation, plain=plain, probabilities=probabilities
    )


def _answer_here(
    run: Run,
    *,
    prompt: str,
    history: Path | tuple[()],
    evaluation: EvaluationConfig,
    seed: int | None,
    plain: bool,
    copy_head: bool,
) -> Answer:
    """Answer one prompt with the models of the run."""
    from personaplug import inference

    models, head = _models_with_head(run, seed=seed) if copy_head else (None, None)
    return inference.generate(
        run, prompt, history=history, models=models, seed=seed, plain=plain, copy_head=head, config=evaluation
    )


def _models_with_head(run: Run, *, seed: int | None) -> tuple[Models, CopyHead]:
    """Load a run's models and its copy head."""
    from personaplug.llm.copied_answers import check_answers
    from personaplug.run import COPY_HEAD, open_models

    check_answers(run.task)
    seed = run.config.training.seed_or_first(seed)
    run.check_trained(COPY_HEAD, seed=seed)  # before the models are loaded
    models = open_models(run.config)
    return models, run.load_copy_head(models.llm, seed=seed)
