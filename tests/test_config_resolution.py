"""Settings that depend on the task are resolved from the task."""

from __future__ import annotations

from dataclasses import replace

import pytest

from personaplug.config import Config
from personaplug.config_parsing import load_config
from personaplug.config_resolution import resolved, with_rates
from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT

RATING = Task("Stars", "rating", ("title", "stars"), "stars", ("mae",), labels=("1", "2", "3"))
TITLES = Task("Titles", "text", ("abstract", "title"), "title", ("rouge_1",))


CHAT_RATES, OTHER_RATES = (0.1, 1), (0.001, 0.1)


def _rates(config: Config) -> tuple[float, float]:
    return config.training.learning_rate, config.training.token_learning_rate


@pytest.mark.parametrize(("task", "rates"), [(CHAT, CHAT_RATES), (RATING, OTHER_RATES), (TITLES, OTHER_RATES)])
def test_resolved_gives_conversations_higher_learning_rates(task: Task, rates: tuple[float, float]) -> None:
    assert _rates(resolved(load_config(), task)) == rates


def test_resolved_keeps_an_explicit_learning_rate() -> None:
    config = load_config(overrides=["learning_rate=0.02"])
    assert _rates(resolved(config, CHAT)) == (0.02, 1)


def test_warmup_is_longer_for_pictures_and_vectors_unless_it_is_given() -> None:
    pictured = [replace(RATING, image_field="photo"), replace(RATING, vector_field="embedding")]
    assert [resolved(load_config(), task).training.warmup_ratio for task in (RATING, *pictured)] == [0.05, 0.2, 0.2]
    assert with_rates(load_config(), [RATING, pictured[0]]).training.warmup_ratio == 0.2
    assert resolved(load_config(overrides=["warmup_ratio=0.1"]), pictured[0]).training.warmup_ratio == 0.1


def test_shared_tasks_have_the_learning_rates_of_the_conversation() -> None:
    for tasks in ([RATING, CHAT], [CHAT, RATING]):
        assert _rates(with_rates(load_config(), tasks)) == CHAT_RATES
    assert _rates(with_rates(load_config(), [RATING, TITLES])) == OTHER_RATES


@pytest.mark.parametrize(("task", "channel"), [(CHAT, "style"), (RATING, "label"), (TITLES, "style")])
def test_resolved_chooses_the_answer_channel(task: Task, channel: str) -> None:
    assert resolved(load_config(), task).plug.answer_channel == channel
