"""Strangers: for each sample another user, whose history tells whether a gain is personal.

The control `wrong-user` and the personal gain of a training both draw their strangers here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError


def strangers(owners: Sequence[str], *, seed: int) -> Iterator[int]:
    """For each sample, draw another user and one of this user's samples, both uniformly.

    Args:
        owners: (n,) the samples' users.
    Returns:
        The indices of n samples.
    """
    by_owner: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        by_owner.setdefault(owner, []).append(index)
    names = sorted(by_owner)
    if len(names) < 2:
        raise ConfigError(f"Strangers' histories (wrong-user) need samples of 2 or more users; found {len(names)}.")
    rank = {owner: index for index, owner in enumerate(names)}
    rng = np.random.default_rng([seed, 4])
    for owner in owners:
        stranger = names[(rank[owner] + int(rng.integers(1, len(names)))) % len(names)]
        yield by_owner[stranger][int(rng.integers(len(by_owner[stranger])))]


def with_strangers_items(samples: Sequence[EncodedSample], *, seed: int) -> list[EncodedSample]:
    """Return the samples with the whole histories of strangers."""
    sources = [samples[index] for index in strangers([sample.owner for sample in samples], seed=seed)]
    return [
        sample.with_items_of(source, np.arange(len(source.rows)))
        for sample, source in zip(samples, sources, strict=True)
    ]
