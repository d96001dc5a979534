"""The quickstart: simulate users, train a plug with real models, and compare it with its controls.

The simulation knows every user's taste or manners, so the table can include the best possible score.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from personaplug.analysis.results_file import Results, write_results
from personaplug.analysis.terminal import terminal_text
from personaplug.config_parsing import changed_settings, load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.manners import share_met
from personaplug.data.records import Sample
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.evaluation.evaluator import evaluate
from personaplug.inference import generate
from personaplug.infra.model_hub import PACKAGED_MODELS
from personaplug.infra.trackers import check_trackers
from personaplug.methods import default_rows
from personaplug.run import Models, Run, dated, open_models
from personaplug.training.parts import train, trained_counting

logger = logging.getLogger(__name__)

_SIDE_BY_SIDE = 6
_GENRES = ("musical", "western")
_MIDDLE_SCORE = 3.0
_CHAT_USERS, _CHAT_PROMPTS = 3, 2


@dataclass(frozen=True)
class Demo:
    """The data and settings of a quickstart.

    Attributes:
        users: settings of the simulation.
        settings: key=value words that reduce the time to some minutes on two cores.
        oracle_knows: user trait that the oracle of the simulation knows.
        comparison_title: title of the text from `compare`.
        compare: compares users side by side, from the run, its models and the test samples.
    """

    users: SimulationConfig
    settings: tuple[str, ...]
    oracle_knows: str
    comparison_title: str
    compare: Callable[[Run, Models, Sequence[Sample]], str]


def run_quickstart(
    out: Path, *, demo: Demo | None = None, config_file: Path | None = None, settings: Sequence[str] = ()
) -> Results:
    """Simulate, train, evaluate and print; return the results. A repeated call resumes an interrupted one.

    Args:
        out: folder for `data/`, `run/` and `results.json`.
        demo: RATINGS (default) or CHATS.
        settings: key=value words that override the settings of the demo.
    """
    demo = demo or RATINGS
    base = load_config(overrides=(*PACKAGED_MODELS, *demo.settings))
    config = dated(load_config(config_file, overrides=settings, base=base), out / "run")
    logger.info("settings: %s", changed_settings(config))
    data, users = out / "data", demo.users
    check_trackers(config.training.report_to)
    models = open_models(config)  # before anything is written
    click.echo(f"1. simulate {users.users} users for training and {users.dev_users} others for evaluation, in {data}")
    write_simulation(users, data)
    run = Run.create(out / "run", config=config, task=load_task(data))
    click.echo(f"2. train a plug for {config.model.llm}, and its control without history")
    train_split = open_dataset(data, "train", task=run.task)
    train(run, train_split, models=models)
    click.echo(f"3. evaluate the plug, its controls, simple baselines, and an oracle that knows {demo.oracle_knows}")
    reader = open_dataset(data, "dev", task=run.task)
    results = evaluate(
        run,
        reader,
        split="dev",
        methods=default_rows(run.task, trained=trained_counting(run)),
        config=config.evaluation,
        models=models,
        oracle=data / "dev_oracle.json",
        train=train_split,
    )
    write_results(out / "results.json", results)
    click.echo("\n" + terminal_text(results))
    click.echo(f"4. {demo.comparison_title}\n")
    click.echo(demo.compare(run, models, list(reader)))
    click.echo(f"\nwritten to {out / 'results.json'}; the run is in {run.folder}")
    click.echo(
        "to see the personas (after pip install -e '.[serve]'): "
        f"personaplug serve --run {run.folder} --store {out / 'users.db'} --load {data} --keep-text"
    )
    if demo is RATINGS:
        click.echo("for answers in each user's manner: personaplug quickstart --chat")
    return results


def _films_side_by_side(run: Run, models: Models, samples: Sequence[Sample]) -> str:
    """Rate films for the biggest fan of musicals, for the biggest fan of westerns, and with the plain model."""
    by_taste = sorted(samples, key=_preference)
    users = (by_taste[-1], by_taste[0])
    tastes = [", ".join(f"{genre}s {_mean_score(user, genre):.1f}" for genre in _GENRES) for user in users]
    lines = [" | ".join([f"{'film, and the mean score of each user per genre':<86}", *tastes, "plain"])]
    films = [film for genre in _GENRES for film in [s for s in samples if genre in s.query][: _SIDE_BY_SIDE // 2]]
    for sample in films or samples[:_SIDE_BY_SIDE]:
        answers = [
            generate(run, sample.prompt, history=items, models=models, plain=not items)
            for items in (*(user.history for user in users), ())
        ]
        lines.append(" | ".join([f"{sample.query[:86]:<86}", *(f"{a:^25}" for a in answers[:2]), answers[2]]))
    return "\n".join(lines)


def _preference(sample: Sample) -> float:
    """Return the user's mean score of the first genre minus the mean score of the second genre."""
    first, second = (_mean_score(sample, genre) for genre in _GENRES)
    return first - second


def _mean_score(sample: Sample, genre: str) -> float:
    """Return the user's mean score of the films of a genre, or of all films if none is of this genre."""
    rated = [(int(item.answer), genre in item.text) for item in sample.history if item.answer]
    scores = [score for score, is_of_genre in rated if is_of_genre] or [score for score, _ in rated]
    return sum(scores) / len(scores) if scores else _MIDDLE_SCORE


def _chats_side_by_side(run: Run, models: Models, samples: Sequence[Sample]) -> str:
    """Answer two prompts for three users with different manners, and with the plain model."""
    users = _dissimilar_users(samples)
    lines = [f"{user.user_id} accepted answers such as:\n    {_indented(_last_answer(user))}" for user in users]
    other_users = [sample for sample in samples if sample.user_id not in {user.user_id for user in users}]
    for sample in (other_users or list(samples))[:_CHAT_PROMPTS]:
        lines.append(f"\n> {sample.prompt}")
        lines.append(f"plain\n    {_indented(generate(run, sample.prompt, models=models, plain=True))}")
        for user in users:
            answer = generate(run, sample.prompt, history=user.history, models=models)
            lines.append(f"{user.user_id}\n    {_indented(answer)}")
    return "\n".join(lines)


def _dissimilar_users(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples of three users with different manners; each next user is the least similar to those before."""
    users = [samples[0]]
    while len(users) < min(_CHAT_USERS, len({sample.user_id for sample in samples})):
        users.append(min(samples, key=lambda sample: _similarity(sample, users)))
    return users


def _similarity(sample: Sample, others: Sequence[Sample]) -> float:
    return max(share_met(_last_answer(sample), _last_answer(other)) for other in others)


def _last_answer(sample: Sample) -> str:
    return next((item.answer for item in reversed(sample.history) if item.answer), "")


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")


RATINGS = Demo(
    SimulationConfig(users=160, dev_users=80, dev_queries_per_user=2, generosity_sd=0.5, taste_sd=1.2),
    ("epochs=2", "validation_limit=64"),
    oracle_knows="every user's taste",
    comparison_title="rate the same films for a fan of musicals and a fan of westerns",
    compare=_films_side_by_side,
)
CHATS = Demo(
    SimulationConfig(
        task="manners",
        differing=("length", "layout", "emoji", "greeting"),
        users=120,
        dev_users=24,
        dev_queries_per_user=1,
        max_items=16,
    ),
    ("epochs=2", "batch_size=8", "validation_limit=24", "num_beams=1", "evaluation_batch_size=12"),
    oracle_knows="every user's manners",
    comparison_title="answer the same questions with the plain model and for three users",
    compare=_chats_side_by_side,
)
