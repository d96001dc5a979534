"""Split a training set by user, so that settings are chosen without the official dev set; sample a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personaplug.data.lamp_writer import write_lamp
from personaplug.data.records import Sample
from personaplug.data.task import Reader
from personaplug.errors import ConfigError, RunConflict


@dataclass(frozen=True)
class Split:
    """The numbers of samples and users in both parts."""

    train: int
    dev: int
    train_users: int
    dev_users: int


def split_by_user(reader: Reader, folder: str | Path, *, share: float, seed: int = 0) -> Split:
    """Write a new data set whose `train` and `dev` are parts of one split and share no user.

    The reader is read three times. `share` is the share of users in `dev`, at least one user.
    """
    if not 0 < share < 1:
        raise ConfigError(f"The share of users for dev should be between 0 and 1, found {share}.")
    if seed < 0:
        raise ConfigError(f"The seed of a split should be 0 or more, found {seed}.")
    sizes = Counter(sample.owner for sample in reader)
    if existing := [path.name for path in Path(folder).glob("*_questions.json*")]:
        raise RunConflict(
            f"{folder} already holds a data set ({existing[0]}). Choose another folder, or delete the data set."
        )
    if len(sizes) < 2:
        raise ConfigError(f"A split by user needs 2 or more users, found {len(sizes)}.")
    dev_users = held_users(sorted(sizes), share=share, rng=np.random.default_rng([seed, 8]))
    for split in ("train", "dev"):
        samples = (sample for sample in reader if (sample.owner in dev_users) == (split == "dev"))
        write_lamp(samples, folder, split, task=reader.task)
    dev = sum(sizes[user] for user in dev_users)
    return Split(sizes.total() - dev, dev, len(sizes) - len(dev_users), len(dev_users))


def held_users(owners: Sequence[str], *, share: float, rng: np.random.Generator) -> set[str]:
    """Draw a share of two or more different users: at least one, and never all."""
    count = min(len(owners) - 1, max(1, round(share * len(owners))))
    return {owners[i] for i in rng.choice(len(owners), size=count, replace=False)}


def drawn(reader: Reader, *, limit: int, seed: int) -> Iterator[Sample]:
    """Yield `limit` random samples of a split in file order; 0 = all."""
    if not limit:
        yield from reader
        return
    count = sum(1 for _ in reader)
    chosen = set(np.random.default_rng([seed, 6]).permutation(count)[:limit].tolist())
    yield from (sample for index, sample in enumerate(reader) if index in chosen)


def users_first(samples: Sequence[Sample], limit: int, *, seed: int) -> list[Sample]:
    """Return `limit` samples in their order: all samples of random users, and some of the last user.

    With the same seed, a smaller limit returns a subset of a larger one.
    """
    if not 0 < limit <= len(samples):
        raise ConfigError(f"The number of real samples should be from 1 to {len(samples):,}, found {limit}.")
    owners = sorted({sample.owner for sample in samples})
    ranks = {
        owners[owner]: rank for rank, owner in enumerate(np.random.default_rng([seed, 9]).permutation(len(owners)))
    }
    by_user = sorted(range(len(samples)), key=lambda index: (ranks[samples[index].owner], index))
    return [samples[index] for index in sorted(by_user[:limit])]
