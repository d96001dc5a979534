"""Which samples are trained on together: the held-out users, the order of an epoch, the random sub-histories.

Everything is a function of seeds and counts alone, so that a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from personaplug.errors import BadConfig
from personaplug.vectors import EncodedSample

_BUCKET_BATCHES = 50  # batches whose samples are sorted by length together; smaller = more random, more padding


@dataclass(frozen=True)
class View:
    """One appearance of a sample in an epoch.

    Attributes:
        index: which sample.
        number: 0 = with its whole history, v > 0 = with its v-th random sub-history.
    """

    index: int
    number: int


def hold_out(
    samples: Sequence[EncodedSample], *, share: float, limit: int, seed: int
) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """Split samples into (train, validation) such that no user is on both sides.

    Args:
        share: of the users, at least one, to hold out.
        limit: how many samples of the held-out users are kept at most.
    Raises:
        BadConfig: if there are fewer than two users.
    """
    owners = sorted({sample.owner for sample in samples})
    if len(owners) < 2:
        raise BadConfig(
            f"Training holds out whole users to choose a checkpoint: it needs 2 or more, found {len(owners)}."
        )
    rng = np.random.default_rng([seed, 1])
    count = min(len(owners) - 1, max(1, round(share * len(owners))))
    held = {owners[i] for i in rng.choice(len(owners), size=count, replace=False)}
    train = [sample for sample in samples if sample.owner not in held]
    validation = [sample for sample in samples if sample.owner in held]
    kept = sorted(rng.permutation(len(validation))[:limit])
    return train, [validation[i] for i in kept]


def epoch_batches(lengths: Sequence[int], *, batch_size: int, views: int, seed: int, epoch: int) -> list[list[View]]:
    """The batches of one epoch: random order, samples of like length together, sizes equal up to one.

    Args:
        lengths: tokens of each sample; what padding would waste.
        views: sub-histories added per sample, so that an epoch holds each sample 1 + views times.
    """
    rng = np.random.default_rng([seed, 2, epoch])
    order = rng.permutation(len(lengths) * (1 + views))
    count = max(1, round(len(order) / batch_size))
    batches: list[list[View]] = []
    for bucket in np.array_split(order, max(1, round(count / _BUCKET_BATCHES))):
        by_length = bucket[np.argsort([lengths[i % len(lengths)] for i in bucket], kind="stable")]
        for part in np.array_split(by_length, max(1, round(len(bucket) / batch_size))):
            batches.append([View(int(i % len(lengths)), int(i // len(lengths))) for i in part])
    return [batches[i] for i in rng.permutation(len(batches))]


def seen_through(sample: EncodedSample, view: View, *, seed: int, epoch: int) -> EncodedSample:
    """The sample with a random part of its history left out, in order; unchanged for view 0.

    From one item up to half of them are dropped, as the paper's released code does (it is not in the paper).
    """
    size = len(sample.rows)
    if view.number == 0 or size < 2:
        return sample
    rng = np.random.default_rng([seed, 3, epoch, view.index, view.number])
    dropped = rng.choice(size, size=int(rng.integers(1, size // 2 + 1)), replace=False)
    return replace(sample, rows=np.delete(sample.rows, dropped), answers=np.delete(sample.answers, dropped))
