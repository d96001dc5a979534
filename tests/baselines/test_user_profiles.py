"""User profiles: generated once per history and cached on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from personaplug.baselines.user_profiles import ProfileGenerator
from personaplug.config import RetrievalConfig
from personaplug.data.records import HistoryItem
from personaplug.data.task_registry import lamp_task
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


def test_profile_on_disk_is_not_generated_again(tmp_path: Path, toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.jsonl"
    histories = [_items("warm"), _items("cold")]
    whole = _profiles(path, toy).generate(histories)
    path.write_text(path.read_text().splitlines()[0] + '\n{"key": "cut off')
    asked: list[int] = []
    real = toy.generate

    def told(batch: PromptBatch, config: GenerationConfig) -> Any:
        asked.append(len(batch.prompts))
        return real(batch, config)

    monkeypatch.setattr(toy, "generate", told)
    assert [profile.text for profile in _profiles(path, toy).generate(histories)] == [profile.text for profile in whole]
    assert asked == [1]


def test_profile_of_another_length_has_another_key(tmp_path: Path, toy: CausalLM) -> None:
    path = tmp_path / "p.jsonl"
    long = _profiles(path, toy).generate([_items("warm")])[0]
    short = _profiles(path, toy, RetrievalConfig(profile_tokens=4)).generate([_items("warm")])[0]
    assert short.key != long.key
    assert len(short.text) < len(long.text)
