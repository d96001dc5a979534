"""The rules that split text into sentences and words. `make check` compares the pages with their limits."""

from __future__ import annotations

import pytest
from sentence_lengths import ROOT, percentile_90, sentences, word_counts


def test_sentences_end_at_punctuation_before_a_new_sentence() -> None:
    assert sentences("It costs 0.5 s, e.g. on a laptop. Then `a.b()` runs! Why? (Because.)") == [
        "It costs 0.5 s, e.g. on a laptop",
        "Then Code runs",
        "Why",
        "(Because",
    ]


def test_each_list_item_is_a_paragraph() -> None:
    assert sentences("Rows are\n\n- one of many\n  lines\n2. two\n> quoted") == [
        "Rows are",
        "one of many lines",
        "two",
        "quoted",
    ]


@pytest.mark.parametrize(
    "markdown",
    [
        "# A heading.",
        "| a | table. |",
        "```\nA line. Of code.\n```",
        "   ```sh\n   A line. Of code.\n   ```",
        "<!-- a. comment\n\nof lines. -->",
        "",
    ],
)
def test_non_prose_has_no_sentences(markdown: str) -> None:
    assert sentences(markdown) == []


def test_links_count_as_their_words_and_code_as_one_word() -> None:
    assert word_counts("See [the long page](docs/page.md) on `personaplug train --data DIR`.") == [6]


def test_percentile_90_is_the_length_of_an_actual_sentence() -> None:
    assert percentile_90([1] * 9 + [40]) == 40
    assert percentile_90([1] * 10 + [40]) == 1


def test_readme_has_fewer_than_1500_words() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1500
