"""Validation split, epoch batches, micro-batches, and augmentation by random sub-histories.

Random draws depend only on seeds and positions, so a resumed training repeats the draws of an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from personaplug.data.splits import held_users
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError

T = TypeVar("T")

_BATCHES_PER_BUCKET = 50  # samples are sorted by length within a bucket; smaller = more random, more padding


@dataclass(frozen=True)
class Augmentation:
    """One appearance of a sample in an epoch: with its whole history, or with its v-th random sub-history."""

    index: int  # index of the sample
    variant: int  # v; 0 = the whole history


def user_split(
    samples: Sequence[EncodedSample], *, share: float, limit: int, seed: int
) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """Split samples into (train, validation) with disjoint users.

    Args:
        share: share of the users in validation; at least one user.
        limit: maximum number of validation samples.
    """
    owners = sorted({sample.owner for sample in samples})
    if len(owners) < 2:
        raise ConfigError(
            f"Training needs samples of 2 or more users, because it holds out whole users for validation; found "
            f"{len(owners)}."
        )
    rng = np.random.default_rng([seed, 1])
    validation_owners = held_users(owners, share=share, rng=rng)
    train = [sample for sample in samples if sample.owner not in validation_owners]
    validation = [sample for sample in samples if sample.owner in validation_owners]
    indices = sorted(rng.permutation(len(validation))[:limit])
    return train, [validation[i] for i in indices]


def epoch_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    views: int,
    seed: int,
    epoch: int,
    shares: Sequence[float] | None = None,
) -> list[list[Augmentation]]:
    """Return an epoch's batches in random order.

    Samples of a batch have similar lengths. Batch sizes differ by at most one.

    Args:
        lengths: tokens of each sample.
        views: sub-histories per sample, beside its whole history.
        shares: share of each sample's appearances that an epoch contains; None = all. Samples with equal shares are
            drawn as one group, so all epochs have the same size.
    """
    rng = np.random.default_rng([seed, 2, epoch])
    order = rng.permutation(len(lengths) * (1 + views))
    if shares is not None:
        order = _thinned(order, np.asarray(shares)[order % len(lengths)])
    count = max(1, math.ceil(len(order) / batch_size))
    batches: list[list[Augmentation]] = []
    for bucket in np.array_split(order, max(1, round(count / _BATCHES_PER_BUCKET))):
        by_length = bucket[np.argsort([lengths[i % len(lengths)] for i in bucket], kind="stable")]
        for batch in np.array_split(by_length, math.ceil(len(bucket) / batch_size)):
            batches.append([Augmentation(int(i % len(lengths)), int(i // len(lengths))) for i in batch])
    return [batches[i] for i in rng.permutation(len(batches))]


def _thinned(order: npt.NDArray[np.intp], shares: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Keep a share of each group of entries with the same share: the first entries of the group in `order`."""
    is_kept = np.zeros(len(order), dtype=bool)
    for share in np.unique(shares):
        members = np.flatnonzero(shares == share)
        is_kept[members[: max(1, round(share * len(members)))]] = True
    return order[is_kept]


def micro_batches(batch: Sequence[T], *, lengths: Sequence[int], max_tokens: int) -> list[list[T]]:
    """Split a batch into parts of at most `max_tokens` tokens, padding included; 0 = one part.

    A sample with more tokens becomes a separate part.
    """
    if not max_tokens:
        return [list(batch)] if batch else []
    parts: list[list[T]] = []
    max_rows = 0
    # Longest first, so that the first sample of a part decides how many rows fit.
    for index in sorted(range(len(batch)), key=lambda i: -lengths[i]):
        if not parts or len(parts[-1]) == max_rows:
            parts.append([])
            max_rows = max(1, max_tokens // max(1, lengths[index]))
        parts[-1].append(batch[index])
    return parts


def spaced(total: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices of `total` samples, in order; 0 = all."""
    indices: list[int] = np.linspace(0, total - 1, num=min(count or total, total)).round().astype(int).tolist()
    return indices


def augment_history(
    sample: EncodedSample,
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    drop_history_prob: float = 0.0,
    subsample_history_prob: float = 0.0,
) -> EncodedSample:
    """Return the sample with a random part of its history, in order.

    Variants above 0 drop between one item and half of the items, as in the paper's released code (not in the paper).

    Args:
        drop_history_prob: probability of hiding the whole history, which trains the plug for users without one.
        subsample_history_prob: probability that variant 0 shows a random part, from one item to all.
    """
    size, position = len(sample.rows), [epoch, augmentation.index, augmentation.variant]
    if drop_history_prob and np.random.default_rng([seed, 7, *position]).random() < drop_history_prob:
        return sample.without_items()
    if size < 2:
        return sample
    if augmentation.variant:
        rng = np.random.default_rng([seed, 3, *position])
        dropped = rng.choice(size, size=int(rng.integers(1, size // 2 + 1)), replace=False)
        return sample.with_items_of(sample, np.delete(np.arange(size), dropped))
    rng = np.random.default_rng([seed, 8, *position])
    if rng.random() >= subsample_history_prob:
        return sample
    indices = rng.choice(size, size=int(rng.integers(1, size + 1)), replace=False)
    return sample.with_items_of(sample, np.sort(indices))
