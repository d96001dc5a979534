"""ROUGE in any script: known cases, equality with LaMP's ROUGE on English, and a warning for other scripts."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaplug.analysis import metrics
from personaplug.analysis.metrics import get_metric
from personaplug.analysis.words import ascii_words, is_read_by_ascii_words, unicode_words
from personaplug.data.task_registry import parse_task

TEXTS = [
    "Привет, мир", "我喜欢这部电影", "मुझे यह फ़िल्म पसंद आई", "これは本です", "สวัสดีครับ", "안녕하세요 세계", "שלום עולם",
    "مرحبا بالعالم", "می‌خواهم", "Ελλάδα", "ខ្ញុំ", "Đây là phim hay",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_equal_texts_of_any_script_score_1(text: str) -> None:
    for name in ("rouge_1_unicode", "rouge_l_unicode"):
        assert get_metric(name).score([text], [text]) == 1
        assert get_metric(name).score([text], ["xyz"]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Кот сидел, кот СПАЛ!", ["кот", "сидел", "кот", "спал"]),
        ("我喜欢GPT4模型", ["我", "喜", "欢", "gpt4", "模", "型"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("が本", ["が", "本"]),
        ("น้ำ", ["น้ํ", "า"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("ｆｕｌｌ１２", ["full12"]),
        ("Straße", ["strasse"]),
        ("می‌خواهم a", ["میخواهم", "a"]),
        ("don't stop_me", ["don", "t", "stop", "me"]),
        ("… 😀 \u200d\u0301", ["\u0301"]),
        ("", []),
    ],
)
def test_words_of_known_cases(text: str, words: list[str]) -> None:
    assert unicode_words(text) == words


@pytest.mark.parametrize(
    ("prediction", "gold", "rouge_1", "rouge_l"),
    [
        ("кот сидел", "Кот сидел тихо", 4 / 5, 4 / 5),
        ("сидел кот", "кот сидел", 1, 1 / 2),
        ("我喜欢书", "我喜欢电影", 6 / 9, 6 / 9),
        ("", "我", 0, 0),
    ],
)
def test_rouge_of_other_scripts(prediction: str, gold: str, rouge_1: float, rouge_l: float) -> None:
    assert get_metric("rouge_1_unicode").score([prediction], [gold]) == pytest.approx(rouge_1)
    assert get_metric("rouge_l_unicode").score([prediction], [gold]) == pytest.approx(rouge_l)


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_english_scores_equal_lamps_rouge(prediction: str, gold: str) -> None:
    assert unicode_words(prediction) == ascii_words(prediction)
    for name in ("rouge_1", "rouge_l"):
        expected = get_metric(name).score([prediction], [gold])
        assert get_metric(f"{name}_unicode").score([prediction], [gold]) == expected


@given(st.text())
def test_words_of_any_text_are_nonempty_and_equal_in_equal_texts(text: str) -> None:
    assert all(unicode_words(text))
    assert get_metric("rouge_1_unicode").score([text], [text]) == (1 if unicode_words(text) else 0)


def test_metrics_may_be_named_in_a_task() -> None:
    names = ["rouge_1_unicode", "rouge_l_unicode"]
    task = parse_task({"name": "T", "kind": "text", "item_fields": ["t"], "metrics": names})
    assert [get_metric(name).name for name in task.metrics] == names


@pytest.mark.parametrize(
    ("text", "is_read"),
    [("", True), ("12 …", True), ("English", True), ("café très", True), ("мир", False),
     ("2024 год", False), ("iPhone手机", True)],
)  # fmt: skip
def test_script_of_a_text_is_detected(text: str, is_read: bool) -> None:
    assert is_read_by_ascii_words(text) == is_read


@pytest.mark.parametrize(
    ("golds", "warnings"), [(TEXTS, 1), (["a b"] * 9 + ["мир"], 1), (["a b"] * 19 + ["мир"], 0), (["a"], 0), ([], 0)]
)
def test_lamps_rouge_warns_once_about_references_that_it_cannot_read(
    caplog: pytest.LogCaptureFixture, golds: list[str], warnings: int
) -> None:
    metrics._warn_of_other_scripts.cache_clear()
    with caplog.at_level(logging.WARNING, logger="personaplug"):
        for name in ("rouge_1", "rouge_l", "rouge_1_unicode"):
            get_metric(name).score(golds, golds)
    assert len(caplog.records) == warnings
    assert all("rouge_1_unicode" in record.getMessage() for record in caplog.records)
