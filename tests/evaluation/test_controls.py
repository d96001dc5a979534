"""Whose history a row sees: strangers, orders, and the latest items only."""

from __future__ import annotations

import numpy as np
import pytest

from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError
from personaplug.evaluation.controls import items_lent, lend, rows_lent
from personaplug.methods import CONDITIONS, Condition

USERS = ["a", "a", "b", "c", "c", "c", "d"]


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
            forms=np.arange(10 * k, 10 * k + 5, dtype=np.float16)[:, None],
        )
        for k, user in enumerate(users)
    ]


def _texts(users: list[str]) -> list[Sample]:
    """The same samples with items whose ids are the rows."""
    return [
        Sample(str(k), user, "p", "q", "1", tuple(HistoryItem(str(10 * k + i), (("text", "t"),)) for i in range(5)))
        for k, user in enumerate(users)
    ]


def with_history(
    condition: Condition, samples: list[EncodedSample], *, seed: int, latest: int = -1
) -> list[EncodedSample]:
    owners, sizes = [sample.owner for sample in samples], [len(sample.rows) for sample in samples]
    return rows_lent(samples, lend(condition.history, owners, sizes, seed=seed, latest=latest))


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
    with pytest.raises(ConfigError, match="2 or more users; found 1"):
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
    shown = with_history(CONDITIONS["plug"], samples, seed=0)
    assert [s.rows.tolist() for s in shown] == [s.rows.tolist() for s in samples]
    assert all(len(shown.rows) == 0 for shown in with_history(CONDITIONS["plain"], samples, seed=0))


@pytest.mark.parametrize("latest", [0, 2, 9])
@pytest.mark.parametrize("name", ["plug", "wrong-user", "shuffled"])
def test_only_the_latest_items_are_shown(name: str, latest: int) -> None:
    samples = _samples(USERS)
    whole = with_history(CONDITIONS[name], samples, seed=3)
    for all_of_them, few in zip(whole, with_history(CONDITIONS[name], samples, seed=3, latest=latest), strict=True):
        kept = sorted(all_of_them.rows.tolist())[max(0, 5 - latest) :] if latest else []
        assert sorted(few.rows.tolist()) == kept
        assert (few.rows % 10).tolist() == few.answers.tolist()


@pytest.mark.parametrize("whose", ["none", "own", "wrong-user", "shuffled"])
def test_texts_and_vectors_come_from_the_same_place_in_the_same_order(whose: str) -> None:
    lent = lend(whose, USERS, [5] * len(USERS), seed=4, latest=3)  # type: ignore[arg-type]
    condition = CONDITIONS[{"none": "plain", "own": "plug"}.get(whose, whose)]
    rows = [s.rows.tolist() for s in with_history(condition, _samples(USERS), seed=4, latest=3)]
    assert [[int(item.id) for item in items] for items in items_lent(_texts(USERS), lent)] == rows
