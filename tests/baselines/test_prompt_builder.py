"""Prompts with texts of a history: whose texts, which of them, and where the soft tokens go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from personaplug.baselines.prompt_builder import PromptBuilder
from personaplug.baselines.retrievers import Retrieval
from personaplug.baselines.user_profiles import Profile
from personaplug.config_parsing import load_config
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task_registry import lamp_task
from personaplug.errors import MissingData
from personaplug.run import Run, open_models

WORDS = ("ant", "bee", "cat", "dog", "eel")


def _items(owner: str) -> tuple[HistoryItem, ...]:
    return tuple(
        HistoryItem(f"{owner}{k}", (("text", f"{owner} {word}"), ("score", "3")), "score")
        for k, word in enumerate(WORDS)
    )


SAMPLE = Sample("s", "u", "Score it. review: a bee here", "a bee here", "4", _items("mine"))


PROFILE = Profile("key", "Likes small animals.", 0.1, offered=9, written=7, shortened=3)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    config = load_config(overrides=["llm=toy", "encoder=hash:64", "dtype=float32", "max_prompt_tokens=400"])
    run = Run.create(tmp_path_factory.mktemp("run") / "run", config=config, task=lamp_task("LaMP_3"))
    models = open_models(config)
    return PromptBuilder(run, models, table=run.open_vectors(models.encoder))


def test_the_best_items_come_first_and_the_input_stays_whole(maker: PromptBuilder) -> None:
    written = maker.written(SAMPLE, SAMPLE.history, retrieval=Retrieval("bm25", 2), seed=0)
    assert written.prompt == '3 is the score for "mine bee", and 3 is the score for "mine eel". ' + SAMPLE.prompt
    assert written.prompt[written.soft_at :] == SAMPLE.prompt
    assert (written.offered, written.written, written.shortened) == (2, 2, 0)


def test_recency_takes_the_latest(maker: PromptBuilder) -> None:
    prompt = maker.written(SAMPLE, SAMPLE.history, retrieval=Retrieval("recency", 1), seed=0).prompt
    assert prompt.startswith('3 is the score for "mine eel". ')


def test_a_strangers_items_are_ranked_for_the_samples_own_query(maker: PromptBuilder) -> None:
    prompt = maker.written(SAMPLE, _items("theirs"), retrieval=Retrieval("bm25", 1), seed=0).prompt
    assert prompt.startswith('3 is the score for "theirs bee". ')
    assert "mine" not in prompt


def test_drawn_items_depend_on_the_seed(maker: PromptBuilder) -> None:
    def drawn(seed: int) -> str:
        return maker.written(SAMPLE, SAMPLE.history, retrieval=Retrieval("random", 3), seed=seed).prompt

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(8)}) > 2


def test_a_profile_stands_in_front_and_soft_tokens_right_before_the_input(maker: PromptBuilder) -> None:
    retrieval = Retrieval("bm25", 1)
    written = maker.written(SAMPLE, SAMPLE.history, retrieval=retrieval, profile=PROFILE, seed=0)
    assert written.prompt.index("small animals") < written.prompt.index("mine bee")
    assert written.prompt[written.soft_at :] == SAMPLE.prompt
    assert (written.offered, written.written, written.shortened) == (1 + 9, 1 + 7, 3)
    alone = maker.written(SAMPLE, (), retrieval=None, profile=PROFILE, seed=0)
    assert alone.prompt[alone.soft_at :] == SAMPLE.prompt


def test_without_items_the_prompt_is_the_input(maker: PromptBuilder) -> None:
    written = maker.written(SAMPLE, (), retrieval=Retrieval("dense", 4), seed=0)
    assert (written.prompt, written.soft_at, written.offered) == (SAMPLE.prompt, 0, 0)


def test_training_samples_get_their_own_items(maker: PromptBuilder) -> None:
    shown = maker.retrieved(SAMPLE, Retrieval("bm25", 1), seed=0)
    assert shown == replace(SAMPLE, prompt=shown.prompt, soft_at=shown.soft_at)
    assert shown.prompt[: shown.soft_at] == '3 is the score for "mine bee". '


def test_a_learned_retriever_has_to_be_trained(maker: PromptBuilder, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="no trained retriever"):
        maker.written(SAMPLE, SAMPLE.history, retrieval=Retrieval("ropg", 1), seed=0)
