"""User profiles: generated once per history and cached on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from personaplug.baselines.user_profiles import ProfileGenerator
from personaplug.config import RetrievalConfig
from personaplug.data.records import HistoryItem
from personaplug.data.task_registry import CHAT, lamp_task
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM

LONG = RetrievalConfig(profile_tokens=12)


def _items(*texts: str) -> tuple[HistoryItem, ...]:
    return tuple(HistoryItem(str(k), (("text", text), ("score", "4")), "score") for k, text in enumerate(texts))


def _profiles(path: Path, toy: CausalLM, config: RetrievalConfig = LONG) -> ProfileGenerator:
    return ProfileGenerator(path, task=lamp_task("LaMP_3"), llm=toy, config=config)


def test_profile_is_generated_once_per_history(tmp_path: Path, toy: CausalLM) -> None:
    histories = [_items("warm and dry", "wet"), _items("cold"), (), _items("cold")]
    first, second, nobody, third = _profiles(tmp_path / "p.jsonl", toy).generate(histories)
    assert first.text
    assert first.key != second.key
    assert second == third
    assert (nobody.text, nobody.seconds) == ("", 0.0)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2


def test_cached_profile_is_not_generated_again(tmp_path: Path, toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.jsonl"
    histories = [_items("warm"), _items("cold")]
    whole = _profiles(path, toy).generate(histories)
    path.write_text(path.read_text().splitlines()[0] + '\n{"key": "cut off')
    batch_sizes: list[int] = []
    real = toy.generate

    def recording_generate(batch: PromptBatch, config: GenerationConfig) -> Any:
        batch_sizes.append(len(batch.prompts))
        return real(batch, config)

    monkeypatch.setattr(toy, "generate", recording_generate)
    assert [profile.text for profile in _profiles(path, toy).generate(histories)] == [profile.text for profile in whole]
    assert batch_sizes == [1]


def test_profile_with_another_length_limit_has_another_key(tmp_path: Path, toy: CausalLM) -> None:
    path = tmp_path / "p.jsonl"
    long = _profiles(path, toy).generate([_items("warm")])[0]
    short = _profiles(path, toy, RetrievalConfig(profile_tokens=4)).generate([_items("warm")])[0]
    assert short.key != long.key
    assert len(short.text) < len(long.text)


def test_profile_of_a_conversation_uses_kept_exchanges_and_preferences(
    tmp_path: Path, toy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []
    real = toy.generate

    def recording_generate(batch: PromptBatch, config: GenerationConfig) -> Any:
        requests.extend(str(prompt) for prompt in batch.prompts)
        return real(batch, config)

    monkeypatch.setattr(toy, "generate", recording_generate)
    fields = (("question", "How are you?"), ("answer", "fine, thanks " * 40))
    items = (
        HistoryItem("1", fields, "answer"),
        HistoryItem("2", (("question", "So?"), ("answer", "NO")), "answer", kind="rejection"),
        HistoryItem("3", (("preference", "Lower case, please"),), kind="preference"),
    )
    generator = ProfileGenerator(tmp_path / "p.jsonl", task=CHAT, llm=toy, config=LONG)
    (profile,) = generator.generate([items])
    (request,) = requests
    assert request.startswith("preference: Lower case, please, and question: How are you? answer: fine, thanks")
    assert "NO" not in request
    assert (profile.offered, profile.included, profile.shortened) == (2, 2, 1), "a long answer is cut, not left out"
    assert not toy.measure([request])[0].truncated


def test_profile_request_has_the_preference_without_the_tasks_wording(tmp_path: Path, toy: CausalLM) -> None:
    generator = _profiles(tmp_path / "p.jsonl", toy)
    preference = HistoryItem("p", (("preference", "No spoilers"),), kind="preference")
    request = generator.formatter.format("Who?", [preference, *_items("warm")]).prompt
    assert request == 'preference: No spoilers, and 4 is the score for "warm". Who?'
