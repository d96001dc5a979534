"""Attribution of texts to users, on users with habits that a model of characters can tell apart."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest

from personaplug.analysis.attribution_of_texts import CANDIDATES, AuthorModels, without_copies
from personaplug.analysis.metric_base import value_of
from personaplug.analysis.metrics import get_metric
from personaplug.analysis.ranking import chance_of_first, expected_reciprocal_rank

WORDS = ["river", "stone", "light", "market", "summer", "winter", "garden", "window", "paper", "coffee", "train"]


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


@pytest.mark.parametrize("users", [2, 5, CANDIDATES + 3])
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
    models = AuthorModels(_answers(3), references=[])
    texts = {owner: texts[0] for owner, texts in _answers(3, seed=2).items()}
    # Five samples of u0 are two bundles: three texts of u0, two of u1. The one text of u1 is its own.
    written = [texts["u0"]] * 3 + [texts["u1"]] * 2 + [texts["u1"]]
    statistics = models.statistics(written, ["u0"] * 5 + ["u1"])["attribution_top1"]
    assert statistics[:, 1].tolist() == pytest.approx([0.2] * 5 + [1])
    assert statistics[:, 0].tolist() == pytest.approx([0.2] * 3 + [0] * 2 + [1])
    assert value_of(statistics, get_metric("attribution_top1")) == pytest.approx((0.6 + 1) / 2)


def test_users_without_past_answers_do_not_count() -> None:
    models = AuthorModels({**_answers(3), "silent": [], "short": ["a", "  "]}, references=[])
    statistics = models.statistics(["x", "y"], ["silent", "u0"])["attribution"]
    assert statistics[:, 1].tolist() == [0, 1]
    assert models.statistics(["x"], ["silent"]) == {}
    assert AuthorModels({"u0": ["one text"], "u1": []}, references=[]).statistics(["a"], ["u0"]) == {}


def test_copies_of_right_answers_are_left_out_of_the_training_texts() -> None:
    reference = "The quick brown fox jumps over one lazy dog"
    answers = {
        "same": [reference, f"  {reference} ", "kept"],
        "near": ["the QUICK brown fox jumps over a lazy dog!", "The quick brown fox sleeps", "kept", "kept"],
        "marks": ["?!", "...", " "],
    }
    assert without_copies(answers, [reference, "..."]) == {
        "same": ["kept"],
        "near": ["The quick brown fox sleeps", "kept"],
        "marks": ["?!"],
    }
    assert without_copies({"u": ["a b", ""]}, []) == {"u": ["a b"]}


def test_leaked_right_answers_do_not_help() -> None:
    """Right answers without any habit are attributed by chance, even if the histories hold copies of them."""
    rng = random.Random(3)
    references = [" ".join(rng.choices("abcdefghijklmnop", k=40)) for _ in range(40)]
    owners = [f"u{index % 20}" for index in range(40)]
    answers = {owner: [*texts, f"{references[index]} !"] for index, (owner, texts) in enumerate(_answers(20).items())}
    assert _value(AuthorModels(answers, references), references, owners) < 0.35
    assert _value(AuthorModels(answers, []), references, owners) > 0.5


def test_fitting_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AuthorModels(_answers(4, texts=30), references=[])


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
