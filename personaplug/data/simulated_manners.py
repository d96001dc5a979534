"""Simulated users who ask about everyday topics and want answers in their own manners.

An answer is up to three neutral sentences on the topic, rewritten by rules. Train and dev have different topics and
different combinations of manners. A user's history never has the topic of a question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import numpy as np

from personaplug.data.closed_questions import TRAINED_KINDS, ClosedQuestion, closed_questions
from personaplug.data.manner_wording import INSTRUCTIONS, stated
from personaplug.data.manners import DIMENSIONS, NONE, ONE, PROSE, SEVERAL_SENTENCES, VALUES, Manners
from personaplug.data.records import PREFERENCE, HistoryItem, ItemKind, Sample, Turn
from personaplug.data.simulated_users import SimulatedQuery

SYSTEM_MESSAGE = "You are a helpful assistant."

_DEV_TOPICS = 40
_DEV_COMBINATIONS = 0.25  # share of all combinations of manners
_NONE_CHANCE = 0.4  # of no emoji; likewise of no greeting, sign-off and question
_REJECTED_CHANCE = 0.1  # that a user rejects the first answer to a question of the history
_SILENT_CHANCE = 1 / 3  # that a user states no preference
_INSTRUCTED_CHANCE = _CONTEXT_CHANCE = 0.1  # of each train prompt
_TOPICS_STREAM, _COMBINATIONS_STREAM = 101, 102  # of the random numbers

MAX_TOPICS = _DEV_TOPICS
"""The maximum number of topics of a user, in history and questions."""


@dataclass(frozen=True)
class Topic:
    """An everyday topic: questions about it, and neutral sentences. The first sentence is a complete answer."""

    name: str
    asks: tuple[str, ...]
    sentences: tuple[str, ...]


@cache
def all_topics() -> tuple[Topic, ...]:
    """Load the topics from the package."""
    records = json.loads(Path(__file__).with_name("simulated_topics.json").read_text(encoding="utf-8"))
    return tuple(Topic(r["topic"], tuple(r["asks"]), tuple(r["sentences"])) for r in records)


@dataclass(frozen=True)
class World:
    """The topics and combinations of manners that a seed assigns to train and dev.

    Attributes:
        differing: the manners in which users differ; the others are the defaults of `Manners`.
    """

    seed: int
    differing: tuple[str, ...] = DIMENSIONS

    @cached_property
    def _topics(self) -> list[Topic]:
        topics = all_topics()
        return [topics[index] for index in _shuffled(len(topics), self.seed, _TOPICS_STREAM)]

    @cached_property
    def _dev_combinations(self) -> frozenset[Manners]:
        values = product(*(VALUES[name] for name in self.differing))
        combinations = list(
            dict.fromkeys(_settled(Manners(**dict(zip(self.differing, each, strict=True)))) for each in values)
        )
        order = _shuffled(len(combinations), self.seed, _COMBINATIONS_STREAM)
        return frozenset(combinations[index] for index in order[: int(_DEV_COMBINATIONS * len(combinations))])

    def topics(self, *, is_dev: bool) -> Sequence[Topic]:
        """Return the topics of a split."""
        return self._topics[:_DEV_TOPICS] if is_dev else self._topics[_DEV_TOPICS:]

    def draw_manners(self, rng: np.random.Generator, *, is_dev: bool) -> Manners:
        """Draw manners that belong only to this split."""
        while True:
            manners = _settled(Manners(**{name: _draw_value(rng, VALUES[name]) for name in self.differing}))
            if (manners in self._dev_combinations) == is_dev:
                return manners


@cache
def world(seed: int, differing: tuple[str, ...]) -> World:
    """Return the world of a seed, in which users differ in these manners."""
    return World(seed, differing)


@dataclass(frozen=True, repr=False)
class Exchange:
    """A question and the neutral sentences of its answer."""

    question: str
    sentences: tuple[str, ...]

    @classmethod
    def drawn(cls, rng: np.random.Generator, topic: Topic) -> Exchange:
        """Draw a question, and the sentences after the first one."""
        others = rng.choice(len(topic.sentences) - 1, SEVERAL_SENTENCES - 1, replace=False) + 1
        sentences = (topic.sentences[0], *(topic.sentences[index] for index in sorted(others)))
        return cls(topic.asks[int(rng.integers(len(topic.asks)))], sentences)


@dataclass(frozen=True, repr=False)
class MannerlyUser:
    """A user with manners, in train or in dev."""

    world: World
    manners: Manners
    is_dev: bool

    @classmethod
    def drawn(
        cls, rng: np.random.Generator, *, seed: int, is_dev: bool, differing: tuple[str, ...] = DIMENSIONS
    ) -> MannerlyUser:
        """Draw a user; users differ only in the manners `differing`."""
        user_world = world(seed, differing)
        return cls(user_world, user_world.draw_manners(rng, is_dev=is_dev), is_dev)

    def queries(self, name: str, rng: np.random.Generator, *, items: int, queries: int) -> list[SimulatedQuery]:
        """Draw a history of `items` exchanges, some rejections and preferences, and questions about other topics.

        In train, some questions have earlier messages, some have an instruction, and all have a rejected answer.
        """
        history, exchanges = self._drawn(name, rng, items)
        if self.is_dev:
            questions = [_Question(exchange, self.manners) for exchange in exchanges[:queries]]
        else:
            pairs = zip(exchanges[:queries], exchanges[queries:], strict=False)
            questions = [self._train_question(rng, *pair) for pair in pairs]
        return [question.query(f"{name}-q{index}", name, history) for index, question in enumerate(questions)]

    def instructed(self, name: str, rng: np.random.Generator, *, items: int, dimension: str) -> list[SimulatedQuery]:
        """Draw the user's first question with an instruction that contradicts the manners; [] if it does not.

        Args:
            dimension: a key of `INSTRUCTIONS`.
        """
        history, exchanges = self._drawn(name, rng, items)
        instruction = INSTRUCTIONS[dimension]
        if not instruction.contradicts(self.manners):
            return []
        question = _Question(exchanges[0], instruction.obeyed_by(self.manners), wording=instruction.wordings[-1])
        return [question.query(f"{name}-q0-{dimension}", name, history)]

    def closed(self, name: str, rng: np.random.Generator, *, items: int, questions: int) -> list[SimulatedQuery]:
        """Draw closed questions for the user. The correct answers do not depend on the user's manners."""
        history, _ = self._drawn(name, rng, items)
        drawn_questions = closed_questions(questions, seed=int(rng.integers(2**31)))
        answered = {"mode": {"answered": 1.0}}
        return [
            _closed_query(Sample(f"{name}-{each.kind}", name, "", "", None, history), each, expected=answered)
            for each in drawn_questions
        ]

    def with_closed(
        self, queries: Sequence[SimulatedQuery], rng: np.random.Generator, *, share: float
    ) -> list[SimulatedQuery]:
        """Replace a share of the questions, drawn at random, with closed questions and their right answers."""
        return [_closed_in_place_of(query, rng) if rng.random() < share else query for query in queries]

    def _drawn(self, name: str, rng: np.random.Generator, items: int) -> tuple[tuple[HistoryItem, ...], list[Exchange]]:
        """Draw the history, and exchanges about the other topics."""
        topics = self.world.topics(is_dev=self.is_dev)
        exchanges = [Exchange.drawn(rng, topics[index]) for index in rng.permutation(len(topics))]
        history = self._history(name, rng, exchanges[:items])
        return history, exchanges[items:]

    def _history(self, name: str, rng: np.random.Generator, exchanges: Sequence[Exchange]) -> tuple[HistoryItem, ...]:
        entries: list[tuple[ItemKind, tuple[str, ...]]] = []
        for each in exchanges:
            answer = self.manners.apply(each.sentences)
            if rng.random() < _REJECTED_CHANCE:
                entries.append(("rejection", (each.question, self._rejected(rng, each, target=answer))))
            entries.append(("answer", (each.question, answer)))
        for sentence in self._stated(rng):
            entries.insert(int(rng.integers(len(entries) + 1)), ("preference", (sentence,)))
        return tuple(_item(f"{name}-i{index}", kind, texts) for index, (kind, texts) in enumerate(entries))

    def _stated(self, rng: np.random.Generator) -> list[str]:
        """Draw stated preferences: none for a third of the users, else one to all of the manners in random order."""
        if rng.random() < _SILENT_CHANCE:
            return []
        names = [name for name in self.world.differing if not (name == "layout" and self.manners.length == ONE)]
        chosen = rng.permutation(len(names))[: int(rng.integers(1, len(names) + 1))]
        return [_pick(rng, stated(names[index], getattr(self.manners, names[index]))) for index in chosen]

    def _train_question(self, rng: np.random.Generator, exchange: Exchange, earlier: Exchange) -> _Question:
        manners, wording = self.manners, ""
        if rng.random() < _INSTRUCTED_CHANCE:
            choices = [each for each in INSTRUCTIONS.values() if each.contradicts(manners)]
            instruction = choices[int(rng.integers(len(choices)))]
            manners, wording = instruction.obeyed_by(manners), _pick(rng, instruction.wordings[:-1])
        context = self._context(rng, earlier) if rng.random() < _CONTEXT_CHANCE else ()
        question = _Question(exchange, manners, wording=wording, context=context)
        return replace(question, rejected=(self._rejected(rng, exchange, target=question.answer),))

    def _context(self, rng: np.random.Generator, earlier: Exchange) -> tuple[Turn, ...]:
        if rng.random() < 0.5:
            return (("system", SYSTEM_MESSAGE),)
        return ("user", earlier.question), ("assistant", self.manners.apply(earlier.sentences))

    def _rejected(self, rng: np.random.Generator, exchange: Exchange, *, target: str) -> str:
        """Write the answer in random manners, so that it differs from the target."""
        while True:
            answer = self.world.draw_manners(rng, is_dev=self.is_dev).apply(exchange.sentences)
            if answer != target:
                return answer


def _closed_in_place_of(query: SimulatedQuery, rng: np.random.Generator) -> SimulatedQuery:
    """Return a query whose question is a closed one, drawn at random, with one rejected answer."""
    kind = _pick(rng, TRAINED_KINDS)
    (closed,) = closed_questions(1, seed=int(rng.integers(2**31)), kinds=(kind,))
    return _closed_query(query.sample, replace(closed, wrong=closed.wrong[:1]), expected=query.expected)


def _closed_query(
    sample: Sample, closed: ClosedQuestion, *, expected: Mapping[str, Mapping[str, float]]
) -> SimulatedQuery:
    """Return a query with a closed question. Its answer obeys the question's wording, not the user's manners."""
    asked = replace(
        sample, query=closed.prompt, prompt=closed.prompt, target=closed.answer, context=(), rejected=closed.wrong
    )
    return SimulatedQuery(asked, {"mode": closed.answer}, expected)


@dataclass(frozen=True, repr=False)
class _Question:
    exchange: Exchange
    manners: Manners
    wording: str = ""
    context: tuple[Turn, ...] = ()
    rejected: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        return self.manners.apply(self.exchange.sentences)

    def query(self, sample_id: str, user: str, history: tuple[HistoryItem, ...]) -> SimulatedQuery:
        """Return the sample. The oracle knows the user's rules, so its prediction is the target."""
        prompt = f"{self.exchange.question} {self.wording}".rstrip()
        sample = Sample(
            sample_id, user, prompt, prompt, self.answer, history, context=self.context, rejected=self.rejected
        )
        return SimulatedQuery(sample, {"mode": self.answer}, {"mode": {"manners": 1.0, "rouge_1": 1.0}})


def _item(item_id: str, kind: ItemKind, texts: tuple[str, ...]) -> HistoryItem:
    """Return an item with a question and its answer, or with a stated preference."""
    if kind == "preference":
        return HistoryItem(item_id, ((PREFERENCE, texts[0]),), kind=kind)
    return HistoryItem(item_id, tuple(zip(("question", "answer"), texts, strict=True)), "answer", kind=kind)


def _settled(manners: Manners) -> Manners:
    """Set the layout of one sentence to prose, so that equal texts have equal manners."""
    return replace(manners, layout=PROSE) if manners.length == ONE else manners


def _draw_value(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    if values[0] != NONE:
        return _pick(rng, values)
    return NONE if rng.random() < _NONE_CHANCE else _pick(rng, values[1:])


def _pick(rng: np.random.Generator, texts: tuple[str, ...]) -> str:
    return texts[int(rng.integers(len(texts)))]


def _shuffled(count: int, seed: int, stream: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, stream]).permutation(count).tolist()
    return order
