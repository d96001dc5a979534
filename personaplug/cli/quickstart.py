"""The quickstart: simulated users with known tastes, real models, the whole way from data to a table of controls.

Since the simulation knows every user's taste, the table can show the best score that anyone could reach.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import click

from personaplug.analysis.results_file import Results, write_results
from personaplug.analysis.terminal import terminal_text
from personaplug.config_parsing import changed_settings, load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import Sample
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.evaluation.evaluator import evaluate
from personaplug.inference import generate
from personaplug.infra.model_hub import PACKAGED_MODELS
from personaplug.methods import find_method
from personaplug.methods.registry import DEFAULT
from personaplug.run import Models, Run, dated, open_models
from personaplug.training.parts import train

logger = logging.getLogger(__name__)

USERS = SimulationConfig(users=320, dev_users=100, dev_queries_per_user=2)
# Some minutes on two cores: small models from packages, which need no network, and fewer passes than by default.
SETTINGS = (*PACKAGED_MODELS, "epochs=2", "validation_limit=64")
_SIDE_BY_SIDE = 6
_TELLING = 8  # items of history from which a user's mean score says something


def run_quickstart(
    out: Path,
    *,
    users: SimulationConfig = USERS,
    config_file: Path | None = None,
    settings: Sequence[str] = (),
) -> Results:
    """Simulate, train, evaluate, print; returns the results. Repeated, it goes on where it stopped.

    Args:
        out: gets `data/`, `run/` and `results.json`.
        users: who is simulated.
        settings: key=value words on top of the quickstart's own.
    """
    config = load_config(config_file, overrides=settings, base=load_config(overrides=SETTINGS))
    config = dated(config, out / "run")
    logger.info("settings: %s", changed_settings(config))
    data = out / "data"
    models = open_models(config)  # before anything is written
    click.echo(f"1. {users.users} simulated users to learn from and {users.dev_users} others to test on, in {data}")
    write_simulation(users, data)
    run = Run.create(out / "run", config=config, task=load_task(data))
    click.echo(f"2. training a plug for {config.model.llm}, and its control without history")
    train(run, open_dataset(data, "train", task=run.task), models=models)
    click.echo("3. the plug, its controls, and what someone who knew every taste would score")
    reader = open_dataset(data, "dev", task=run.task)
    results = evaluate(
        run,
        reader,
        split="dev",
        methods=[find_method(name) for name in DEFAULT],
        config=config.evaluation,
        models=models,
        oracle=data / "dev_oracle.json",
    )
    write_results(out / "results.json", results)
    click.echo("\n" + terminal_text(results))
    click.echo("4. the same films for two users, as the model with their personas rates them\n")
    click.echo(_side_by_side(run, models, samples=list(reader)))
    click.echo(f"\nwritten to {out / 'results.json'}; the run is in {run.folder}")
    return results


def _side_by_side(run: Run, models: Models, *, samples: Sequence[Sample]) -> str:
    """Films as rows, the kindest and the strictest test user as columns."""
    strict, kind = _extremes(samples)
    head = [
        f"{'film':<86}",
        f"{_mean_given(strict):.1f} given so far",
        f"{_mean_given(kind):.1f} given so far",
        "plain",
    ]
    lines = [" | ".join(head)]
    for sample in samples[:: max(1, len(samples) // _SIDE_BY_SIDE)][:_SIDE_BY_SIDE]:
        answers = [
            generate(run, sample.prompt, history=items, models=models, plain=not items)
            for items in (strict.history, kind.history, ())
        ]
        lines.append(" | ".join([f"{sample.query[:86]:<86}", *(f"{a:^16}" for a in answers[:2]), answers[2]]))
    return "\n".join(lines)


def _extremes(samples: Sequence[Sample]) -> tuple[Sample, Sample]:
    """The strictest and the kindest user among those with a history long enough to tell, or else the longest."""
    enough = min(_TELLING, max(len(sample.history) for sample in samples))
    by_mean = sorted((s for s in samples if len(s.history) >= enough), key=_mean_given)
    return by_mean[0], by_mean[-1]


def _mean_given(sample: Sample) -> float:
    given = [int(item.answer) for item in sample.history if item.answer]
    return sum(given) / len(given) if given else float("nan")
