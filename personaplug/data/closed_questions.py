"""Closed questions with known answers, to measure how much correctness a persona costs.

The kinds are arithmetic, copying, ordering, extraction, and yes or no about a given text. Each question also has wrong
answers, so a model can be scored by likelihood, without generated text. A seed determines everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from personaplug.data.task import Task

CLOSED_QUESTIONS = Task(
    "Closed_questions", "chat", ("question", "answer"), "answer", ("answered", "divergence"), max_new_tokens=48
)

TRAINED_KINDS = ("arithmetic", "copying", "yes-or-no")
"""The kinds that may be asked in training; the other kinds show whether what is learned carries over."""

_WRONG = 3  # wrong answers of a question that is not yes or no

_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Mia")
_CITIES = ("Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Lima", "Madrid", "Oslo", "Paris", "Rome", "Tokyo")
_JOBS = ("baker", "doctor", "farmer", "lawyer", "nurse", "painter", "pilot", "sailor", "singer", "teacher", "writer")
_COLORS = ("black", "blue", "brown", "green", "grey", "orange", "purple", "red", "white", "yellow")
_THINGS = ("bag", "bike", "boat", "book", "chair", "coat", "cup", "door", "hat", "lamp", "shoe", "table")


@dataclass(frozen=True, repr=False)
class ClosedQuestion:
    """A question, its right answer and wrong ones, all different."""

    kind: str
    prompt: str
    answer: str
    wrong: tuple[str, ...]


def closed_questions(count: int, *, seed: int = 0, kinds: Sequence[str] = ()) -> list[ClosedQuestion]:
    """Return different questions, equally many of each kind; without `kinds`, of all kinds."""
    rng = np.random.default_rng([seed, 11])
    names = list(kinds or _KINDS)
    questions: dict[str, ClosedQuestion] = {}
    while len(questions) < count:
        kind = names[len(questions) % len(names)]
        prompt, answer, wrong = _KINDS[kind](rng)
        questions.setdefault(prompt, ClosedQuestion(kind, prompt, answer, tuple(wrong)))
    return list(questions.values())


def _arithmetic(rng: np.random.Generator) -> tuple[str, str, list[str]]:
    left, right = (int(number) for number in rng.integers(2, 50, size=2))
    is_sum = bool(rng.integers(2))
    left, right = (left, right) if is_sum else (left + right, right)
    result = left + right if is_sum else left - right
    near = [result + step for step in (-10, -2, -1, 1, 2, 10) if result + step >= 0]
    prompt = f"What is {left} {'plus' if is_sum else 'minus'} {right}? Answer with the number alone."
    return prompt, str(result), [str(number) for number in rng.permutation(near)[:_WRONG]]


def _copying(rng: np.random.Generator) -> tuple[str, str, list[str]]:
    color, thing, name, city = (_drawn(rng, words)[0] for words in (_COLORS, _THINGS, _NAMES, _CITIES))
    sentence = f"{name} left the {color} {thing} in {city}."
    others = [
        f"{name} left the {other} {thing} in {city}." for other in _drawn(rng, _COLORS, count=_WRONG, without=color)
    ]
    return f"Repeat this sentence word for word: {sentence}", sentence, others


def _ordering(rng: np.random.Generator) -> tuple[str, str, list[str]]:
    names = _drawn(rng, _NAMES, count=4)
    right = sorted(names)
    orders = [[right[index] for index in order] for order in ([0, 1, 3, 2], [1, 0, 2, 3], [3, 2, 1, 0])]
    prompt = f"Put these names in alphabetical order, separated by commas: {', '.join(names)}"
    return prompt, ", ".join(right), [", ".join(order) for order in orders]


def _extraction(rng: np.random.Generator) -> tuple[str, str, list[str]]:
    people, jobs, cities = (_drawn(rng, words, count=3) for words in (_NAMES, _JOBS, _CITIES))
    facts = [f"{name} is a {job} from {city}." for name, job, city in zip(people, jobs, cities, strict=True)]
    index = int(rng.integers(3))
    question = f"Where does {people[index]} come from? Answer with the city alone."
    others = [*(city for city in cities if city != cities[index]), *_drawn(rng, _CITIES, count=4)]
    wrong = list(dict.fromkeys(city for city in others if city != cities[index]))[:_WRONG]
    return f"{' '.join(facts)} {question}", cities[index], wrong


def _yes_or_no(rng: np.random.Generator) -> tuple[str, str, list[str]]:
    things, colors = _drawn(rng, _THINGS, count=3), _drawn(rng, _COLORS, count=3)
    facts = [f"The {thing} is {color}." for thing, color in zip(things, colors, strict=True)]
    index, is_true = int(rng.integers(3)), bool(rng.integers(2))
    color = colors[index] if is_true else colors[(index + 1) % 3]
    prompt = f"{' '.join(facts)} Is the {things[index]} {color}? Answer with yes or no."
    return prompt, *(("Yes", ["No"]) if is_true else ("No", ["Yes"]))


_KINDS: Mapping[str, Callable[[np.random.Generator], tuple[str, str, list[str]]]] = {
    "arithmetic": _arithmetic,
    "copying": _copying,
    "ordering": _ordering,
    "extraction": _extraction,
    "yes-or-no": _yes_or_no,
}


def _drawn(
    rng: np.random.Generator, words: tuple[str, ...], *, count: int = 1, without: str | None = None
) -> list[str]:
    """Draw different words."""
    others = [word for word in words if word != without]
    return [others[index] for index in rng.permutation(len(others))[:count]]
