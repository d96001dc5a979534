"""Simulated users of two kinds: raters of films with known tastes, and writers with known habits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from personaplug.data.records import HistoryItem, Sample

RATING_INPUT = (
    "Which score from 1 to 5 would this user give to the following film? just answer with 1, 2, 3, 4, or 5 "
    "without further explanation. film: "
)
STYLE_INPUT = "Write the following message as this user would write it. message: "

_GENRES = ("comedy", "horror film", "western", "romance", "science fiction film", "documentary", "war film", "musical")
_MOODS = (
    "quiet", "loud", "slow", "fast", "long", "short", "colourful", "grey", "modest", "grand", "late", "late",
    "low-budget", "star-studded", "handmade", "glossy",
)  # fmt: skip
_HEROES = (
    "two sisters", "a retired teacher", "a young cook", "a lost brother", "three neighbours", "a night nurse",
    "a stubborn farmer", "an old sailor", "a new mayor", "a travelling salesman", "a chess player", "a bus driver",
    "twin cousins", "a piano tuner", "a runaway clerk", "a lighthouse keeper",
)  # fmt: skip
_PLOTS = (
    "who found a map", "who missed a train", "who inherited a house", "who shared a secret", "who opened a shop",
    "who crossed a desert", "who lost a bet", "who searched for a letter", "who waited for a storm",
    "who repaired a bridge", "who met again", "who changed their name",
)  # fmt: skip
_SETTINGS = (
    "in a small harbour town", "in the mountains", "on an island", "in a crowded city", "by a wide river",
    "at a border post", "in an empty hotel", "on a night train", "in a hot summer", "during a long winter",
    "near the old mine", "in a village school",
)  # fmt: skip
_SUBJECTS = (
    "the meeting", "the delivery", "the dinner", "the lesson", "the concert", "the visit", "the repair",
    "the interview", "the game", "the trip", "the party", "the appointment", "the workshop", "the exam",
    "the breakfast", "the rehearsal", "the tour", "the auction", "the picnic", "the parade", "the lecture",
    "the tournament", "the ceremony", "the excursion",
)  # fmt: skip
_NEWS = (
    "is moved to friday", "starts at nine", "takes two hours", "is cancelled this week", "will be outside",
    "needs one more person", "went very well", "is open to everyone", "costs ten euros", "ends before lunch",
    "is in the other building", "was shorter than planned", "begins an hour later", "has a new date",
    "is free this year", "is almost ready", "will be filmed", "is fully booked", "needs more chairs",
    "takes place online",
)  # fmt: skip
_DETAILS = (
    "because the room is being painted", "and nobody has to bring anything", "so please tell the others",
    "as the weather looks good", "since the first plan did not work", "and the details follow tomorrow",
    "because two people are away", "so there is no need to hurry", "and there will be tea", "as we agreed last month",
)  # fmt: skip
_PHRASES = ("honestly", "you know", "good news", "just saying", "for the record", "by the way", "well then", "listen")
_EMOJI = ("", "😀", "🎉", "🙏", "🚀", "😅", "🌻", "👍")
_CASINGS = ("lower", "upper", "title", "sentence")


@dataclass(frozen=True, repr=False)
class SimulatedQuery:
    """A sample; the oracle's predictions and expected scores by point estimate; the probabilities of a rating."""

    sample: Sample
    oracle: Mapping[str, str]
    expected: Mapping[str, Mapping[str, float]]
    probabilities: tuple[float, ...] = ()


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


@dataclass(frozen=True, repr=False)
class Rater:
    """A user who rates films: general generosity, a taste for each genre, and noise, in points."""

    generosity: float
    genres: tuple[float, ...]
    noise_sd: float

    @classmethod
    def drawn(cls, rng: np.random.Generator, *, generosity_sd: float, taste_sd: float, noise_sd: float) -> Rater:
        """Draw a user."""
        generosity = float(rng.normal(0, generosity_sd))
        return cls(generosity, tuple(rng.normal(0, taste_sd, len(_GENRES)).tolist()), noise_sd)

    def score(self, genre: int, rng: np.random.Generator) -> int:
        """Draw a score from 1 to 5."""
        raw = 3 + self.generosity + self.genres[genre] + rng.normal(0, self.noise_sd)
        return int(np.clip(math.floor(raw + 0.5), 1, 5))

    def probabilities(self, genre: int) -> tuple[float, ...]:
        """Return the probability of each score: the probability that the noisy value is rounded to it."""
        noise = NormalDist(3 + self.generosity + self.genres[genre], self.noise_sd)
        below = [0.0, *(noise.cdf(score + 0.5) for score in range(1, 5)), 1.0]
        return tuple(high - low for low, high in pairwise(below))

    def queries(self, name: str, rng: np.random.Generator, *, items: int, queries: int) -> list[SimulatedQuery]:
        """Draw a history of `items` films, and queries about other films."""
        films = [(film, genre, str(self.score(genre, rng))) for film, genre in _films(rng, items + queries)]
        history = tuple(
            HistoryItem(f"{name}-i{index}", (("text", film), ("score", score)), "score")
            for index, (film, _, score) in enumerate(films[:items])
        )
        return [
            self._query(Sample(f"{name}-q{index}", name, RATING_INPUT + film, film, score, history), genre)
            for index, (film, genre, score) in enumerate(films[items:])
        ]

    def _query(self, sample: Sample, genre: int) -> SimulatedQuery:
        probabilities = self.probabilities(genre)
        median = next(score for score in range(1, 6) if math.fsum(probabilities[:score]) >= 0.5)
        guesses = {"mode": 1 + probabilities.index(max(probabilities)), "median": median}
        expected = {}
        for estimate, guess in guesses.items():
            error = math.fsum(probability * abs(score - guess) for score, probability in enumerate(probabilities, 1))
            expected[estimate] = {"accuracy": probabilities[guess - 1], "mae": error}
        return SimulatedQuery(
            sample, {estimate: str(guess) for estimate, guess in guesses.items()}, expected, probabilities
        )


def _films(rng: np.random.Generator, count: int) -> list[tuple[str, int]]:
    films: dict[str, int] = {}
    while len(films) < count:
        genre = int(rng.integers(len(_GENRES)))
        hero, plot, setting = _pick(rng, _HEROES), _pick(rng, _PLOTS), _pick(rng, _SETTINGS)
        films[f"A {_pick(rng, _MOODS)} {_GENRES[genre]} about {hero} {plot} {setting}."] = genre
    return list(films.items())


@dataclass(frozen=True, repr=False)
class Writer:
    """A user who writes messages: casing, length, a phrase and an emoji, and how often the latter two appear."""

    casing: str
    is_long: bool
    phrase: str
    emoji: str
    habit_chance: float

    @classmethod
    def drawn(cls, rng: np.random.Generator, *, habit_chance: float) -> Writer:
        """Draw a user."""
        casing, is_long = _pick(rng, _CASINGS), bool(rng.integers(2))
        return cls(casing, is_long, _pick(rng, _PHRASES), _pick(rng, _EMOJI), habit_chance)

    def queries(self, name: str, rng: np.random.Generator, *, items: int, queries: int) -> list[SimulatedQuery]:
        """Draw a history of `items` messages, and queries about other messages."""
        messages = _messages(rng, items + queries)
        texts = []
        for message in messages:
            with_phrase, with_emoji = (rng.random(2) < self.habit_chance).tolist()
            texts.append(self._write(*message, with_phrase=with_phrase, with_emoji=with_emoji))
        history = tuple(
            HistoryItem(f"{name}-i{index}", (("text", text),), "text") for index, text in enumerate(texts[:items])
        )
        simulated = []
        for index, (message, text) in enumerate(zip(messages[items:], texts[items:], strict=True)):
            neutral = _cased(" ".join(message), "sentence") + "."
            sample = Sample(f"{name}-q{index}", name, STYLE_INPUT + neutral, neutral, text, history)
            expected = self._expected_scores(message)
            simulated.append(SimulatedQuery(sample, {"mode": self._write(*message)}, {"mode": expected}))
        return simulated

    def _write(self, core: str, detail: str, *, with_phrase: bool = True, with_emoji: bool = True) -> str:
        phrase, end = f"{self.phrase}, " if with_phrase else "", f" {detail}" if self.is_long else ""
        text = _cased(f"{phrase}{core}{end}", self.casing)
        return f"{text} {self.emoji}" if self.emoji and with_emoji else text

    def _expected_scores(self, message: tuple[str, str]) -> dict[str, float]:
        """Return the expected scores of the likeliest message: exact match, and ROUGE, which ignores case and emoji.

        Without the phrase, the true text is a suffix of the prediction: recall is 1, precision the ratio of lengths.
        """
        predicted = _word_count(self._write(*message))
        true = _word_count(self._write(*message, with_phrase=False))
        rouge = self.habit_chance + (1 - self.habit_chance) * 2 * true / (predicted + true)
        return {"exact": self.habit_chance ** (2 if self.emoji else 1), "rouge_1": rouge, "rouge_l": rouge}


def _cased(text: str, casing: str) -> str:
    if casing == "title":
        return " ".join(word.capitalize() for word in text.split(" "))
    return {"lower": text.lower, "upper": text.upper, "sentence": text.capitalize}[casing]()


def _messages(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    # Subject and news are the key, so that a user's messages differ even if their details are left out.
    messages: dict[str, str] = {}
    while len(messages) < count:
        messages[f"{_pick(rng, _SUBJECTS)} {_pick(rng, _NEWS)}"] = _pick(rng, _DETAILS)
    return list(messages.items())


def _word_count(text: str) -> int:
    return len(re.findall(r"[a-z0-9]+", text.lower()))
