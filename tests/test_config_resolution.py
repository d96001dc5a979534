"""What a config leaves to the task is settled by the task."""

from __future__ import annotations

import pytest

from personaplug.config_parsing import load_config
from personaplug.config_resolution import learning_rate, resolved
from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT

RATING = Task("Stars", "rating", ("title", "stars"), "stars", ("mae",), labels=("1", "2", "3"))
TITLES = Task("Titles", "text", ("abstract", "title"), "title", ("rouge_1",))


@pytest.mark.parametrize(
    ("task", "rate"), [(CHAT, 0.1), (RATING, 0.001), (TITLES, 0.001)], ids=lambda value: str(value)
)
def test_resolved_gives_conversations_a_higher_learning_rate(task: Task, rate: float) -> None:
    assert resolved(load_config(), task).training.learning_rate == rate


def test_resolved_keeps_a_learning_rate_that_is_given() -> None:
    config = load_config(overrides=["learning_rate=0.02"])
    assert resolved(config, CHAT).training.learning_rate == 0.02


def test_learning_rate_of_shared_tasks_is_that_of_the_conversation() -> None:
    assert learning_rate(load_config(), [RATING, CHAT]) == learning_rate(load_config(), [CHAT, RATING]) == 0.1
    assert learning_rate(load_config(), [RATING, TITLES]) == 0.001


@pytest.mark.parametrize(("task", "channel"), [(CHAT, "style"), (RATING, "label"), (TITLES, "style")])
def test_resolved_chooses_the_answer_channel(task: Task, channel: str) -> None:
    assert resolved(load_config(), task).plug.answer_channel == channel
