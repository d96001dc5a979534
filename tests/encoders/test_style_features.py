"""Style features measure how a text is written, independent of its content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from personaplug.encoders.style_features import FEATURES, style_features_of, text_style


def _value(text: str, name: str) -> float:
    return float(text_style(text)[FEATURES.index(name)])


def _bits(text: str, part: str) -> frozenset[str]:
    style = text_style(text)
    return frozenset(
        name for name, value in zip(FEATURES, style, strict=True) if name.startswith(f"{part}_") and value > 0
    )


@pytest.mark.parametrize(
    ("name", "less", "more"),
    [
        ("words", "two words", "a headline of six words now"),
        ("letters", "so it is", "comprehensive recommendations"),
        ("capitals", "one of many", "ONE of many"),
        ("capitalized", "the quiet town", "The Quiet Town"),
        ("begins_small", "The town", "the town"),
        ("ends_marked", "the town", "the town?"),
        ("digits", "in two years", "in 2 years"),
        ("links", "see this", "see https://example.org"),
        ("symbols", "so happy", "so happy 🎉"),
        ("stops", "no", "no..."),
        ("commas", "red green", "red, green"),
        ("colons", "News today", "News: today"),
        ("exclamations", "yes", "yes!"),
        ("questions", "why", "why?"),
        ("quotes", "a word", "a “word”"),
        ("apostrophes", "its", "it\u2019s"),
        ("dashes", "well known", "well-known"),
        ("brackets", "a word", "a (word)"),
        ("hashtags", "monday", "#monday"),
        ("mentions", "you", "@you"),
    ],
)
def test_each_feature_rises_with_the_property_that_it_measures(name: str, less: str, more: str) -> None:
    assert _value(more, name) > _value(less, name)


def test_every_feature_has_a_case_above() -> None:
    marks = test_each_feature_rises_with_the_property_that_it_measures.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == {
        name for name in FEATURES if "_" not in name or name in ("begins_small", "ends_marked")
    }


def test_every_symbol_has_its_own_bits() -> None:
    emoji = "😀🎉🙏🚀😅🌻👍🔥💡🥳😂❤✨🤔💪🍕"
    bits = [_bits(f"good news {symbol}", "symbol") for symbol in emoji]
    assert all(1 <= len(symbol_bits) <= 2 for symbol_bits in bits)
    assert len(set(bits)) == len(emoji)
    assert _bits("good news 😀", "symbol") == _bits("Quite another, longer text! 😀 😀", "symbol")


def test_the_first_and_last_words_have_their_own_bits() -> None:
    text = "Hi there! It is best to iron the collar first. 🎉\nTake care!"
    assert 2 <= len(_bits(text, "opening")) <= 6
    assert 2 <= len(_bits(text, "closing")) <= 6
    assert _bits(text, "opening") == _bits("hi there, IT rains", "opening")
    assert _bits(text, "closing") == _bits("Put the collar first – take care", "closing")
    greetings = [
        _bits(f"{greeting} It is", "opening") for greeting in ("Hola!", "Bonjour!", "Hello friend!", "Good day!")
    ]
    assert len(set(greetings)) == 4


def test_words_in_the_middle_set_no_bits() -> None:
    start, end = "Hello friend! It", "all the best!"
    assert np.array_equal(text_style(f"{start} rains cats {end}"), text_style(f"{start} barks dogs {end}"))


@pytest.mark.parametrize("text", ["plain words, with marks: (yes) – no!", "नमस्ते", "e\u0301te\u0301 2024", "a\u200db"])
def test_letters_and_common_punctuation_set_no_symbol_bits(text: str) -> None:
    assert not _bits(text, "symbol")


def test_content_does_not_change_the_features() -> None:
    edges = len(FEATURES) - 64
    assert np.array_equal(text_style("Cats chase Birds")[:edges], text_style("Dogs found Stone")[:edges])


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "!", "?!?!?!" * 1000, "𝕬 ", "\x00", "ａ" * 5000, "नमस्ते दुनिया"])
def test_any_text_has_bounded_features(text: str) -> None:
    style = text_style(text)
    assert style.shape == (len(FEATURES),)
    assert style.dtype == np.float16
    assert np.isfinite(style).all()
    assert np.abs(style).max() <= 4


def test_text_without_words_has_zero_features() -> None:
    assert not text_style(" \n").any()


def test_style_features_follow_the_order_of_the_texts() -> None:
    texts = ["One", "two words", "and THREE words!"]
    assert np.array_equal(style_features_of(texts), np.stack([text_style(text) for text in texts]))
    assert style_features_of([]).shape == (0, len(FEATURES))


@pytest.mark.parametrize("page", ["privacy.md", "store.md"])
def test_docs_name_the_number_of_style_features(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    assert f"{len(FEATURES)} numbers" in text
