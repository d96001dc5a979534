"""Data sets of simulated users whose best possible score is known. A seed determines everything.

"rating": a score is the user's generosity and taste for the film's genre, plus noise. "style": a user has a casing, a
length, a phrase and an emoji, and sometimes omits the phrase or the emoji. "manners": a user asks about everyday topics
and has manners that a rule can check. "taste-category" and "taste-keywords": a user likes things with pictures, and is
asked for a collection or for keywords. The oracle knows the user but not the noise, so no method can expect a better
score. No query of a user is in the user's history, and train and dev share no user.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from personaplug.data.closed_questions import CLOSED_QUESTIONS
from personaplug.data.lamp_writer import write_lamp
from personaplug.data.manner_wording import INSTRUCTIONS
from personaplug.data.manners import DIMENSIONS
from personaplug.data.records import Sample
from personaplug.data.simulated_manners import MAX_TOPICS, MannerlyUser
from personaplug.data.simulated_tastes import Question, TastefulUser
from personaplug.data.simulated_users import Rater, SimulatedQuery, Writer
from personaplug.data.task import Task
from personaplug.data.tastes import ATTRIBUTES, COLLECTIONS
from personaplug.errors import ConfigError
from personaplug.infra.atomic_io import write_json

SimulatedTask = Literal["rating", "style", "manners", "taste-category", "taste-keywords"]

SIMULATED_TASKS: Mapping[SimulatedTask, Task] = {
    "rating": Task("Simulated_rating", "rating", ("text",), "score", ("mae", "rmse", "accuracy"),
                   labels=("1", "2", "3", "4", "5"), query_after="film: ", max_new_tokens=4),
    "style": Task("Simulated_style", "text", ("text",), "text", ("rouge_1", "rouge_l"),
                  query_after="message: ", max_new_tokens=48),
    "manners": Task("Manners", "chat", ("question", "answer"), "answer",
                    ("manners", "rouge_1", *(f"manners_{dimension}" for dimension in DIMENSIONS)), max_new_tokens=96),
    "taste-category": Task("Tastes_category", "label", ("text",), None, ("accuracy",), labels=COLLECTIONS,
                           query_after="object: ", max_new_tokens=8, image_field="picture"),
    "taste-keywords": Task("Tastes_keywords", "text", ("text",), None,
                           ("keywords", "keywords_pictures", "keywords_texts",
                            *(f"keywords_{attribute}" for attribute in ATTRIBUTES)),
                           query_after="object: ", max_new_tokens=24, image_field="picture"),
}  # fmt: skip

_User = Rater | Writer | MannerlyUser | TastefulUser

_SPLITS = ("train", "dev")
_INSTRUCTED, _CLOSED, _ASKED = "instructed-", "closed", "asked"
_CLOSED_QUESTIONS = 5  # per user, one of each kind
_FEWEST_MANNERS = 4


def splits_of(kind: SimulatedTask) -> tuple[str, ...]:
    """Return the splits of a simulation.

    "manners" has further splits: `instructed-{dimension}` asks the dev users again, with an instruction that
    contradicts their manners in this dimension. `closed` asks them questions with known answers. "taste-keywords" has
    the split `asked`: each of its questions asks for a color that is not the user's.
    """
    further: dict[str, tuple[str, ...]] = {
        "manners": (*(f"{_INSTRUCTED}{dimension}" for dimension in INSTRUCTIONS), _CLOSED),
        "taste-keywords": (_ASKED,),
    }
    return (*_SPLITS, *further.get(kind, ()))


def _task_of(kind: SimulatedTask, split: str) -> Task:
    """Return the task of a split. The main metric of an instructed split is whether the instruction is obeyed."""
    task = SIMULATED_TASKS[kind]
    if split == _CLOSED:
        return CLOSED_QUESTIONS
    if not split.startswith(_INSTRUCTED):
        return task
    dimension = split.removeprefix(_INSTRUCTED)
    return replace(task, name=f"{task.name}_instructed_{dimension}", metrics=(f"manners_{dimension}", "manners"))


@dataclass(frozen=True)
class SimulationConfig:
    """The settings of a simulation.

    Attributes:
        users: the number of users in train; it does not change the individual users.
        min_items: the shortest history; 0 adds cold users, see `cold_share`.
        cold_share: if `min_items` is 0, the share of users with 0, 1 or 2 items; the others have more.
        generosity_sd: rating: the standard deviation between users, in points.
        taste_sd: rating: the standard deviation between a user's genres, in points.
        noise_sd: rating: the standard deviation of the noise, in points.
        habit_chance: style: the probability of the phrase and, independently, of the emoji; at least .5, so that the
            likeliest message has both.
        differing: manners: the dimensions in which users differ; the others have the defaults of `Manners`.
        closed_share: manners: the share of train questions that are closed questions of `TRAINED_KINDS`.
    """

    task: SimulatedTask = "rating"
    users: int = 400
    queries_per_user: int = 4
    dev_users: int = 100
    dev_queries_per_user: int = 2
    min_items: int = 8
    max_items: int = 30
    cold_share: float = 0.05
    generosity_sd: float = 1.0
    taste_sd: float = 0.7
    noise_sd: float = 0.5
    habit_chance: float = 0.9
    differing: tuple[str, ...] = DIMENSIONS
    closed_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("task", self.task in SIMULATED_TASKS, f"one of {', '.join(SIMULATED_TASKS)}")
        for name in ("users", "queries_per_user", "dev_users", "dev_queries_per_user"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("min_items", 0 <= self.min_items <= self.max_items, "from 0 to max_items")
        # The films or messages of a user are drawn until they differ, so a user may have only a fraction of all.
        per_user = self.max_items + max(self.queries_per_user, self.dev_queries_per_user)
        most = MAX_TOPICS if self.task == "manners" else 200
        self._require("max_items", per_user <= most, f"at most {most} together with a user's queries")
        self._require("cold_share", 0 <= self.cold_share <= 1, "a share from 0 to 1")
        self._require("generosity_sd", 0 <= self.generosity_sd < math.inf, "finite and 0 or more")
        self._require("taste_sd", 0 <= self.taste_sd < math.inf, "finite and 0 or more")
        self._require("noise_sd", 0 < self.noise_sd < math.inf, "finite and above 0")
        self._require("habit_chance", 0.5 <= self.habit_chance <= 1, "from 0.5 to 1")
        # With fewer manners, there are too few combinations for dev users and for their rejected answers.
        in_order = self.differing == tuple(name for name in DIMENSIONS if name in self.differing)
        expected = f"{_FEWEST_MANNERS} or more of {', '.join(DIMENSIONS)}, in this order"
        self._require("differing", in_order and len(self.differing) >= _FEWEST_MANNERS, expected)
        is_share = 0 <= self.closed_share < 1 and (self.task == "manners" or not self.closed_share)
        self._require("closed_share", is_share, "a share from 0 to below 1, and 0 unless the task is 'manners'")
        self._require("seed", self.seed >= 0, "0 or more")

    def _require(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ConfigError(f"{name} should be {expected}, found {getattr(self, name)!r}.")


@dataclass(frozen=True, repr=False)
class Simulation:
    """One simulated split.

    Attributes:
        oracle: the oracle's predictions by point estimate and sample id. rating: "mode" (the likeliest score, best
            for accuracy) and "median" (best for MAE); style: "mode" (the likeliest message).
        expected: the mean expected score by point estimate and metric.
        probabilities: rating: the true probability of each label by sample id.
    """

    task: Task
    samples: tuple[Sample, ...]
    oracle: Mapping[str, Mapping[str, str]]
    expected: Mapping[str, Mapping[str, float]]
    probabilities: Mapping[str, tuple[float, ...]]


def simulate(config: SimulationConfig, split: str) -> Simulation:
    """Simulate the users of a split; `splits_of` returns the splits of a task."""
    if split not in splits_of(config.task):
        raise ConfigError(f"A simulation has the splits {', '.join(splits_of(config.task))}; found {split!r}.")
    users = config.users if split == "train" else config.dev_users
    queries = [query for user in range(users) for query in _queries(config, split, user)]
    estimates = queries[0].expected if queries else {}
    return Simulation(
        task=_task_of(config.task, split),
        samples=tuple(query.sample for query in queries),
        oracle={estimate: {query.sample.id: query.oracle[estimate] for query in queries} for estimate in estimates},
        expected={
            estimate: {
                metric: math.fsum(query.expected[estimate][metric] for query in queries) / len(queries)
                for metric in each
            }
            for estimate, each in estimates.items()
        },
        probabilities={query.sample.id: query.probabilities for query in queries if query.probabilities},
    )


def write_simulation(config: SimulationConfig, folder: str | Path) -> None:
    """Write train and dev in LaMP's layout, with the oracle's predictions and its expected scores.

    `{split}_oracle.json` has the predictions in the format of an outputs file; for ratings, these are the likeliest
    scores, and `{split}_oracle_median.json` has the medians. `oracle.json` has the expected scores by split and point
    estimate.
    Each further split becomes the dev split of another folder, such as `{folder}-closed`.
    """
    folder = Path(folder)
    _write_splits(config, folder, {split: split for split in _SPLITS})
    for split in splits_of(config.task)[len(_SPLITS) :]:
        _write_splits(config, folder.with_name(f"{folder.name}-{split}"), {"dev": split})


def _write_splits(config: SimulationConfig, folder: Path, splits: Mapping[str, str]) -> None:
    """Write simulated splits; `splits` maps the name in the folder to the name in the simulation."""
    expected = {}
    for name, split in splits.items():
        simulation = simulate(config, split)
        if not simulation.samples:  # with few users, no instruction may contradict their manners
            return
        write_lamp(simulation.samples, folder, name, task=simulation.task)
        _write_oracle(simulation, folder, name)
        expected[name] = {estimate: dict(scores) for estimate, scores in simulation.expected.items()}
    write_json(folder / "oracle.json", {"task": simulation.task.name, **expected})


def _write_oracle(simulation: Simulation, folder: Path, split: str) -> None:
    for estimate, predictions in simulation.oracle.items():
        ending = "" if estimate == "mode" else f"_{estimate}"
        golds = [{"id": sample_id, "output": output} for sample_id, output in predictions.items()]
        write_json(folder / f"{split}_oracle{ending}.json", {"task": simulation.task.name, "golds": golds})


def _queries(config: SimulationConfig, split: str, user: int) -> list[SimulatedQuery]:
    part = "train" if split == "train" else "dev"
    rng = np.random.default_rng([config.seed, _SPLITS.index(part), user])
    simulated = _drawn_user(config, rng, part)
    name, items = f"{part}-{user:04d}", _drawn_items(config, rng)
    if isinstance(simulated, TastefulUser) and split == _ASKED:
        return simulated.asked(name, rng, items=items, queries=config.dev_queries_per_user)
    if isinstance(simulated, MannerlyUser) and split.startswith(_INSTRUCTED):
        return simulated.instructed(name, rng, items=items, dimension=split.removeprefix(_INSTRUCTED))
    if isinstance(simulated, MannerlyUser) and split == _CLOSED:
        return simulated.closed(name, rng, items=items, questions=_CLOSED_QUESTIONS)
    count = config.queries_per_user if part == "train" else config.dev_queries_per_user
    queries = simulated.queries(name, rng, items=items, queries=count)
    if isinstance(simulated, MannerlyUser) and part == "train" and config.closed_share:
        return simulated.with_closed(queries, rng, share=config.closed_share)
    return queries


def _drawn_user(config: SimulationConfig, rng: np.random.Generator, part: str) -> _User:
    if config.task == "rating":
        sds = {"generosity_sd": config.generosity_sd, "taste_sd": config.taste_sd, "noise_sd": config.noise_sd}
        return Rater.drawn(rng, **sds)
    if config.task == "style":
        return Writer.drawn(rng, habit_chance=config.habit_chance)
    if config.task == "manners":
        return MannerlyUser.drawn(rng, seed=config.seed, is_dev=part == "dev", differing=config.differing)
    question: Question = "collection" if config.task == "taste-category" else "keywords"
    return TastefulUser.drawn(rng, question=question, is_dev=part == "dev", seed=config.seed)


def _drawn_items(config: SimulationConfig, rng: np.random.Generator) -> int:
    is_cold = rng.random() < config.cold_share
    low, high = config.min_items, config.max_items
    if low == 0:
        low, high = (0, min(2, high)) if is_cold else (min(3, high), high)
    return int(rng.integers(low, high + 1))
