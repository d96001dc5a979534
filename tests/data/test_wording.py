"""The wording of a task's prompts: how it is learned from training prompts, and which prompts match it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from personaplug.data import LAMP_TASKS
from personaplug.data.parsing import options_of, query_of
from personaplug.data.records import Options
from personaplug.data.task import Task
from personaplug.data.task_prompts import TaskPrompts
from personaplug.data.wording import Wording, learn_wordings

RATE = Task("Films", "rating", ("text",), "score", ("mae",), labels=("1", "2"), query_after="film: ")
WHOLE = Task("Posts", "text", ("text",), "text", ("rouge_1",))
WORDS = "tea walk sea train night garden river letter music bread winter bridge island mirror engine".split()  # noqa: SIM905
TEXTS = [f"{WORDS[n % 15]} and {WORDS[(n * 7 + 3) % 15]} {n}" for n in range(40)]
LAMP = {
    "LaMP_1": 'For an author who has written the paper with the title "{0}", which reference is related? Just answer '
    'with [1] or [2] without explanation. [1]: "{1}" [2]: "{0}"',
    "LaMP_2": "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
    "further explanation. tags: [sci-fi, comedy] description: {0}",
    "LaMP_3": "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
    "without further explanation. review: {0}",
    "LaMP_4": "Generate a headline for the following article: {0}",
    "LaMP_5": "Generate a title for the following abstract of a paper: {0}",
    "LaMP_7": "Paraphrase the following tweet without any explanation before or after it: {0}",
}


@dataclass
class _Sample:
    prompt: str
    query: str
    options: Options | None


def _prompts(task: Task, prompts: Iterable[str]) -> TaskPrompts:
    samples = [_Sample(prompt, query_of(task, prompt), options_of(task, prompt)) for prompt in prompts]
    return TaskPrompts(task, learn_wordings(samples))


@pytest.mark.parametrize("name", LAMP)
def test_only_lamp_prompts_are_recognized(name: str) -> None:
    task, template = LAMP_TASKS[name], LAMP[name]
    prompts = _prompts(task, [template.format(a, b) for a, b in zip(TEXTS, reversed(TEXTS), strict=True)])
    other = template.format("A new text", "Another one")
    assert prompts.parse(other) == TaskPrompts(task).parse(other) or not prompts.parse(other).item_text
    assert prompts.parse(other).is_on_task
    for off in (f"Tell me a story. {other}", "Summarise: " + other[other.index(task.query_after or "[1]") :], "hello"):
        assert not prompts.parse(off).is_on_task
    (published,) = prompts.describe()["wordings"]
    assert published.startswith(template[:20])
    assert all(text not in published for text in TEXTS)


@pytest.mark.parametrize(
    "prompt",
    [
        "Summarise the plot of this film: Titanic",
        "film: tea",
        "Rate this film: tea",
        "Rate this film: tea Give a number!",
        "Rate this film:  Give a number.",
        "Would you rate this film: tea Give a number.",
    ],
)
def test_prompt_that_only_contains_the_marker_is_off_task(prompt: str) -> None:
    prompts = _prompts(RATE, [f"Rate this film: {text} Give a number." for text in TEXTS])
    assert prompts.wordings == (Wording("Rate this film: ", "Rate this film: ", " Give a number.", is_fixed=True),)
    query = prompts.parse(prompt)
    assert (query.is_on_task, query.text, query.item_text) == (False, prompt, "")


def test_query_keeps_the_closing_words_but_the_item_does_not() -> None:
    prompts = _prompts(RATE, [f"Rate this film: {text} Give a number." for text in TEXTS])
    query = prompts.parse(" Rate this film: tea, on a film: twice Give a number.\n")
    assert query.is_on_task
    assert query.text == "tea, on a film: twice Give a number.\n"
    assert query.item_text == "tea, on a film: twice"


def test_several_wordings_are_learned_side_by_side() -> None:
    templates = ["Rate this film: {}", "How good is the film: {}"]
    prompts = _prompts(RATE, [templates[n % 2].format(text) for n, text in enumerate(TEXTS)])
    assert prompts.describe()["wordings"] == ["How good is the film: {query}", "Rate this film: {query}"]
    assert prompts.parse("How good is the film: tea").is_on_task
    assert not prompts.parse("How good is it? Rate this film: tea").is_on_task


def test_words_that_vary_before_the_query_may_be_anything() -> None:
    prompts = _prompts(RATE, [f"I am {text}. Rate the film: {text}" for text in TEXTS])
    assert prompts.describe()["wordings"] == ["I am {…} Rate the film: {query}"]
    assert prompts.parse("I am Ann. Rate the film: tea").is_on_task
    assert not prompts.parse("I am Ann. Sum up the film: tea").is_on_task
    assert not prompts.parse("Ann. Rate the film: tea").is_on_task


def test_prompt_without_a_marker_is_recognized_by_its_beginning_and_end() -> None:
    prompts = _prompts(WHOLE, [f"Write a post about {text} as I would." for text in TEXTS])
    assert prompts.describe()["wordings"] == ["Write a post about {query} as I would."]
    assert prompts.parse("Write a post about tea as I would.").is_on_task
    assert not prompts.parse("Sum up what I wrote about tea.").is_on_task
    anything = _prompts(WHOLE, TEXTS)
    assert anything.parse("whatever it is").is_on_task


def test_words_of_users_in_few_prompts_are_not_wording() -> None:
    few = [f"{text}. Rate the film: {text} again." for text in ("I love it", "I love tea", "I love you")]
    prompts = _prompts(RATE, few)
    assert prompts.wordings == (Wording(),)
    assert prompts.parse("Tell me. Rate the film: tea").is_on_task  # because of the marker alone
    assert TaskPrompts(RATE, learn_wordings([])).wordings == ()


def test_full_stop_after_all_prompts_is_not_wording() -> None:
    prompts = _prompts(RATE, [f"Rate this film: {text}." for text in TEXTS])
    assert prompts.parse("Rate this film: tea").is_on_task


def test_task_without_recorded_wordings_publishes_its_marker() -> None:
    assert TaskPrompts(RATE).describe()["wordings"] == ["{…}film: {query}"]
    assert TaskPrompts(LAMP_TASKS["LaMP_1"]).describe()["query_pattern"]
