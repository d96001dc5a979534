"""PromptBuilder: retrieved items, profiles and the position of the soft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from personaplug.baselines.history_prompt import HistoryPrompt
from personaplug.baselines.prompt_builder import PromptBuilder
from personaplug.baselines.retrievers import Retrieval
from personaplug.baselines.user_profiles import UserProfile
from personaplug.config_parsing import load_config
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task_registry import lamp_task
from personaplug.errors import ConfigError, MissingData
from personaplug.run import Run, open_models

WORDS = ("ant", "bee", "cat", "dog", "eel")


def _items(owner: str) -> tuple[HistoryItem, ...]:
    return tuple(
        HistoryItem(f"{owner}{k}", (("text", f"{owner} {word}"), ("score", "3")), "score")
        for k, word in enumerate(WORDS)
    )


SAMPLE = Sample("s", "u", "Score it. review: a bee here", "a bee here", "4", _items("mine"))


PROFILE = UserProfile("key", "Likes small animals.", 0.1, offered=9, included=7, shortened=3)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    config = load_config(overrides=["llm=toy", "encoder=hash:64", "dtype=float32", "max_prompt_tokens=400"])
    run = Run.create(tmp_path_factory.mktemp("run") / "run", config=config, task=lamp_task("LaMP_3"))
    models = open_models(config)
    return PromptBuilder(run, models, table=run.open_vectors(models.encoder))


def build(
    builder: PromptBuilder,
    items: Sequence[HistoryItem],
    retrieval: Retrieval | None,
    *,
    profile: UserProfile | None = None,
    seed: int = 0,
) -> HistoryPrompt:
    profiles = None if profile is None else [profile]
    (prompt,) = builder.build([SAMPLE], [items], retrieval=retrieval, profiles=profiles, seed=seed)
    return prompt


def text(prompt: HistoryPrompt) -> str:
    assert isinstance(prompt.prompt, str)
    return prompt.prompt


def test_build_puts_the_best_items_before_the_input(builder: PromptBuilder) -> None:
    written = build(builder, SAMPLE.history, Retrieval("bm25", 2))
    assert written.prompt == '3 is the score for "mine bee", and 3 is the score for "mine eel". ' + SAMPLE.prompt
    assert text(written)[written.soft_at :] == SAMPLE.prompt
    assert (written.offered, written.included, written.shortened) == (2, 2, 0)


def test_build_with_recency_takes_the_latest_item(builder: PromptBuilder) -> None:
    prompt = text(build(builder, SAMPLE.history, Retrieval("recency", 1)))
    assert prompt.startswith('3 is the score for "mine eel". ')


def test_build_ranks_items_of_another_user_for_the_samples_query(builder: PromptBuilder) -> None:
    prompt = text(build(builder, _items("theirs"), Retrieval("bm25", 1)))
    assert prompt.startswith('3 is the score for "theirs bee". ')
    assert "mine" not in prompt


def test_build_draws_random_items_by_seed(builder: PromptBuilder) -> None:
    def drawn(seed: int) -> str:
        return text(build(builder, SAMPLE.history, Retrieval("random", 3), seed=seed))

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(8)}) > 2


def test_build_puts_the_profile_first_and_soft_tokens_before_the_input(builder: PromptBuilder) -> None:
    retrieval = Retrieval("bm25", 1)
    written = build(builder, SAMPLE.history, retrieval, profile=PROFILE)
    assert text(written).index("small animals") < text(written).index("mine bee")
    assert text(written)[written.soft_at :] == SAMPLE.prompt
    assert (written.offered, written.included, written.shortened) == (1 + 9, 1 + 7, 3)
    alone = build(builder, (), None, profile=PROFILE)
    assert text(alone)[alone.soft_at :] == SAMPLE.prompt


def test_build_without_items_returns_the_input(builder: PromptBuilder) -> None:
    written = build(builder, (), Retrieval("dense", 4))
    assert (written.prompt, written.soft_at, written.offered) == (SAMPLE.prompt, 0, 0)


def test_with_retrieved_uses_the_samples_own_items(builder: PromptBuilder) -> None:
    shown = builder.with_retrieved(SAMPLE, Retrieval("bm25", 1), seed=0)
    assert shown == replace(SAMPLE, prompt=shown.prompt, soft_at=shown.soft_at)
    assert shown.prompt[: shown.soft_at] == '3 is the score for "mine bee". '


def test_build_raises_for_an_untrained_retriever(builder: PromptBuilder, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="no trained retriever"):
        build(builder, SAMPLE.history, Retrieval("ropg", 1))


def test_error_for_an_unknown_retriever_suggests_the_nearest_name(builder: PromptBuilder) -> None:
    with pytest.raises(ConfigError, match=r"'bm52'.*'bm25'"):
        builder.retriever("bm52", seed=0)
