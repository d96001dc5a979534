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
    if options.is_used:
        if prompt is not None or history or copy_head or probabilities or engine != "local" or gguf:
            raise ConfigError(
                "--input takes prompts and histories from Parquet files, and writes all probabilities. Remove "
                "--prompt, --history, --copy-head, --probabilities, --engine and --gguf."
            )
        from personaplug.run import Run

        run = Run.open(run_folder)
        run_offline("generate", run, config_of(run, config_file, settings), options, seed=seed, plain=plain)
        return
    if prompt is None:
        raise ConfigError("Give --prompt for one answer, or --input and --output for the rows of Parquet files.")
    from personaplug import inference
    from personaplug.shared_run import open_runs

    run = inference.run_for(prompt, open_runs(run_folder))
    config = config_of(run, config_file, settings)
    if probabilities and not (run.task.labels and config.evaluation.decoding != "generate"):
        raise ConfigError(f"--probabilities needs scored labels, but answers of {run.task.name} are generated.")
    if engine != "local" or gguf:
        if copy_head:
            raise ConfigError("--copy-head needs --engine local. Remove one of the two options.")
        check_installed()
        from personaplug.serving.config import ServingConfig
        from personaplug.serving.one_answer import answer_once

        response = answer_once(
            run,
            prompt,
            history=history or (),
            config=ServingConfig(store="", engine=engine, gguf=gguf, seed=seed, max_rows=1),
            evaluation=config.evaluation,
            plain=plain,
            probabilities=probabilities,
        )
    else:
        models, head = _models_with_head(run, seed=seed) if copy_head else (None, None)
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


def _models_with_head(run: Run, *, seed: int | None) -> tuple[Models, CopyHead]:
    """Load a run's models and its copy head."""
    from personaplug.llm.copied_answers import check_answers
    from personaplug.run import COPY_HEAD, open_models

    check_answers(run.task)
    seed = run.config.training.seed_or_first(seed)
    run.check_trained(COPY_HEAD, seed=seed)  # before the models are loaded
    models = open_models(run.config)
    return models, run.load_copy_head(models.llm, seed=seed)
