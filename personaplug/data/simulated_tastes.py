"""Simulated users who like things of their own taste. A picture shows one half of a thing, a text tells the other.

Train and dev have different pictures and different phrases. Most things of a user have most attributes of the user's
taste, so one item alone does not tell it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np

from personaplug.data.drawn_pictures import draw
from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.simulated_users import SimulatedQuery
from personaplug.data.tastes import (
    ATTRIBUTES,
    COLLECTIONS,
    COLOR_GROUPS,
    COLORS,
    MOODS,
    SHAPES,
    TEXTURES,
    THEMES,
    Taste,
)

_EXAMPLE = Taste("teal", "stars", "dotted", "city", "calm")

COLLECTION_INPUT = (
    f"Which collection would this user choose? Its name has a group of colors ({', '.join(COLOR_GROUPS)}) and a theme "
    f'({", ".join(THEMES)}), such as "{COLLECTIONS[0]}". object: '
)
KEYWORDS_INPUT = (
    f"Write keywords for a picture that this user would like: one color ({', '.join(COLORS)}), one shape "
    f"({', '.join(SHAPES)}), one texture ({', '.join(TEXTURES)}), one theme ({', '.join(THEMES)}), one mood "
    f'({", ".join(MOODS)}), such as "{_EXAMPLE.keywords}". object: '
)

ASKED = ("color", "texture")
"""The attributes that a question may ask for."""

Question = Literal["collection", "keywords"]

_LIKED_CHANCE = 0.8  # of each attribute of an item to be the user's own; else it is drawn at random
_PART_CHANCE = 0.1  # that an item has no picture; likewise that it has no text
_ASKED_CHANCE = 0.25  # of a train question for keywords to ask for a color or a texture
_VARIANTS = 2  # different pictures of each color, shape and texture, in each split
_PICTURES_STREAM = 103  # of the random numbers
_DEV_SHARE = 0.4  # of the phrases of a theme or a mood
_SPLITS = ("train", "dev")
_LOOKS = {look: index for index, look in enumerate(product(COLORS, SHAPES, TEXTURES))}


@dataclass(frozen=True)
class Wording:
    """The words that texts use: objects, and phrases for each theme and mood. No phrase contains a keyword."""

    objects: tuple[str, ...]
    themes: Mapping[str, tuple[str, ...]]
    moods: Mapping[str, tuple[str, ...]]


@cache
def wording(*, is_dev: bool) -> Wording:
    """Load the words of a split from the package."""
    values = json.loads(Path(__file__).with_name("taste_wording.json").read_text(encoding="utf-8"))

    def of_split(phrases: Sequence[str]) -> tuple[str, ...]:
        train = len(phrases) - int(_DEV_SHARE * len(phrases))
        return tuple(phrases[train:] if is_dev else phrases[:train])

    phrases = ({name: of_split(each) for name, each in values[key].items()} for key in ("themes", "moods"))
    return Wording(tuple(values["objects"]), *phrases)


@dataclass(frozen=True, repr=False)
class TastefulUser:
    """A user with a taste, in train or in dev, who answers one kind of question."""

    taste: Taste
    question: Question
    is_dev: bool
    seed: int

    @classmethod
    def drawn(cls, rng: np.random.Generator, *, question: Question, is_dev: bool, seed: int) -> TastefulUser:
        """Draw a user; each attribute of the taste is independent."""
        return cls(Taste(**_drawn_attributes(rng)), question, is_dev, seed)

    def queries(self, name: str, rng: np.random.Generator, *, items: int, queries: int) -> list[SimulatedQuery]:
        """Draw a history of `items` liked things, and questions about objects."""
        history = self._history(name, rng, items)
        return [self._query(f"{name}-q{index}", name, history, rng=rng) for index in range(queries)]

    def asked(self, name: str, rng: np.random.Generator, *, items: int, queries: int) -> list[SimulatedQuery]:
        """Draw questions for keywords that ask for a color which is not the user's."""
        history = self._history(name, rng, items)
        others = [color for color in COLORS if color != self.taste.color]
        return [
            self._query(f"{name}-q{index}-asked", name, history, rng=rng, asked={"color": _pick(rng, others)})
            for index in range(queries)
        ]

    def _query(
        self,
        sample_id: str,
        user: str,
        history: tuple[HistoryItem, ...],
        *,
        rng: np.random.Generator,
        asked: Mapping[str, str] | None = None,
    ) -> SimulatedQuery:
        """Return a question. The oracle knows the taste, so its prediction is the target."""
        thing = _pick(rng, wording(is_dev=self.is_dev).objects)
        if self.question == "collection":
            answer, expected = self.taste.collection, {"accuracy": 1.0}
            sample = Sample(sample_id, user, COLLECTION_INPUT + thing, thing, answer, history)
        else:
            asked = self._drawn_asked(rng) if asked is None else asked
            thing, expected = " ".join((*asked.values(), thing)), {"keywords": 1.0}
            answer = replace(self.taste, **asked).keywords
            sample = Sample(sample_id, user, KEYWORDS_INPUT + thing, thing, answer, history)
        return SimulatedQuery(sample, {"mode": answer}, {"mode": expected})

    def _drawn_asked(self, rng: np.random.Generator) -> dict[str, str]:
        """Draw what a question asks for: nothing in dev, and seldom a color or a texture in train."""
        if self.is_dev or rng.random() >= _ASKED_CHANCE:
            return {}
        name = _pick(rng, ASKED)
        return {name: _pick(rng, ATTRIBUTES[name])}

    def _history(self, name: str, rng: np.random.Generator, items: int) -> tuple[HistoryItem, ...]:
        return tuple(self._item(f"{name}-i{index}", rng) for index in range(items))

    def _item(self, item_id: str, rng: np.random.Generator) -> HistoryItem:
        """Draw a thing that the user liked: a picture and a text, seldom one of them alone."""
        drawn = _drawn_attributes(rng)
        is_own = dict(zip(drawn, rng.random(len(drawn)) < _LIKED_CHANCE, strict=True))
        liked = {key: getattr(self.taste, key) if is_own[key] else value for key, value in drawn.items()}
        words = wording(is_dev=self.is_dev)
        theme, mood = _pick(rng, words.themes[liked["theme"]]), _pick(rng, words.moods[liked["mood"]])
        text = f"{_pick(rng, words.objects).capitalize()} with {theme}, {mood}"
        part, variant = rng.random(), int(rng.integers(_VARIANTS))
        look = (liked["color"], liked["shape"], liked["texture"])
        picture = None if part < _PART_CHANCE else drawn_picture(look, self.seed, self._split, variant)
        return HistoryItem(item_id, (("text", "" if part > 1 - _PART_CHANCE else text),), picture=picture)

    @property
    def _split(self) -> str:
        return "dev" if self.is_dev else "train"


@lru_cache(maxsize=1024)
def drawn_picture(look: tuple[str, str, str], seed: int, split: str, variant: int) -> Picture:
    """Return the picture of a color, a shape and a texture; the seed, the split and the variant determine it."""
    rng = np.random.default_rng([seed, _PICTURES_STREAM, _SPLITS.index(split), _LOOKS[look], variant])
    return draw(*look, rng=rng)


def _drawn_attributes(rng: np.random.Generator) -> dict[str, str]:
    return {name: _pick(rng, words) for name, words in ATTRIBUTES.items()}


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]
