"""Which samples are trained on together: the held-out users, the order of an epoch, the random sub-histories.

Everything is a function of seeds and counts alone, so that a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from personaplug.data.splits import held_users
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError

T = TypeVar("T")

_BUCKET_BATCHES = 50  # batches whose samples are sorted by length together; smaller = more random, more padding


@dataclass(frozen=True)
class Augmentation:
    """One appearance of a sample in an epoch.

    Attributes:
        index: which sample.
        number: 0 = with its whole history, v > 0 = with its v-th random sub-history.
    """

    index: int
    number: int


def user_split(
    samples: Sequence[EncodedSample], *, share: float, limit: int, seed: int
) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """Split samples into (train, validation) such that no user is on both sides.

    Args:
        share: of the users, at least one, to hold out.
        limit: how many samples of the held-out users are kept at most.
    Raises:
        ConfigError: if there are fewer than two users.
    """
    owners = sorted({sample.owner for sample in samples})
    if len(owners) < 2:
        raise ConfigError(
            f"Training holds out whole users to choose a checkpoint: it needs 2 or more, found {len(owners)}."
        )
    rng = np.random.default_rng([seed, 1])
    held = held_users(owners, share=share, rng=rng)
    train = [sample for sample in samples if sample.owner not in held]
    validation = [sample for sample in samples if sample.owner in held]
    kept = sorted(rng.permutation(len(validation))[:limit])
    return train, [validation[i] for i in kept]


def epoch_batches(
    lengths: Sequence[int], *, batch_size: int, views: int, seed: int, epoch: int
) -> list[list[Augmentation]]:
    """The batches of one epoch: random order, samples of like length together, sizes equal up to one.

    Args:
        lengths: tokens of each sample; what padding would waste.
        views: sub-histories added per sample, so that an epoch holds each sample 1 + views times.
    """
    rng = np.random.default_rng([seed, 2, epoch])
    order = rng.permutation(len(lengths) * (1 + views))
    count = max(1, math.ceil(len(order) / batch_size))
    batches: list[list[Augmentation]] = []
    for bucket in np.array_split(order, max(1, round(count / _BUCKET_BATCHES))):
        by_length = bucket[np.argsort([lengths[i % len(lengths)] for i in bucket], kind="stable")]
        for part in np.array_split(by_length, math.ceil(len(bucket) / batch_size)):
            batches.append([Augmentation(int(i % len(lengths)), int(i // len(lengths))) for i in part])
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(batch: Sequence[T], *, lengths: Sequence[int], most: int) -> list[list[T]]:
    """Split a batch into parts whose padded size, rows × longest, is at most `most` tokens; 0 = one part.

    A single sample that is longer still makes a part of its own.
    """
    if not most:
        return [list(batch)] if batch else []
    parts: list[list[T]] = []
    room = 0
    # The longest first, so that it alone decides how many rows fit beside it.
    for place in sorted(range(len(batch)), key=lambda place: -lengths[place]):
        if not parts or len(parts[-1]) == room:
            parts.append([])
            room = max(1, most // max(1, lengths[place]))
        parts[-1].append(batch[place])
    return parts


def augment_history(
    sample: EncodedSample,
    view: Augmentation,
    *,
    seed: int,
    epoch: int,
    drop_history_prob: float = 0.0,
    subsample_history_prob: float = 0.0,
) -> EncodedSample:
    """The sample with what a view shows of its history, in order.

    A sub-history (view 1 and up) lacks from one item up to half of them, as in the paper's released code (it is not in
    the paper).

    Args:
        drop_history_prob: share of views that lose the whole history: what a user without one gets is learned from
            these.
        subsample_history_prob: share of the first views (0) that keep a random part of it, from one item to all;
            the others are whole.
    """
    size, place = len(sample.rows), [epoch, view.index, view.number]
    if drop_history_prob and np.random.default_rng([seed, 7, *place]).random() < drop_history_prob:
        return sample.without_items()
    if size < 2:
        return sample
    if view.number:
        rng = np.random.default_rng([seed, 3, *place])
        dropped = rng.choice(size, size=int(rng.integers(1, size // 2 + 1)), replace=False)
        return sample.with_items_of(sample, np.delete(np.arange(size), dropped))
    rng = np.random.default_rng([seed, 8, *place])
    if rng.random() >= subsample_history_prob:
        return sample
    kept = rng.choice(size, size=int(rng.integers(1, size + 1)), replace=False)
    return sample.with_items_of(sample, np.sort(kept))
