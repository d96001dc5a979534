"""Retrievers rank all items of a history for a query, best first; of equal items the later one comes first."""

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
from personaplug.encoders.base import Vectors, frozen_queries
from personaplug.encoders.embedding_store import EmbeddingStore


@contextmanager
def _without_jax() -> Iterator[None]:
    """Hide JAX from an import: bm25s would load it, and JAX reserves most of a GPU's memory."""
    loaded = sys.modules.get("jax")
    sys.modules["jax"] = None  # type: ignore[assignment]  # None makes an import fail
    try:
        yield
    finally:
        del sys.modules["jax"]
        if loaded is not None:
            sys.modules["jax"] = loaded


with _without_jax():
    import bm25s

# bm25s logs every index, and each sample has an index.
logging.getLogger("bm25s").setLevel(logging.WARNING)

_RANDOM_ITEMS = 11  # makes these draws differ from others with the same seed
_CACHED_QUERIES = 1 << 14


@dataclass(frozen=True)
class Retrieval:
    """The items of a history for a prompt: a retriever's name and the number of its best items."""

    method: str
    items: int

    @property
    def name(self) -> str:
        """The name in rows, such as `bm25:4`."""
        return f"{self.method}:{self.items}"


class Retriever(Protocol):
    """Ranks the items of samples' own histories."""

    def rank(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Return the indices of all items of each `sample.history`, best first."""
        ...


def rank_answers(retriever: Retriever, samples: Sequence[Sample]) -> list[list[int]]:
    """Return the indices of the user's own answers in each history, best first.

    Rejected answers and stated preferences are left out, because neither is an example of a good answer.
    """
    rankings = zip(samples, retriever.rank(samples), strict=True)
    return [[index for index in ranking if sample.history[index].kind == "answer"] for sample, ranking in rankings]


class BM25Retriever:
    """BM25 as in LaMP: k1 = 1.5, b = 0.75, words split at white space, case-sensitive; the corpus is the history.

    This is bm25s's `robertson` variant. A word in n of N items has the idf ln((N − n + ½) / (n + ½)), or 0 if that is
    negative. LaMP's library (`rank_bm25.BM25Okapi`) gives words with a negative idf a quarter of the mean idf instead.
    Without such words in the query, both rank alike: the scores differ by the factor k1 + 1.
    """

    def rank(self, samples: Sequence[Sample]) -> list[list[int]]:
        return [_best_first(self.scores(sample.query, sample.history)) for sample in samples]

    def scores(self, query: str, items: Sequence[HistoryItem]) -> npt.NDArray[np.float64]:
        """Return (N,) scores; 0 for an item that shares no word with the query."""
        documents = [" ".join(value for _, value in item.fields).split() for item in items]
        words = query.split()
        query_words = set(words)
        if not any(map(query_words.intersection, documents)):
            return np.zeros(len(items))
        # Words outside the query only add to the length, so one word replaces them and the index stays small.
        corpus = [[word if word in query_words else "" for word in document] for document in documents]
        index: Any = bm25s.BM25(
            method="robertson", k1=1.5, b=0.75, dtype="float64", backend="numpy", csc_backend="numpy"
        )
        index.index(corpus, create_empty_token=False, show_progress=False)
        return np.asarray(index.get_scores(words), dtype=np.float64)


class RecencyRetriever:
    """The latest item first; a history is in the order of its dates, or of the file without dates."""

    def rank(self, samples: Sequence[Sample]) -> list[list[int]]:
        return [list(range(len(sample.history)))[::-1] for sample in samples]


class RandomRetriever:
    """A random order that depends only on the seed and the sample's id."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def rank(self, samples: Sequence[Sample]) -> list[list[int]]:
        return [self._rng(sample).permutation(len(sample.history)).tolist() for sample in samples]

    def _rng(self, sample: Sample) -> np.random.Generator:
        return np.random.default_rng([self.seed, _RANDOM_ITEMS, *sample.id.encode("utf-8", "surrogatepass")])


class DenseRetriever:
    """Cosine similarity of the query's embedding and the items'.

    Args:
        encoder: its untrained query encoder embeds queries.
        table: the encoder's item embeddings; missing items are added.
        with_answer: as in `encode_samples`.
        head: a learned map of (1, E) query vectors; None = identity.
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
        self._query_encoder = frozen_queries(encoder)
        self._query_vector = lru_cache(maxsize=_CACHED_QUERIES)(self._encode_query)

    def rank(self, samples: Sequence[Sample]) -> list[list[int]]:
        row_ids = self.table.add(
            item.encoded(with_answer=self.with_answer) for sample in samples for item in sample.history
        )
        ends = np.cumsum([len(sample.history) for sample in samples], dtype=np.int64)
        histories = np.split(row_ids, ends)[:-1]
        return [_best_first(self._scores(s.query, ids)) for s, ids in zip(samples, histories, strict=True)]

    def _scores(self, query: str, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        if not len(row_ids):
            return np.zeros(0, dtype=np.float32)
        # A product over many rows may round equal rows differently, so each distinct row is scored once.
        distinct, positions = np.unique(row_ids, return_inverse=True)
        scores: npt.NDArray[np.float32] = self.table.gather(distinct).astype(np.float32) @ self._query_vector(query)
        return scores[positions]

    def _encode_query(self, query: str) -> Vectors:
        vectors = self._query_encoder.encode([query])
        mapped: Vectors = (self.head(vectors) if self.head else vectors)[0]
        return mapped


def _best_first(scores: npt.NDArray[np.floating[Any]]) -> list[int]:
    """Return indices by falling score, the later of equal ones first."""
    order: list[int] = np.argsort(scores, kind="stable")[::-1].tolist()
    return order
