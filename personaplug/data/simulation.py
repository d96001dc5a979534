"""Users whose tastes are known, so that the best possible score is known too. Everything comes from a seed.

Two tasks. "rating": a user is more or less kind, and likes some film genres better than others; a score is
that plus noise. "style": a user writes in a casing, at a length, with a phrase and an emoji of their own, and
forgets the latter two now and then. The oracle knows the user's tastes and not the noise: what it scores is
what any method could reach at most, with an endless history. The items of a user are no queries of that user,
and train and dev share no user.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from personaplug.data.lamp_writer import write_lamp
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError
from personaplug.infra.atomic_io import write_json

SimulatedTask = Literal["rating", "style"]

SIMULATED_TASKS: Mapping[str, Task] = MappingProxyType({
    "rating": Task("Simulated_rating", "rating", ("text",), "score", ("mae", "rmse", "accuracy"),
                   labels=("1", "2", "3", "4", "5"), query_after="film: ", max_new_tokens=4),
    "style": Task("Simulated_style", "text", ("text",), "text", ("rouge_1", "rouge_l"),
                  query_after="message: ", max_new_tokens=48),
})  # fmt: skip
"""The two tasks. ROUGE sees neither casing nor emoji, so `expected` has the exact match beside it."""

_RATING_INPUT = (
    "Which score from 1 to 5 would this user give to the following film? just answer with 1, 2, 3, 4, or 5 "
    "without further explanation. film: "
)
_STYLE_INPUT = "Write the following message as this user would write it. message: "


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    Attributes:
        task: "rating" or "style".
        users: how many users train has.
        queries_per_user: how many queries each of them has.
        dev_users: how many users dev has, all others than train's.
        dev_queries_per_user: how many queries each of them has.
        min_items: the least history; 0 lets some users come cold, see `cold_share`.
        max_items: the greatest history.
        cold_share: where `min_items` is 0, the share of users with 0, 1 or 2 items; the others have more.
        generosity_sd: rating: how much users differ in kindness, in points.
        taste_sd: rating: how much genres differ for a user, in points.
        noise_sd: rating: what even the oracle does not know, in points.
        habit_chance: style: how often a user's phrase, and independently the emoji, appears; from .5, so that
            the likeliest message has both.
        seed: the same seed and settings make the same data; user k is the same however many users there are.

    Raises:
        ConfigError: if a setting is out of range.
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
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        _require(self.task in get_args(SimulatedTask), "task", "'rating' or 'style'", self.task)
        for name in ("users", "queries_per_user", "dev_users", "dev_queries_per_user"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(0 <= self.min_items <= self.max_items, "min_items", "from 0 to max_items", self.min_items)
        # Distinct films and messages are drawn at random until there are enough, so far fewer than there are.
        per_user = self.max_items + max(self.queries_per_user, self.dev_queries_per_user)
        _require(per_user <= 200, "max_items", "at most 200 together with a user's queries", self.max_items)
        _require(0 <= self.cold_share <= 1, "cold_share", "a share from 0 to 1", self.cold_share)
        for name in ("generosity_sd", "taste_sd"):
            _require(0 <= getattr(self, name) < math.inf, name, "finite and 0 or more", getattr(self, name))
        _require(0 < self.noise_sd < math.inf, "noise_sd", "finite and above 0", self.noise_sd)
        _require(0.5 <= self.habit_chance <= 1, "habit_chance", "from 0.5 to 1", self.habit_chance)
        _require(self.seed >= 0, "seed", "0 or more", self.seed)


@dataclass(frozen=True, repr=False)
class Simulation:
    """One simulated split.

    Attributes:
        task: what is asked.
        samples: the users' queries, user by user.
        oracle: for each way of deciding, the oracle's prediction by sample id. rating: "mode" (the likeliest
            score: the best accuracy there is) and "median" (the best MAE there is); style: "mode" (the
            likeliest message).
        expected: for each way of deciding, the mean over these samples of the score to expect over the noise.
            rating: "accuracy", "mae"; style: "exact", "rouge_1", "rouge_l".
        chances: rating: by sample id, the true chance of each label.
    """

    task: Task
    samples: tuple[Sample, ...]
    oracle: Mapping[str, Mapping[str, str]]
    expected: Mapping[str, Mapping[str, float]]
    chances: Mapping[str, tuple[float, ...]]


def simulate(config: SimulationConfig, split: str) -> Simulation:
    """Simulate the users of "train" or "dev".

    Raises:
        ConfigError: if there is no such split.
    """
    if split not in ("train", "dev"):
        raise ConfigError(f"There are the simulated splits 'train' and 'dev'; found {split!r}.")
    users, queries = (
        (config.users, config.queries_per_user) if split == "train" else (config.dev_users, config.dev_queries_per_user)
    )
    draw = _rated if config.task == "rating" else _styled
    drawn = [query for user in range(users) for query in draw(config, split, user, queries)]
    return _gathered(SIMULATED_TASKS[config.task], drawn)


def write_simulation(config: SimulationConfig, folder: str | Path) -> None:
    """Write train and dev as a folder in LaMP's layout, with what the oracle answers and may expect.

    Beside LaMP's files and task.json: `{split}_oracle.json` (predictions as an outputs file; for ratings the
    likeliest scores, and the medians in `{split}_oracle_median.json`) and `oracle.json` (the expected scores
    by split and way of deciding).

    Raises:
        RunConflict: if the folder holds another task.
        StorageError: if the disk is full or not writable.
    """
    folder = Path(folder)
    expected = {}
    for split in ("train", "dev"):
        simulation = simulate(config, split)
        write_lamp(simulation.samples, folder, split, task=simulation.task)
        for decision, predictions in simulation.oracle.items():
            ending = "" if decision == "mode" else f"_{decision}"
            write_json(folder / f"{split}_oracle{ending}.json", _as_outputs(simulation.task, predictions))
        expected[split] = {decision: dict(scores) for decision, scores in simulation.expected.items()}
    write_json(folder / "oracle.json", {"task": SIMULATED_TASKS[config.task].name, **expected})


def _as_outputs(task: Task, predictions: Mapping[str, str]) -> dict[str, object]:
    return {
        "task": task.name,
        "golds": [{"id": name, "output": output} for name, output in predictions.items()],
    }


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{name} should be {expected}, found {found!r}.")


# ---- what both share


@dataclass(frozen=True, repr=False)
class _Query:
    sample: Sample
    oracle: Mapping[str, str]
    expected: Mapping[str, Mapping[str, float]]
    chances: tuple[float, ...] = ()


def _gathered(task: Task, drawn: list[_Query]) -> Simulation:
    first = drawn[0]
    return Simulation(
        task=task,
        samples=tuple(query.sample for query in drawn),
        oracle={way: {query.sample.id: query.oracle[way] for query in drawn} for way in first.oracle},
        expected={
            way: {metric: math.fsum(query.expected[way][metric] for query in drawn) / len(drawn) for metric in scores}
            for way, scores in first.expected.items()
        },
        chances={query.sample.id: query.chances for query in drawn if query.chances},
    )


def _user_rng(config: SimulationConfig, split: str, user: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, ("train", "dev").index(split), user])


def _item_count(config: SimulationConfig, rng: np.random.Generator) -> int:
    is_cold = rng.random() < config.cold_share
    if config.min_items > 0:
        low, high = config.min_items, config.max_items
    else:
        low, high = (0, min(2, config.max_items)) if is_cold else (min(3, config.max_items), config.max_items)
    return int(rng.integers(low, high + 1))


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


# ---- ratings

_GENRES = (
    "comedy", "horror film", "western", "romance", "science fiction film", "documentary", "war film",
    "musical",
)  # fmt: skip
_MOODS = (
    "quiet", "loud", "slow", "fast", "long", "short", "colourful", "grey", "modest", "grand", "late",
    "late", "low-budget", "star-studded", "handmade", "glossy",
)  # fmt: skip
_HEROES = (
    "two sisters", "a retired teacher", "a young cook", "a lost brother", "three neighbours",
    "a night nurse", "a stubborn farmer", "an old sailor", "a new mayor", "a travelling salesman",
    "a chess player", "a bus driver", "twin cousins", "a piano tuner", "a runaway clerk",
    "a lighthouse keeper",
)  # fmt: skip
_PLOTS = (
    "who found a map", "who missed a train", "who inherited a house", "who shared a secret",
    "who opened a shop", "who crossed a desert", "who lost a bet", "who searched for a letter",
    "who waited for a storm", "who repaired a bridge", "who met again", "who changed their name",
)  # fmt: skip
_PLACES = (
    "in a small harbour town", "in the mountains", "on an island", "in a crowded city",
    "by a wide river", "at a border post", "in an empty hotel", "on a night train", "in a hot summer",
    "during a long winter", "near the old mine", "in a village school",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class _Taste:
    generosity: float
    genres: tuple[float, ...]
    noise_sd: float

    def score(self, genre: int, rng: np.random.Generator) -> int:
        raw = 3 + self.generosity + self.genres[genre] + rng.normal(0, self.noise_sd)
        return int(np.clip(math.floor(raw + 0.5), 1, 5))

    def chances(self, genre: int) -> tuple[float, ...]:
        """The chance of each score: the noise's share between the two points where rounding turns."""
        noise = NormalDist(3 + self.generosity + self.genres[genre], self.noise_sd)
        below = [0.0, *(noise.cdf(score + 0.5) for score in range(1, 5)), 1.0]
        return tuple(high - low for low, high in pairwise(below))


def _rated(config: SimulationConfig, split: str, user: int, queries: int) -> list[_Query]:
    rng = _user_rng(config, split, user)
    taste = _Taste(
        generosity=float(rng.normal(0, config.generosity_sd)),
        genres=tuple(float(value) for value in rng.normal(0, config.taste_sd, len(_GENRES))),
        noise_sd=config.noise_sd,
    )
    count, name = _item_count(config, rng), f"{split}-{user:04d}"
    films = _films(rng, count + queries)
    history = tuple(
        HistoryItem(f"{name}-i{place}", (("text", film), ("score", str(taste.score(genre, rng)))), "score")
        for place, (film, genre) in enumerate(films[:count])
    )
    return [
        _rated_query(f"{name}-q{place}", name, film, taste.chances(genre), taste.score(genre, rng), history)
        for place, (film, genre) in enumerate(films[count:])
    ]


def _films(rng: np.random.Generator, count: int) -> list[tuple[str, int]]:
    films: dict[str, int] = {}
    while len(films) < count:
        genre = int(rng.integers(len(_GENRES)))
        hero, plot, place = _pick(rng, _HEROES), _pick(rng, _PLOTS), _pick(rng, _PLACES)
        films[f"A {_pick(rng, _MOODS)} {_GENRES[genre]} about {hero} {plot} {place}."] = genre
    return list(films.items())


def _rated_query(
    name: str, user: str, film: str, chances: tuple[float, ...], score: int, history: tuple[HistoryItem, ...]
) -> _Query:
    ways = {"mode": _mode(chances), "median": _median(chances)}
    return _Query(
        sample=Sample(name, user, _RATING_INPUT + film, film, str(score), history),
        oracle={way: str(guess) for way, guess in ways.items()},
        expected={way: _rating_scores(chances, guess) for way, guess in ways.items()},
        chances=chances,
    )


def _mode(chances: tuple[float, ...]) -> int:
    return 1 + max(range(len(chances)), key=chances.__getitem__)


def _median(chances: tuple[float, ...]) -> int:
    return 1 + next(place for place in range(len(chances)) if math.fsum(chances[: place + 1]) >= 0.5)


def _rating_scores(chances: tuple[float, ...], guess: int) -> dict[str, float]:
    error = math.fsum(chance * abs(score - guess) for score, chance in enumerate(chances, 1))
    return {"accuracy": chances[guess - 1], "mae": error}


# ---- style

_SUBJECTS = (
    "the meeting", "the delivery", "the dinner", "the lesson", "the concert", "the visit", "the repair",
    "the interview", "the game", "the trip", "the party", "the appointment", "the workshop", "the exam",
    "the breakfast", "the rehearsal", "the tour", "the auction", "the picnic", "the parade",
    "the lecture", "the tournament", "the ceremony", "the excursion",
)  # fmt: skip
_NEWS = (
    "is moved to friday", "starts at nine", "takes two hours", "is cancelled this week",
    "will be outside", "needs one more person", "went very well", "is open to everyone",
    "costs ten euros", "ends before lunch", "is in the other building", "was shorter than planned",
    "begins an hour later", "has a new date", "is free this year", "is almost ready", "will be filmed",
    "is fully booked", "needs more chairs", "takes place online",
)  # fmt: skip
_DETAILS = (
    "because the room is being painted", "and nobody has to bring anything",
    "so please tell the others", "as the weather looks good", "since the first plan did not work",
    "and the details follow tomorrow", "because two people are away", "so there is no need to hurry",
    "and there will be tea", "as we agreed last month",
)  # fmt: skip
_PHRASES = (
    "honestly", "you know", "good news", "just saying", "for the record", "by the way", "well then",
    "listen",
)  # fmt: skip
_EMOJI = ("", "😀", "🎉", "🙏", "🚀", "😅", "🌻", "👍")
_CASINGS = ("lower", "upper", "title", "sentence")


@dataclass(frozen=True, repr=False)
class _Style:
    casing: str
    is_long: bool
    phrase: str
    emoji: str

    def write(self, core: str, detail: str, *, with_phrase: bool = True, with_emoji: bool = True) -> str:
        words = [self.phrase + ","] if with_phrase else []
        words += [core, detail] if self.is_long else [core]
        text = _cased(" ".join(words), self.casing)
        return f"{text} {self.emoji}" if self.emoji and with_emoji else text


def _cased(text: str, casing: str) -> str:
    if casing == "title":
        return " ".join(word.capitalize() for word in text.split(" "))
    return {"lower": text.lower, "upper": text.upper, "sentence": text.capitalize}[casing]()


def _styled(config: SimulationConfig, split: str, user: int, queries: int) -> list[_Query]:
    rng = _user_rng(config, split, user)
    style = _Style(_pick(rng, _CASINGS), bool(rng.integers(2)), _pick(rng, _PHRASES), _pick(rng, _EMOJI))
    count, name = _item_count(config, rng), f"{split}-{user:04d}"
    messages = _messages(rng, count + queries)
    written = [_with_habits(style, message, config.habit_chance, rng) for message in messages]
    history = tuple(
        HistoryItem(f"{name}-i{place}", (("text", text),), "text") for place, text in enumerate(written[:count])
    )
    return [
        _styled_query(f"{name}-q{place}", name, style, messages[count + place], text, history, config.habit_chance)
        for place, text in enumerate(written[count:])
    ]


def _messages(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    # Told apart by what is left of them in short: two messages of a user then never end as the same text.
    messages: dict[str, str] = {}
    while len(messages) < count:
        messages[f"{_pick(rng, _SUBJECTS)} {_pick(rng, _NEWS)}"] = _pick(rng, _DETAILS)
    return list(messages.items())


def _with_habits(style: _Style, message: tuple[str, str], chance: float, rng: np.random.Generator) -> str:
    with_phrase, with_emoji = (bool(draw < chance) for draw in rng.random(2))
    return style.write(*message, with_phrase=with_phrase, with_emoji=with_emoji)


def _styled_query(
    name: str,
    user: str,
    style: _Style,
    message: tuple[str, str],
    written: str,
    history: tuple[HistoryItem, ...],
    chance: float,
) -> _Query:
    neutral = _cased(" ".join(message), "sentence") + "."
    return _Query(
        sample=Sample(name, user, _STYLE_INPUT + neutral, neutral, written, history),
        oracle={"mode": style.write(*message)},
        expected={"mode": _style_scores(style, message, chance)},
    )


def _style_scores(style: _Style, message: tuple[str, str], chance: float) -> dict[str, float]:
    """What the likeliest message may expect: exactly right, and ROUGE, which sees lower-cased words only.

    Without the phrase the true text is the end of the predicted one: recall 1, precision their lengths'
    ratio.
    """
    predicted = _word_count(style.write(*message))
    true = _word_count(style.write(*message, with_phrase=False))
    rouge = chance + (1 - chance) * 2 * true / (predicted + true)
    return {"exact": chance ** (2 if style.emoji else 1), "rouge_1": rouge, "rouge_l": rouge}


def _word_count(text: str) -> int:
    return len(re.findall(r"[a-z0-9]+", text.lower()))
