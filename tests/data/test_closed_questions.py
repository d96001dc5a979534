"""Closed questions: the right answers are compared with answers worked out from the prompts."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from personaplug.data.closed_questions import ClosedQuestion, closed_questions

QUESTIONS = closed_questions(500)


def right_answer(question: ClosedQuestion) -> str:
    """Work out the answer from the prompt alone."""
    prompt = question.prompt
    match question.kind:
        case "arithmetic":
            left, operation, right = re.findall(r"\d+|plus|minus", prompt)
            return str(int(left) + int(right) * (1 if operation == "plus" else -1))
        case "copying":
            return prompt.split("word for word: ")[1]
        case "ordering":
            return ", ".join(sorted(prompt.split("commas: ")[1].split(", ")))
        case "extraction":
            name = re.search(r"Where does (\w+) come", prompt)[1]  # type: ignore[index]
            return re.search(rf"{name} is a \w+ from (\w+)\.", prompt)[1]  # type: ignore[index]
        case _:
            thing, color = re.search(r"Is the (\w+) (\w+)\?", prompt).groups()  # type: ignore[union-attr]
            return "Yes" if f"The {thing} is {color}." in prompt else "No"


def test_answers_follow_from_the_prompts() -> None:
    assert [question.answer for question in QUESTIONS] == [right_answer(question) for question in QUESTIONS]


def test_wrong_answers_are_different_and_wrong() -> None:
    for question in QUESTIONS:
        answers = {question.answer, *question.wrong}
        assert len(answers) == 1 + len(question.wrong)
        assert len(question.wrong) == (1 if question.kind == "yes-or-no" else 3)


def test_kinds_are_equally_frequent_and_questions_differ() -> None:
    assert set(Counter(question.kind for question in QUESTIONS).values()) == {100}
    assert len({question.prompt for question in QUESTIONS}) == 500


def test_yes_and_no_are_about_as_frequent() -> None:
    counts = Counter(question.answer for question in QUESTIONS if question.kind == "yes-or-no")
    assert counts["Yes"] == pytest.approx(50, abs=20)


def test_seed_determines_the_questions() -> None:
    def prompts(seed: int) -> list[str]:
        return [question.prompt for question in closed_questions(50, seed=seed)]

    assert prompts(0) == prompts(0) != prompts(1)
