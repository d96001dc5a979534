"""The metrics of keywords on known cases."""

from __future__ import annotations

import pytest

from personaplug.analysis.metrics import get_metric
from personaplug.data.tastes import keywords_met, read_keywords

GOLD = "teal, stars, striped, sea, calm"


@pytest.mark.parametrize(
    ("text", "all_five", "pictures", "texts"),
    [
        (GOLD, 1, 1, 1),
        ("Calm sea: striped teal STARS!", 1, 1, 1),
        ("teal, stars, striped", 3 / 5, 1, 0),
        ("sea, calm", 2 / 5, 0, 1),
        ("blue, teal, circles, dotted, sea, cheerful", 1 / 5, 0, 1 / 2),  # the first color counts
        ("a seaside of starfish", 0, 0, 0),  # words that only contain a keyword
        ("", 0, 0, 0),
    ],
)
def test_share_of_the_attributes_in_a_text(text: str, all_five: float, pictures: float, texts: float) -> None:
    expected = {"keywords": all_five, "keywords_pictures": pictures, "keywords_texts": texts}
    assert {name: get_metric(name).score([text], [GOLD]) for name in expected} == pytest.approx(expected)


def test_each_attribute_has_a_metric() -> None:
    texts = ["red, stars, striped, city, calm", GOLD]
    scores = {name: get_metric(f"keywords_{name}").score(texts, [GOLD, GOLD]) for name in read_keywords(GOLD)}
    assert scores == {"color": 0.5, "shape": 1, "texture": 1, "theme": 0.5, "mood": 1}


def test_the_mean_is_over_samples() -> None:
    assert get_metric("keywords").score([GOLD, ""], [GOLD, GOLD]) == 0.5


def test_an_attribute_that_the_reference_lacks_does_not_count_as_met() -> None:
    assert keywords_met(GOLD, "red, sea") == {"color": False, "theme": True}
