"""Controls: whose history a row sees (own, none, a stranger's, shuffled), and random or mean personas.

One assignment serves vectors, texts and matrices alike, so that every row borrows from the same strangers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders.embedding_store import Halves, Rows
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.methods import SHUFFLED, WRONG_USER, Whose
from personaplug.plug.personalizer import Personalizer, Vectors


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
        ConfigError: if a wrong user is asked for and there is only one user.
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
        raise ConfigError(f"wrong-user needs samples of 2 or more users; found {len(names)}.")
    place = {owner: index for index, owner in enumerate(names)}
    rng = np.random.default_rng([seed, 4])
    for owner in owners:
        other = names[(place[owner] + int(rng.integers(1, len(names)))) % len(names)]
        yield by_owner[other][int(rng.integers(len(by_owner[other])))]


def _chosen(sample: Sample, places: npt.NDArray[np.int64]) -> tuple[HistoryItem, ...]:
    return tuple(sample.history[place] for place in places)


class RandomVectors:
    """Another unit vector in place of each of a table's, drawn by seed: as many items, none of their meaning.

    Args:
        table: whose vectors are replaced; equal ones by equal ones, in whatever row they are.
        seed: of the draw.
    """

    def __init__(self, table: Vectors, *, seed: int) -> None:
        self.table, self.seed, self.width = table, seed, table.width

    def gather(self, rows: Rows) -> Halves:
        """Vectors in place of those of some rows, (n, E)."""
        drawn = np.empty((len(rows), self.width), dtype=np.float32)
        for place, vector in enumerate(self.table.gather(rows)):
            content = int.from_bytes(hashlib.blake2b(vector.tobytes(), digest_size=8).digest())
            drawn[place] = np.random.default_rng([self.seed, 9, content]).standard_normal(self.width)
        lengths = np.linalg.norm(drawn, axis=1, keepdims=True)
        return np.asarray(drawn / lengths, dtype=np.float16)


class MeanPersona:
    """The average soft prompt of some samples, for everybody.

    Args:
        personalizer: makes the soft prompts that are averaged.
        samples: whose; those of few items, whose tokens may be of another kind, count only if there are no others.
        batch_size: how many at once.
    """

    def __init__(self, personalizer: Personalizer, samples: Sequence[EncodedSample], *, batch_size: int = 64) -> None:
        few = personalizer.plug.few
        samples = [sample for sample in samples if len(sample.rows) > few] or samples
        with torch.no_grad():
            parts = [
                _combined(personalizer.soft_prompt(samples[start : start + batch_size]), share=1 / len(samples))
                for start in range(0, len(samples), batch_size)
            ]
        self.mean, self.placement = _combined(SoftPrompt.cat(parts)), personalizer.placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """The same soft tokens for each sample, (B, S, D)."""
        return SoftPrompt.cat([self.mean] * len(samples))


def _combined(soft: SoftPrompt, *, share: float = 1.0) -> SoftPrompt:
    """The sum of a batch, times a share, as a batch of one."""
    bias = None if soft.label_bias is None else soft.label_bias.sum(dim=0, keepdim=True) * share
    return replace(soft, vectors=soft.vectors.sum(dim=0, keepdim=True) * share, label_bias=bias)
