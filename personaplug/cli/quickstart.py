"""The quickstart: simulated users, real models, the whole way from data to a table of controls.

Since the simulation knows every user's taste or manners, the table can show the best score that anyone could reach.
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
from personaplug.methods import default_rows
from personaplug.run import Models, Run, dated, open_models
from personaplug.training.parts import train

logger = logging.getLogger(__name__)

_SIDE_BY_SIDE = 6
_GENRES = ("musical", "western")
_MIDDLE_SCORE = 3.0
_CHAT_USERS, _CHAT_PROMPTS = 3, 2


@dataclass(frozen=True)
class Demo:
    """What a quickstart shows.

    Attributes:
        users: who is simulated.
        settings: key=value words, so that it takes some minutes on two cores.
        known: what the oracle of the simulation knows.
        shown: the title of what `show` prints.
        show: compares users, given the run, its models and the test samples.
    """

    users: SimulationConfig
    settings: tuple[str, ...]
    known: str
    shown: str
    show: Callable[[Run, Models, Sequence[Sample]], str]


def run_quickstart(
    out: Path, *, demo: Demo | None = None, config_file: Path | None = None, settings: Sequence[str] = ()
) -> Results:
    """Simulate, train, evaluate, print; returns the results. Repeated, it goes on where it stopped.

    Args:
        out: gets `data/`, `run/` and `results.json`.
        demo: RATINGS by default, or CHATS.
        settings: key=value words on top of the demo's own.
    """
    demo = demo or RATINGS
    base = load_config(overrides=(*PACKAGED_MODELS, *demo.settings))
    config = dated(load_config(config_file, overrides=settings, base=base), out / "run")
    logger.info("settings: %s", changed_settings(config))
    data, users = out / "data", demo.users
    models = open_models(config)  # before anything is written
    click.echo(f"1. {users.users} simulated users to learn from and {users.dev_users} others to test on, in {data}")
    write_simulation(users, data)
    run = Run.create(out / "run", config=config, task=load_task(data))
    click.echo(f"2. training a plug for {config.model.llm}, and its control without history")
    train_split = open_dataset(data, "train", task=run.task)
    train(run, train_split, models=models)
    click.echo(
        f"3. the plug, its controls, rivals that cost nothing, and what someone who knew {demo.known} would score"
    )
    reader = open_dataset(data, "dev", task=run.task)
    results = evaluate(
        run,
        reader,
        split="dev",
        methods=default_rows(run.task),
        config=config.evaluation,
        models=models,
        oracle=data / "dev_oracle.json",
        train=train_split,
    )
    write_results(out / "results.json", results)
    click.echo("\n" + terminal_text(results))
    click.echo(f"4. {demo.shown}\n")
    click.echo(demo.show(run, models, list(reader)))
    click.echo(f"\nwritten to {out / 'results.json'}; the run is in {run.folder}")
    return results


def _films_side_by_side(run: Run, models: Models, samples: Sequence[Sample]) -> str:
    """Rate films as the user who prefers musicals most, as the one who prefers westerns most, and as nobody."""
    by_taste = sorted(samples, key=_preference)
    users = (by_taste[-1], by_taste[0])
    tastes = [", ".join(f"{genre}s {_mean_given(user, genre):.1f}" for genre in _GENRES) for user in users]
    lines = [" | ".join([f"{'film, and the mean of the scores that a user gave':<86}", *tastes, "plain"])]
    films = [film for genre in _GENRES for film in [s for s in samples if genre in s.query][: _SIDE_BY_SIDE // 2]]
    for sample in films or samples[:_SIDE_BY_SIDE]:
        answers = [
            generate(run, sample.prompt, history=items, models=models, plain=not items)
            for items in (*(user.history for user in users), ())
        ]
        lines.append(" | ".join([f"{sample.query[:86]:<86}", *(f"{a:^25}" for a in answers[:2]), answers[2]]))
    return "\n".join(lines)


def _preference(sample: Sample) -> float:
    """By how much a user's scores of the first genre are above those of the second."""
    first, second = (_mean_given(sample, genre) for genre in _GENRES)
    return first - second


def _mean_given(sample: Sample, genre: str) -> float:
    """The mean score that a user gave to films of a genre; to all films if the user saw none of it."""
    scores = [(int(item.answer), genre in item.text) for item in sample.history if item.answer]
    given = [score for score, is_of_genre in scores if is_of_genre] or [score for score, _ in scores]
    return sum(given) / len(given) if given else _MIDDLE_SCORE


def _chats_side_by_side(run: Run, models: Models, samples: Sequence[Sample]) -> str:
    """Two prompts, each answered for three users with different manners, and by the plain model."""
    users = _unlike(samples)
    lines = [f"{sample.user_id} has kept answers such as:\n    {_indented(_last_kept(sample))}" for sample in users]
    asked = [sample for sample in samples if sample.user_id not in {user.user_id for user in users}]
    for sample in (asked or list(samples))[:_CHAT_PROMPTS]:
        lines.append(f"\n> {sample.prompt}")
        lines.append(f"plain\n    {_indented(generate(run, sample.prompt, models=models, plain=True))}")
        for user in users:
            answer = generate(run, sample.prompt, history=user.history, models=models)
            lines.append(f"{user.user_id}\n    {_indented(answer)}")
    return "\n".join(lines)


def _unlike(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples of three users whose manners differ most from each other, one after the other."""
    chosen = [samples[0]]
    while len(chosen) < min(_CHAT_USERS, len({sample.user_id for sample in samples})):
        chosen.append(min(samples, key=lambda sample: _likeness(sample, chosen)))
    return chosen


def _likeness(sample: Sample, others: Sequence[Sample]) -> float:
    return max(share_met(_last_kept(sample), _last_kept(other)) for other in others)


def _last_kept(sample: Sample) -> str:
    return next((item.answer for item in reversed(sample.history) if item.answer), "")


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")


RATINGS = Demo(
    SimulationConfig(users=320, dev_users=100, dev_queries_per_user=2, generosity_sd=0.5, taste_sd=1.2),
    ("epochs=2", "validation_limit=64"),
    known="every taste",
    shown="the same films for a lover of musicals and a lover of westerns, which no mean tells apart",
    show=_films_side_by_side,
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
    known="everybody's manners",
    shown="the same questions from three users, answered by the plain model and with their personas",
    show=_chats_side_by_side,
)
