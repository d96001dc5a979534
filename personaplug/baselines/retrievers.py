"""Retrievers: the order in which a history's items are worth showing for a query. Each ranks all of them, best first.

Of items that are worth the same the later one comes first, everywhere. Nothing here learns; what is learned reaches
`Dense` as a map of its query vectors.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders import Encoder
from personaplug.encoders.base import Vectors
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.errors import ConfigError, nearest


@contextmanager
def _without_jax() -> Iterator[None]:
    """Hide JAX: bm25s tries it out as it is imported, and JAX then takes most of a GPU for itself."""
    loaded = sys.modules.get("jax")
    sys.modules["jax"] = None  # type: ignore[assignment]  # what an import takes for absent
    try:
        yield
    finally:
        del sys.modules["jax"]
        if loaded is not None:
            sys.modules["jax"] = loaded


with _without_jax():
    import bm25s

# It would tell of every index it builds, that is of every sample.
logging.getLogger("bm25s").setLevel(logging.WARNING)

_METHODS = ("bm25", "recency", "random", "dense")
_DRAWN_ITEMS = 11  # sets these draws apart from others of the same seed
_KEPT_QUERIES = 1 << 14


@dataclass(frozen=True)
class Retrieval:
    """Which texts of a history stand in the prompt.

    Attributes:
        method: name of a retriever, one of `RETRIEVERS`.
        items: how many, the best first.
    """

    method: str
    items: int

    @property
    def name(self) -> str:
        """The name in rows, such as `bm25:4`."""
        return f"{self.method}:{self.items}"


class Retriever(Protocol):
    """Ranks the items of a sample's own history."""

    def rank(self, sample: Sample) -> list[int]:
        """Return the places of all items in `sample.history`, best first."""
        ...


def open_retriever(method: str, *, seed: int, encoder: Encoder, table: EmbeddingStore, with_answer: bool) -> Retriever:
    """Return the retriever of that name.

    Args:
        method: bm25, recency, random or dense.
        seed: of `random`.
        encoder, table, with_answer: of `dense`.
    Raises:
        ConfigError: if there is none of that name.
    """
    if method == "bm25":
        return BM25()
    if method == "recency":
        return Recency()
    if method == "random":
        return RandomItems(seed)
    if method == "dense":
        return Dense(encoder, table, with_answer=with_answer)
    raise ConfigError(f"There is no retriever {method!r}; {nearest(method, _METHODS)}")


class BM25:
    """BM25 as LaMP uses it: k1 = 1.5, b = 0.75, words cut at white space, case kept; the corpus is the history.

    It is bm25s's `robertson` variant, in which a word that n of N items hold has the idf ln((N − n + ½) / (n + ½)), or
    0 where that would be negative: a word of at least half the items counts for nothing. LaMP's library
    (`rank_bm25.BM25Okapi`) gives such words a quarter of the mean idf instead. Where no word of the query is that
    frequent both rank alike: their scores differ by the constant factor k1 + 1.
    """

    def __init__(self, *, k1: float = 1.5, b: float = 0.75) -> None:
        self.k1, self.b = k1, b

    def rank(self, sample: Sample) -> list[int]:
        """Return the places of all items, best first."""
        return _best_first(self.scores(sample.query, sample.history))

    def scores(self, query: str, items: Sequence[HistoryItem]) -> npt.NDArray[np.float64]:
        """Return (N,) scores; 0 for an item that shares no word with the query."""
        corpus = [" ".join(value for _, value in item.fields).split() for item in items]
        words = query.split()
        asked = set(words)
        if not any(asked.intersection(document) for document in corpus):
            return np.zeros(len(items))
        # Words that are not asked for only make their items longer; as one word they keep the index small.
        known = [[word if word in asked else "" for word in document] for document in corpus]
        index: Any = bm25s.BM25(
            method="robertson", k1=self.k1, b=self.b, dtype="float64", backend="numpy", csc_backend="numpy"
        )
        index.index(known, create_empty_token=False, show_progress=False)
        return np.asarray(index.get_scores(words), dtype=np.float64)


class Recency:
    """The latest first; a history is in time order where its dates are known, else in the file's."""

    def rank(self, sample: Sample) -> list[int]:
        """Return the places of all items, latest first."""
        return list(range(len(sample.history)))[::-1]


class RandomItems:
    """An order drawn for each sample by its id and the seed, whatever other samples there are."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def rank(self, sample: Sample) -> list[int]:
        """Return the places of all items in the order drawn."""
        rng = np.random.default_rng([self.seed, _DRAWN_ITEMS, *sample.id.encode("utf-8", "surrogatepass")])
        return [int(place) for place in rng.permutation(len(sample.history))]


class Dense:
    """Cosine between the encoder's vector of the query and those of the items.

    Args:
        encoder: its query encoder is used as it comes, untrained.
        table: of that encoder; gets the items that it lacks.
        with_answer: whether items are encoded with the user's answer, as in `encode_samples`.
        head: a learned map of (1, E) query vectors; None = none.
    """

    def __init__(
        self,
        encoder: Encoder,
        table: EmbeddingStore,
        *,
        with_answer: bool,
        head: Callable[[Vectors], Vectors] | None = None,
    ) -> None:
        self.table, self.with_answer, self.head = table, with_answer, head
        self._query_encoder = encoder.query_encoder()
        self._query = lru_cache(maxsize=_KEPT_QUERIES)(self._encoded)

    def rank(self, sample: Sample) -> list[int]:
        """Return the places of all items, nearest first.

        Raises:
            UserError, StorageError: as `EmbeddingStore.add`.
        """
        if not sample.history:
            return []
        texts = [item.encoded(with_answer=self.with_answer) for item in sample.history]
        self.table.add(texts)
        # A product over many rows may round the same row differently in two places, so each row is taken once.
        rows, places = np.unique(self.table.rows(texts), return_inverse=True)
        return _best_first((self.table.gather(rows).astype(np.float32) @ self._query(sample.query))[places])

    def _encoded(self, query: str) -> Vectors:
        vectors = self._query_encoder.encode([query])
        mapped: Vectors = np.asarray(vectors if self.head is None else self.head(vectors), dtype=np.float32)[0]
        return mapped


def _best_first(scores: npt.NDArray[np.floating[Any]]) -> list[int]:
    """Places by falling score, the later of equal ones first."""
    # A stable sort, read backwards, leaves the later of equal ones in front.
    return [int(place) for place in np.argsort(scores, kind="stable")[::-1]]
