"""Assignment of histories: wrong users, shuffled items, and limits on items."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from personaplug.analysis.method_info import HistorySource
from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders.encoded_sample import EncodedSample, all_answers
from personaplug.errors import ConfigError
from personaplug.methods.context import assign_histories, shown_items, with_assigned_items

USERS = ["a", "a", "b", "c", "c", "c", "d"]


def _samples(users: list[str]) -> list[EncodedSample]:
    """Return samples of these users; sample k has the rows 10k to 10k + 4."""
    return [
        EncodedSample(
            id=str(k),
            owner=user,
            user_id=user,
            prompt="p",
            query="q",
            target="1",
            rows=np.arange(10 * k, 10 * k + 5),
            label_ids=np.arange(5, dtype=np.int16),
            style=np.arange(10 * k, 10 * k + 5, dtype=np.float16)[:, None],
            kind_ids=all_answers(5),
        )
        for k, user in enumerate(users)
    ]


def _texts(users: list[str]) -> list[Sample]:
    """Return the same samples with texts; the ids of the items are the rows."""
    return [
        Sample(str(k), user, "p", "q", "1", tuple(HistoryItem(str(10 * k + i), (("text", "t"),)) for i in range(5)))
        for k, user in enumerate(users)
    ]


def with_history(
    source: HistorySource, samples: list[EncodedSample], *, seed: int, latest: int = -1, kinds: str = "all"
) -> list[EncodedSample]:
    shown = [shown_items(sample.kind_ids, kinds, latest=latest) for sample in samples]
    assignments = assign_histories(source, [sample.owner for sample in samples], shown, seed=seed)
    return with_assigned_items(samples, assignments)


def test_a_wrong_user_is_always_another_user() -> None:
    samples = _samples(USERS)
    for seed in range(20):
        for sample, assigned in zip(samples, with_history("wrong-user", samples, seed=seed), strict=True):
            owner_of_rows = USERS[int(assigned.rows[0]) // 10]
            assert owner_of_rows != sample.user_id
            assert (assigned.id, assigned.query, assigned.target) == (sample.id, sample.query, sample.target)
            assert assigned.label_ids.tolist() == [0, 1, 2, 3, 4]


def test_wrong_users_are_drawn_by_seed_and_from_all_others() -> None:
    samples = _samples(USERS)

    def drawn(seed: int) -> list[int]:
        return [int(s.rows[0]) for s in with_history("wrong-user", samples, seed=seed)]

    assert drawn(1) == drawn(1)
    sources_of_the_last = {USERS[drawn(seed)[-1] // 10] for seed in range(50)}
    assert sources_of_the_last == {"a", "b", "c"}


def test_rejects_wrong_user_with_only_one_user() -> None:
    with pytest.raises(ConfigError, match="2 or more users; found 1"):
        with_history("wrong-user", _samples(["a", "a"]), seed=0)


def test_shuffled_keeps_the_items_and_their_answers_together() -> None:
    samples = _samples(USERS)
    shown = with_history("shuffled", samples, seed=0)
    assert any(after.rows.tolist() != before.rows.tolist() for before, after in zip(samples, shown, strict=True))
    for before, after in zip(samples, shown, strict=True):
        assert sorted(after.rows.tolist()) == before.rows.tolist()
        assert (after.rows % 10).tolist() == after.label_ids.tolist()


def test_own_keeps_all_items_and_none_removes_them() -> None:
    samples = _samples(USERS)
    shown = with_history("own", samples, seed=0)
    assert [s.rows.tolist() for s in shown] == [s.rows.tolist() for s in samples]
    assert all(len(shown.rows) == 0 for shown in with_history("none", samples, seed=0))


@pytest.mark.parametrize("latest", [0, 2, 9])
@pytest.mark.parametrize("source", ["own", "wrong-user", "shuffled"])
def test_only_the_latest_items_are_shown(source: HistorySource, latest: int) -> None:
    samples = _samples(USERS)
    whole = with_history(source, samples, seed=3)
    for full, limited in zip(whole, with_history(source, samples, seed=3, latest=latest), strict=True):
        kept = sorted(full.rows.tolist())[max(0, 5 - latest) :] if latest else []
        assert sorted(limited.rows.tolist()) == kept
        assert (limited.rows % 10).tolist() == limited.label_ids.tolist()


@pytest.mark.parametrize(
    ("kinds", "latest", "shown"),
    [
        ("all", -1, [0, 1, 2, 3, 4]),
        ("answers", -1, [0, 2, 4]),
        ("preferences", -1, [1, 3]),
        ("answers", 2, [2, 4]),
        ("preferences", 1, [3]),
        ("all", 3, [1, 3, 4]),  # as a plug selects them: stated preferences stay
        ("preferences", 0, []),
    ],
)
@pytest.mark.parametrize("source", ["own", "wrong-user"])
def test_only_items_of_the_selected_kinds_are_shown(
    source: HistorySource, kinds: str, latest: int, shown: list[int]
) -> None:
    kind_ids = np.array([0, 2, 1, 2, 0], dtype=np.int8)  # answer, preference, rejection, preference, answer
    samples = [replace(sample, kind_ids=kind_ids) for sample in _samples(USERS)]
    for sample in with_history(source, samples, seed=3, latest=latest, kinds=kinds):
        assert (sample.rows % 10).tolist() == shown
        assert sample.kind_ids.tolist() == kind_ids[shown].tolist()


@pytest.mark.parametrize("source", ["none", "own", "wrong-user", "shuffled"])
def test_texts_and_vectors_come_from_the_same_source_in_the_same_order(source: HistorySource) -> None:
    assignments = assign_histories(source, USERS, [np.arange(2, 5)] * len(USERS), seed=4)
    rows = [sample.rows.tolist() for sample in with_history(source, _samples(USERS), seed=4, latest=3)]
    texts = _texts(USERS)
    items = [[] if a.source is None else [texts[a.source].history[index] for index in a.items] for a in assignments]
    assert [[int(item.id) for item in history] for history in items] == rows
