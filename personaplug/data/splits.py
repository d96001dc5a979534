"""A slice of the training split in the place of dev: what settings are chosen on, so that dev is looked at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personaplug.data.lamp_writer import write_lamp
from personaplug.data.task import Reader
from personaplug.errors import ConfigError, RunConflict


@dataclass(frozen=True)
class Slice:
    """What was written: samples of either part, and users of either part."""

    train: int
    dev: int
    train_users: int
    dev_users: int


def split_by_user(reader: Reader, folder: str | Path, *, share: float, seed: int = 0) -> Slice:
    """Write a data set whose `train` and `dev` are parts of one split, without a user in common.

    Args:
        reader: the split, with answers; read three times.
        folder: gets the data set, in LaMP's layout.
        share: of the users that `dev` gets, at least one.
        seed: draws them.
    Raises:
        ConfigError: if the share is not between 0 and 1, or there are fewer than two users.
        RunConflict: if the folder holds a data set already.
        StorageError: if the disk is full or not writable.
    """
    if not 0 < share < 1:
        raise ConfigError(f"The share of users for dev lies between 0 and 1; found {share}.")
    sizes = Counter(sample.owner for sample in reader)
    owners = sorted(sizes)
    there = [path.name for path in Path(folder).glob("*_questions.json*")]
    if there:
        raise RunConflict(f"{folder} holds a data set already ({there[0]}). Choose another folder, or remove it first.")
    if len(owners) < 2:
        raise ConfigError(f"A slice by user needs 2 or more users; found {len(owners)}.")
    held = held_users(owners, share=share, rng=np.random.default_rng([seed, 8]))
    for split, wanted in (("train", False), ("dev", True)):
        part = (sample for sample in reader if (sample.owner in held) == wanted)
        write_lamp(part, folder, split, task=reader.task)
    dev = sum(size for owner, size in sizes.items() if owner in held)
    return Slice(sizes.total() - dev, dev, len(owners) - len(held), len(held))


def held_users(owners: Sequence[str], *, share: float, rng: np.random.Generator) -> set[str]:
    """A share of two or more different users, drawn: at least one, and never all."""
    count = min(len(owners) - 1, max(1, round(share * len(owners))))
    return {owners[i] for i in rng.choice(len(owners), size=count, replace=False)}
