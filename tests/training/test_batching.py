"""Validation split, batches and sub-histories: they depend only on seeds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from personaplug.encoders.encoded_sample import EncodedSample, all_answers
from personaplug.errors import ConfigError
from personaplug.training.batching import Augmentation, augment_history, epoch_batches, micro_batches, user_split


def _sample(name: int, user: str, *, items: int = 10) -> EncodedSample:
    return EncodedSample(
        id=str(name),
        owner=user,
        user_id=user,
        prompt="p",
        query="q",
        target="1",
        rows=np.arange(items),
        label_ids=np.arange(items, dtype=np.int16),
        style=np.arange(items, dtype=np.float16)[:, None],
        kind_ids=all_answers(items),
    )


SAMPLES = [_sample(i, f"u{i % 20}") for i in range(100)]


def test_user_split_puts_no_user_on_both_sides() -> None:
    train, validation = user_split(SAMPLES, share=0.2, limit=1000, seed=0)
    assert {s.owner for s in train}.isdisjoint({s.owner for s in validation})
    assert (len(train), len(validation)) == (80, 20)
    assert user_split(SAMPLES, share=0.2, limit=1000, seed=0) == (train, validation)
    assert user_split(SAMPLES, share=0.2, limit=1000, seed=1)[1] != validation


def test_user_split_limits_validation_and_never_leaves_it_empty() -> None:
    assert len(user_split(SAMPLES, share=0.5, limit=7, seed=0)[1]) == 7
    assert len({s.owner for s in user_split(SAMPLES, share=0.001, limit=7, seed=0)[1]}) == 1
    with pytest.raises(ConfigError, match=r"2 or more users.*found 1"):
        user_split(SAMPLES[:1], share=0.5, limit=7, seed=0)


@pytest.mark.parametrize(("size", "views"), [(16, 0), (16, 3), (7, 1), (200, 0), (1, 0)])
def test_epoch_batches_have_every_augmentation_once_in_even_sizes(size: int, views: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 90, size=100).tolist()
    batches = epoch_batches(lengths, batch_size=size, views=views, seed=0, epoch=0)
    seen = Counter(view for batch in batches for view in batch)
    assert seen == Counter({Augmentation(i, v): 1 for i in range(100) for v in range(1 + views)})
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert batches == epoch_batches(lengths, batch_size=size, views=views, seed=0, epoch=0)
    if size < 200:
        assert batches != epoch_batches(lengths, batch_size=size, views=views, seed=0, epoch=1)


def test_epoch_batches_waste_less_padding_than_a_random_order() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 300, size=2000).tolist()

    def padded(batches: list[list[int]]) -> int:
        return sum(max(batch) * len(batch) for batch in batches)

    bucketed = epoch_batches(lengths, batch_size=16, views=0, seed=0, epoch=0)
    random = rng.permutation(lengths).reshape(-1, 16).tolist()
    assert padded([[lengths[v.index] for v in batch] for batch in bucketed]) < 1.1 * sum(lengths) < 0.7 * padded(random)


def test_variant_drops_between_one_item_and_half_and_keeps_the_order() -> None:
    sample = _sample(0, "u")
    sizes = set()
    for number in range(1, 200):
        rows = augment_history(sample, Augmentation(0, number), seed=0, epoch=0).rows.tolist()
        sizes.add(len(rows))
        assert rows == sorted(rows)
    assert sizes == {5, 6, 7, 8, 9}
    assert augment_history(sample, Augmentation(0, 0), seed=0, epoch=0) is sample


def test_variant_keeps_answers_with_their_items_and_repeats_by_seed() -> None:
    sample = _sample(0, "u")
    view = augment_history(sample, Augmentation(0, 3), seed=0, epoch=1)
    assert view.rows.tolist() == view.label_ids.tolist()
    assert view.rows.tolist() == augment_history(sample, Augmentation(0, 3), seed=0, epoch=1).rows.tolist()


@pytest.mark.parametrize("items", [0, 1])
def test_variant_keeps_the_shortest_histories_whole(items: int) -> None:
    sample = _sample(0, "u", items=items)
    assert len(augment_history(sample, Augmentation(0, 1), seed=0, epoch=0).rows) == items


@pytest.mark.parametrize("count", [1, 15, 16, 17, 23, 40, 72])
def test_epoch_batches_never_exceed_the_batch_size(count: int) -> None:
    batches = epoch_batches([5] * count, batch_size=16, views=0, seed=0, epoch=0)
    assert max(map(len, batches)) <= 16
    assert sum(map(len, batches)) == count


def test_micro_batches_limit_padded_tokens_and_have_every_sample_once() -> None:
    rng = np.random.default_rng(0)
    batch = [_sample(i, "u") for i in range(50)]
    lengths = rng.integers(5, 300, size=50).tolist()
    parts = micro_batches(batch, lengths=lengths, max_tokens=600)
    tokens = {sample.id: length for sample, length in zip(batch, lengths, strict=True)}
    assert sorted(int(s.id) for part in parts for s in part) == list(range(50))
    assert all(len(part) * max(tokens[s.id] for s in part) <= 600 for part in parts)
    assert micro_batches(batch, lengths=lengths, max_tokens=0) == [batch]
    assert [len(part) for part in micro_batches(batch[:2], lengths=[900, 800], max_tokens=600)] == [1, 1]


def test_first_variant_without_subsampling_is_whole() -> None:
    for i, sample in enumerate(SAMPLES):
        assert augment_history(sample, Augmentation(i, 0), seed=0, epoch=0, subsample_history_prob=0.0) is sample


def test_subsampling_shows_any_number_of_items_in_order_and_repeats_by_seed() -> None:
    sample = _sample(0, "u")

    def shown(epoch: int, *, seed: int = 0) -> list[int]:
        variant = augment_history(sample, Augmentation(0, 0), seed=seed, epoch=epoch, subsample_history_prob=1.0)
        assert variant.rows.tolist() == variant.label_ids.tolist() == variant.style[:, 0].tolist()
        rows: list[int] = variant.rows.tolist()
        return rows

    epochs = [shown(epoch) for epoch in range(300)]
    assert all(rows == sorted(set(rows)) for rows in epochs)
    assert {len(rows) for rows in epochs} == set(range(1, 11))
    assert {row for rows in epochs for row in rows} == set(range(10))
    assert epochs == [shown(epoch) for epoch in range(300)] != [shown(epoch, seed=1) for epoch in range(300)]


def test_subsampling_affects_only_its_share_of_first_variants() -> None:
    def rows_of_variant(number: int, **share: float) -> list[list[int]]:
        views = [augment_history(s, Augmentation(i, number), seed=0, epoch=0, **share) for i, s in enumerate(SAMPLES)]
        return [view.rows.tolist() for view in views]

    assert (
        45 <= sum(len(rows) < 10 for rows in rows_of_variant(0, subsample_history_prob=0.7)) <= 80
    )  # some keep all ten by chance
    assert rows_of_variant(1, subsample_history_prob=0.7) == rows_of_variant(1)


@pytest.mark.parametrize("items", [0, 1])
def test_subsampling_leaves_the_shortest_histories_whole(items: int) -> None:
    sample = _sample(0, "u", items=items)
    assert all(
        augment_history(sample, Augmentation(0, 0), seed=0, epoch=epoch, subsample_history_prob=1.0) is sample
        for epoch in range(50)
    )


def test_drop_history_prob_removes_whole_histories_by_seed() -> None:
    def empty(epoch: int) -> list[int]:
        shown = [
            augment_history(SAMPLES[i], Augmentation(i, 0), seed=0, epoch=epoch, drop_history_prob=0.2)
            for i in range(100)
        ]
        assert all(len(s.rows) in (0, 10) and len(s.label_ids) == len(s.rows) for s in shown)
        return [i for i, s in enumerate(shown) if len(s.rows) == 0]

    assert 8 <= len(empty(0)) <= 35
    assert empty(0) == empty(0) != empty(1)
