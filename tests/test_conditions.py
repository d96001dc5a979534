"""Rows of a table: whose history a plug is shown."""

from __future__ import annotations

import numpy as np
import pytest

from personaplug.conditions import CONDITIONS, parse_conditions, with_history
from personaplug.errors import BadConfig
from personaplug.samples import EncodedSample


def _samples(users: list[str]) -> list[EncodedSample]:
    """Sample k of these users has the rows 10k … 10k + 4."""
    return [
        EncodedSample(
            id=str(k),
            owner=user,
            user_id=user,
            prompt="p",
            query="q",
            target="1",
            rows=np.arange(10 * k, 10 * k + 5),
            answers=np.arange(5, dtype=np.int16),
        )
        for k, user in enumerate(users)
    ]


USERS = ["a", "a", "b", "c", "c", "c", "d"]


def test_a_wrong_user_is_always_another_user() -> None:
    samples = _samples(USERS)
    for seed in range(20):
        for sample, lent in zip(samples, with_history(CONDITIONS["wrong-user"], samples, seed=seed), strict=True):
            owner_of_rows = USERS[int(lent.rows[0]) // 10]
            assert owner_of_rows != sample.user_id
            assert (lent.id, lent.query, lent.target) == (sample.id, sample.query, sample.target)
            assert lent.answers.tolist() == [0, 1, 2, 3, 4]


def test_wrong_users_are_drawn_by_seed_and_from_all_others() -> None:
    samples = _samples(USERS)

    def drawn(seed: int) -> list[int]:
        return [int(s.rows[0]) for s in with_history(CONDITIONS["wrong-user"], samples, seed=seed)]

    assert drawn(1) == drawn(1)
    lent_to_the_last = {USERS[drawn(seed)[-1] // 10] for seed in range(50)}
    assert lent_to_the_last == {"a", "b", "c"}


def test_one_user_alone_has_no_stranger() -> None:
    with pytest.raises(BadConfig, match="2 or more users; found 1"):
        with_history(CONDITIONS["wrong-user"], _samples(["a", "a"]), seed=0)


def test_shuffled_keeps_the_items_and_their_answers_together() -> None:
    samples = _samples(USERS)
    shown = with_history(CONDITIONS["shuffled"], samples, seed=0)
    assert any(after.rows.tolist() != before.rows.tolist() for before, after in zip(samples, shown, strict=True))
    for before, after in zip(samples, shown, strict=True):
        assert sorted(after.rows.tolist()) == before.rows.tolist()
        assert (after.rows % 10).tolist() == after.answers.tolist()


def test_own_and_none() -> None:
    samples = _samples(USERS)
    assert with_history(CONDITIONS["plug"], samples, seed=0) == samples
    assert all(len(shown.rows) == 0 for shown in with_history(CONDITIONS["plain"], samples, seed=0))


@pytest.mark.parametrize("text", ["", "plug,plug", "plug,nonsense", ","])
def test_bad_lists_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="instruction-only"):
        parse_conditions(text)


def test_a_list_is_read_in_order() -> None:
    assert [c.name for c in parse_conditions(" plug, plain")] == ["plug", "plain"]
