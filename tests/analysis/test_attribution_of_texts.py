"""Attribution of texts to users, on users with habits that a model of characters can tell apart."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest

from personaplug.analysis.attribution_of_texts import CANDIDATES, MIN_USERS, AuthorModels, without_copies
from personaplug.analysis.metric_base import value_of
from personaplug.analysis.metrics import get_metric
from personaplug.analysis.ranking import chance_of_first, expected_reciprocal_rank
from personaplug.analysis.significance import per_group_mean

WORDS = [
    first + last for first in ("bar", "col", "den", "fir", "gar", "hol", "mar") for last in ("ba", "den", "ket", "low")
]


def _text(user: int, rng: random.Random) -> str:
    """Return a text with the favourite word and mark of a user."""
    words = [*rng.sample(WORDS, 4), f"zq{user:02d}x"]
    rng.shuffle(words)
    return " ".join(words) + "!?;:~"[user % 5] * 2


def _answers(users: int, *, texts: int = 8, seed: int = 0) -> dict[str, list[str]]:
    rng = random.Random(seed)
    return {f"u{user}": [_text(user, rng) for _ in range(texts)] for user in range(users)}


def _value(models: AuthorModels, texts: list[str], owners: list[str], *, name: str = "attribution") -> float:
    return value_of(models.statistics(texts, owners)[name], get_metric(name))


@pytest.mark.parametrize("users", [MIN_USERS, CANDIDATES + 3])
def test_texts_are_attributed_to_their_writers_and_not_to_strangers(users: int) -> None:
    models = AuthorModels(_answers(users), references=[])
    assert sum(len(one.users) for one in models.rounds) == users
    assert max(len(one.users) for one in models.rounds) <= CANDIDATES
    written = _answers(users, texts=3, seed=1)
    owners = [owner for owner, texts in written.items() for _ in texts]
    own = [text for texts in written.values() for text in texts]
    others = own[3:] + own[:3]
    for name in ("attribution", "attribution_top1"):
        assert _value(models, own, owners, name=name) > 0.95
        assert _value(models, others, owners, name=name) < 0.55


def test_rounds_have_similar_sizes_and_depend_on_the_seed() -> None:
    answers = _answers(CANDIDATES + 1, texts=2)
    rounds = [[one.users for one in AuthorModels(answers, [], seed=seed).rounds] for seed in (0, 0, 1)]
    assert [len(users) for users in rounds[0]] == [11, 10]
    assert rounds[0] == rounds[1] != rounds[2]


def test_each_user_counts_once_in_bundles_of_up_to_four_texts() -> None:
    models = AuthorModels(_answers(MIN_USERS), references=[])
    texts = {owner: texts[0] for owner, texts in _answers(3, seed=2).items()}
    # Five samples of u0 are two bundles: three texts of u0, two of u1. The one text of u1 is its own.
    written = [texts["u0"]] * 3 + [texts["u1"]] * 2 + [texts["u1"]]
    statistics = models.statistics(written, ["u0"] * 5 + ["u1"])["attribution_top1"]
    assert statistics[:, 1].tolist() == pytest.approx([0.2] * 5 + [1])
    assert statistics[:, 0].tolist() == pytest.approx([0.2] * 3 + [0] * 2 + [1])
    assert value_of(statistics, get_metric("attribution_top1")) == pytest.approx((0.6 + 1) / 2)


def test_users_without_past_answers_do_not_count() -> None:
    models = AuthorModels({**_answers(MIN_USERS), "silent": [], "short": ["a", "  "]}, references=[])
    statistics = models.statistics(["x", "y"], ["silent", "u0"])["attribution"]
    assert statistics[:, 1].tolist() == [0, 1]
    assert models.statistics(["x"], ["silent"]) == {}
    assert AuthorModels(_answers(MIN_USERS - 1), references=[]).statistics(["a"], ["u0"]) == {}


def test_repeated_past_answers_are_at_the_chance_level() -> None:
    answers = _answers(10)
    models = AuthorModels(answers, references=[])
    owners = [owner for owner, texts in answers.items() for _ in texts]
    repeated = [f"{text.upper()} !" for texts in answers.values() for text in texts]
    assert _value(models, repeated, owners) == pytest.approx(np.mean(1 / np.arange(1, 11)))
    assert _value(models, repeated, owners, name="attribution_top1") == pytest.approx(1 / 10)
    # One new text decides a bundle of four.
    new = {owner: texts[0] for owner, texts in _answers(10, seed=1).items()}
    mixed = [text for owner, texts in answers.items() for text in (new[owner], *texts[:3])]
    assert _value(models, mixed, [owner for owner in answers for _ in range(4)]) > 0.9


def test_latest_answers_and_first_characters_count() -> None:
    answers = _answers(MIN_USERS, texts=50)
    early = {owner: ["zq99x zq99x zq99x!", *texts] for owner, texts in answers.items()}
    late = {owner: [f"{text:1000}zq99x" for text in texts] for owner, texts in answers.items()}
    for changed in (early, late):
        (one_round,) = AuthorModels(changed, references=[]).rounds
        assert not [ngram for ngram in one_round.vectorizer.vocabulary_ if "99" in ngram]
    (one_round,) = AuthorModels({**answers, "u0": [*answers["u0"], "zq99x!"]}, references=[]).rounds
    assert "99x" in one_round.vectorizer.vocabulary_


def test_each_user_counts_once_so_that_there_is_no_average_over_users() -> None:
    statistics = AuthorModels(_answers(MIN_USERS), references=[]).statistics(["x", "y"], ["u0", "nobody"])
    for name, values in statistics.items():
        assert np.isnan(per_group_mean(values, [0, 1], get_metric(name)))
        assert not get_metric(name).averages_over_users


def test_copies_of_right_answers_are_left_out_of_the_training_texts() -> None:
    reference = "The quick brown fox jumps over one lazy dog"
    answers = {
        "same": [reference, f"  {reference} ", "kept"],
        "near": ["the QUICK brown fox jumps over a lazy dog!", "The quick brown fox sleeps late", "kept", "kept"],
        "marks": ["?!", "...", " "],
    }
    assert without_copies(answers, [reference, "..."]) == {
        "same": ["kept"],
        "near": ["The quick brown fox sleeps late", "kept"],
        "marks": ["?!"],
    }
    assert without_copies({"u": ["a b", ""]}, []) == {"u": ["a b"]}


def test_texts_that_contain_another_repeat_it_from_four_words_on() -> None:
    reference = "we met on Monday near the old river and talked about trains for many hours"
    answers = ["met on Monday near", "met on Monday", f"{reference}. " + "Then came words of another kind. " * 9]
    assert without_copies({"u": [*answers, "met on Monday again, sadly"]}, [reference]) == {
        "u": ["met on Monday", "met on Monday again, sadly"]
    }


def test_leaked_right_answers_do_not_count_as_repeated() -> None:
    """Right answers keep their score if the histories hold copies of them, because these are left out."""
    written = _answers(10, texts=1, seed=1)
    references, owners = [texts[0] for texts in written.values()], [*written]
    answers = {owner: [*texts, f"{written[owner][0]} !"] for owner, texts in _answers(10).items()}
    assert _value(AuthorModels(answers, references), references, owners) > 0.95
    assert _value(AuthorModels(answers, []), references, owners) < 0.5


def test_fitting_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AuthorModels(_answers(6, texts=30), references=[])


def test_equal_scores_rank_as_in_random_order() -> None:
    assert expected_reciprocal_rank(np.array([3.0, 2.0, 1.0]), 1) == 0.5
    assert expected_reciprocal_rank(np.array([3.0, 1.0, 1.0]), 2) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert expected_reciprocal_rank(np.zeros(4), 0) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert expected_reciprocal_rank(np.array([np.nan, 0.0]), 0) == 0.5
    assert expected_reciprocal_rank(np.array([-np.inf, 0.0]), 1) == 1
    assert expected_reciprocal_rank(np.array([1.0, 1.000001]), 0) == 0.5
    assert expected_reciprocal_rank(np.array([1.0, 1.000001]), 0, tolerance=1e-5) == 0.75
    assert chance_of_first(np.array([1.0, 1.0, 0.0]), 1) == 0.5
    assert chance_of_first(np.array([1.0, 2.0]), 0) == 0
