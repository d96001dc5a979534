"""Whose history a row sees: the sample's own, none, a stranger's, or the own in another order.

One assignment serves vectors, texts and matrices alike, so that every row borrows from the same strangers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from personaplug.conditions import SHUFFLED, WRONG_USER, Whose
from personaplug.errors import BadConfig
from personaplug.records import HistoryItem, Sample
from personaplug.samples import EncodedSample


@dataclass(frozen=True)
class Lent:
    """Where one sample's history comes from.

    Attributes:
        lender: the sample whose history it is; None = nobody's.
        places: which of the lender's items, in the order in which they are shown; none of nobody's.
    """

    lender: int | None
    places: npt.NDArray[np.int64]


def lend(history: Whose, owners: Sequence[str], sizes: Sequence[int], *, seed: int, latest: int = -1) -> list[Lent]:
    """Assign a history to each sample.

    Args:
        history: whose.
        owners: (n,) the samples' users.
        sizes: (n,) items of the samples' own histories.
        seed: draws strangers and orders.
        latest: show only so many of the latest items; -1 = all.
    Raises:
        BadConfig: if a wrong user is asked for and there is only one user.
    """
    if history == "none":
        return [Lent(None, np.empty(0, np.int64)) for _ in owners]
    lenders = list(_strangers(owners, seed=seed)) if history == WRONG_USER else range(len(owners))
    shown = [np.arange(sizes[lender]) for lender in lenders]
    if latest >= 0:
        shown = [places[max(0, len(places) - latest) :] for places in shown]
    if history == SHUFFLED:
        shown = [np.random.default_rng([seed, 5, k]).permutation(places) for k, places in enumerate(shown)]
    return [Lent(lender, places) for lender, places in zip(lenders, shown, strict=True)]


def rows_lent(samples: Sequence[EncodedSample], lent: Sequence[Lent]) -> list[EncodedSample]:
    """The samples with the rows and answers of the histories lent to them."""
    lenders = [sample if one.lender is None else samples[one.lender] for sample, one in zip(samples, lent, strict=True)]
    three = zip(samples, lenders, lent, strict=True)
    return [sample.with_items_of(lender, one.places) for sample, lender, one in three]


def items_lent(samples: Sequence[Sample], lent: Sequence[Lent]) -> list[tuple[HistoryItem, ...]]:
    """The items of the histories lent to the samples."""
    return [() if one.lender is None else _chosen(samples[one.lender], one.places) for one in lent]


def _strangers(owners: Sequence[str], *, seed: int) -> Iterator[int]:
    """For each sample one of another user, drawn by seed: every other user is equally likely, then each of theirs."""
    by_owner: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        by_owner.setdefault(owner, []).append(index)
    names = sorted(by_owner)
    if len(names) < 2:
        raise BadConfig(f"wrong-user needs samples of 2 or more users; found {len(names)}.")
    place = {owner: index for index, owner in enumerate(names)}
    rng = np.random.default_rng([seed, 4])
    for owner in owners:
        other = names[(place[owner] + int(rng.integers(1, len(names)))) % len(names)]
        yield by_owner[other][int(rng.integers(len(by_owner[other])))]


def _chosen(sample: Sample, places: npt.NDArray[np.int64]) -> tuple[HistoryItem, ...]:
    return tuple(sample.history[place] for place in places)
