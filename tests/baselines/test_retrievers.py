"""Retrievers: BM25 against its formula and another library, ties, empty texts, random orders, dense ranking."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from personaplug.baselines.retrievers import (
    BM25Retriever,
    DenseRetriever,
    RandomRetriever,
    RecencyRetriever,
    Retriever,
)
from personaplug.data import open_dataset
from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders import HashEncoder
from personaplug.encoders.embedding_store import EmbeddingStore


def sample(query: str, *texts: str, id: str = "s") -> Sample:
    items = tuple(HistoryItem(str(n), (("text", text), ("score", "5")), "score") for n, text in enumerate(texts))
    return Sample(id, None, f"Q: {query}", query, None, items)


def documents_of(one: Sample) -> list[list[str]]:
    return [" ".join(value for _, value in item.fields).split() for item in one.history]


def plain_bm25(query: str, documents: list[list[str]], *, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Return scores by Robertson's formula, word by word; a negative idf counts as 0."""
    count = len(documents)
    mean = sum(map(len, documents)) / count if count else 0.0
    scores = []
    for document in documents:
        score = 0.0
        for word in query.split():
            document_count = sum(word in other for other in documents)
            idf = max(math.log((count - document_count + 0.5) / (document_count + 0.5)), 0.0)
            frequency = document.count(word)
            if frequency:
                score += idf * frequency / (frequency + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def check_bm25(one: Sample) -> None:
    """Check the scores against the formula, and the ranking against the scores; of equal items the later is first."""
    expected = plain_bm25(one.query, documents_of(one))
    scores = BM25Retriever().scores(one.query, one.history)
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)
    (ranked,) = BM25Retriever().rank([one])
    assert sorted(ranked) == list(range(len(one.history)))
    assert ranked == sorted(range(len(scores)), key=lambda place: (-scores[place], -place))


def drawn_samples(count: int, *, words: str) -> Iterator[Sample]:
    rng = random.Random(3)
    for number in range(count):
        texts = [" ".join(rng.choices(words, k=rng.randrange(12))) for _ in range(rng.randrange(1, 15))]
        texts += rng.choices(texts, k=rng.randrange(3))  # repeated items
        yield sample(" ".join(rng.choices(words, k=rng.randrange(8))), *texts, id=str(number))


@pytest.mark.parametrize("words", ["abc", "abcdefghijklmnopqrstuvwxyz", "aAbB5"])
def test_bm25_equals_the_formula(words: str) -> None:
    seen = 0.0
    for one in drawn_samples(150, words=words):
        check_bm25(one)
        seen += float(BM25Retriever().scores(one.query, one.history).max())
    assert seen > 0


@pytest.mark.parametrize("name", ["Movie_stars", "LaMP_4"])
def test_bm25_on_real_texts_equals_the_formula(shared_data: Path, name: str) -> None:
    # Only the first items, because `plain_bm25` is slow.
    for one in islice(open_dataset(shared_data / name, "dev"), 200):
        check_bm25(replace(one, history=one.history[:25]))


def test_bm25_without_negative_idf_equals_rank_bm25() -> None:
    rank_bm25 = pytest.importorskip("rank_bm25")
    compared = 0
    for one in drawn_samples(300, words="abcdefghijklmnopqrstuvwxyz"):
        documents, query = documents_of(one), one.query.split()
        half = len(documents) / 2
        if not query or any(sum(word in document for document in documents) > half for word in query):
            continue
        theirs = rank_bm25.BM25Okapi(documents).get_scores(query)
        np.testing.assert_allclose(BM25Retriever().scores(one.query, one.history) * 2.5, theirs, rtol=1e-9, atol=1e-12)
        compared += 1
    assert compared > 50


def test_bm25_reads_values_only_and_keeps_case() -> None:
    texts = ["A rare Word", "a rare word", "nothing", "else here"]
    assert BM25Retriever().rank([sample("Word", *texts)])[0][0] == 0
    assert BM25Retriever().rank([sample("word", *texts)])[0][0] == 1
    assert not BM25Retriever().scores("text: score: text score", sample("", *texts).history).any()


def test_bm25_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    BM25Retriever().rank([sample("b", "a b", "c", "d", "e")])
    assert capfd.readouterr() == ("", "")


# ---- all retrievers


@pytest.fixture
def table(tmp_path: Path, hashing: HashEncoder) -> EmbeddingStore:
    return EmbeddingStore.open(tmp_path / "vectors", hashing)


def retrievers(hashing: HashEncoder, table: EmbeddingStore, *, with_answer: bool) -> dict[str, Retriever]:
    return {
        "bm25": BM25Retriever(),
        "recency": RecencyRetriever(),
        "random": RandomRetriever(0),
        "dense": DenseRetriever(hashing, table, with_answer=with_answer),
    }


@pytest.mark.parametrize("method", ["bm25", "recency", "random", "dense"])
@pytest.mark.parametrize(
    ("query", "texts"),
    [
        ("a", ()), ("", ("a",)), (" \n", ("a", "b")), ("a", ("",)), ("a b", ("", "", "a")), ("", ("", "")),
        ("zz", ("a", "b")),
    ],
)  # fmt: skip
def test_retriever_ranks_every_item_once(
    method: str, query: str, texts: tuple[str, ...], hashing: HashEncoder, table: EmbeddingStore
) -> None:
    retriever = retrievers(hashing, table, with_answer=True)[method]
    (ranked,) = retriever.rank([sample(query, *texts)])
    assert sorted(ranked) == list(range(len(texts)))
    assert all(type(place) is int for place in ranked)
    assert [ranked] == retriever.rank([sample(query, *texts)])


@pytest.mark.parametrize("method", ["bm25", "dense"])
def test_retriever_ranks_the_later_of_equal_items_first(
    method: str, hashing: HashEncoder, table: EmbeddingStore
) -> None:
    retriever = retrievers(hashing, table, with_answer=False)[method]
    (ranked,) = retriever.rank([sample("good film", *["bad tea"] * 5, *["good film"] * 3, "cold tea")])
    assert ranked[:3] == [7, 6, 5]
    same = sample("good film", *["good film"] * 37)
    assert retriever.rank([same]) == [list(range(37))[::-1]]


def test_recency_ranks_the_latest_first() -> None:
    assert RecencyRetriever().rank([sample("q", "first", "second", "third")]) == [[2, 1, 0]]


def test_random_depends_only_on_seed_and_id() -> None:
    texts = [str(n) for n in range(20)]

    def order(seed: int, query: str, *, id: str) -> list[int]:
        (ranked,) = RandomRetriever(seed).rank([sample(query, *texts, id=id)])
        return ranked

    first = order(1, "q", id="x")
    both = RandomRetriever(1).rank([sample("other", *texts, id="y"), sample("another query", *texts, id="x")])
    assert both[1] == first
    orders = [first, order(2, "q", id="x"), order(1, "q", id="y")]
    assert len({tuple(order) for order in [*orders, tuple(range(20))]}) == 4


# ---- dense


@pytest.mark.parametrize("with_answer", [True, False])
def test_dense_ranks_by_cosine(with_answer: bool, hashing: HashEncoder, table: EmbeddingStore) -> None:
    dense = DenseRetriever(hashing, table, with_answer=with_answer)
    for one in drawn_samples(40, words="abcdefgh"):
        texts = [item.text if with_answer else item.content for item in one.history]
        similarities = hashing.encode(texts).astype(np.float64) @ hashing.encode([one.query])[0]
        ranked = similarities[dense.rank([one])[0]]
        assert (np.diff(ranked) <= 2e-3).all()  # the table has half precision
    before = len(table)
    table.add([one.history[0].text if with_answer else one.history[0].content])
    assert len(table) == before


def test_dense_without_answer_ignores_answers(hashing: HashEncoder, table: EmbeddingStore) -> None:
    items = tuple(HistoryItem(tag, (("text", "same"), ("tag", tag)), "tag") for tag in ("war", "comedy", "music"))
    one = Sample("s", None, "comedy", "comedy", None, items)
    assert DenseRetriever(hashing, table, with_answer=True).rank([one])[0][0] == 1
    assert DenseRetriever(hashing, table, with_answer=False).rank([one]) == [[2, 1, 0]]


def test_dense_head_maps_each_query_once(hashing: HashEncoder, table: EmbeddingStore) -> None:
    seen: list[tuple[int, ...]] = []

    def opposite(queries: np.ndarray) -> np.ndarray:
        seen.append(queries.shape)
        return -queries

    one = sample("good film", "good film", "cold tea", "a good long film")
    (plain,) = DenseRetriever(hashing, table, with_answer=False).rank([one])
    turned = DenseRetriever(hashing, table, with_answer=False, head=opposite)
    assert turned.rank([one]) == [plain[::-1]]
    turned.rank([replace(one, history=one.history[:2])])
    assert seen == [(1, 32)]


def test_dense_ranks_a_batch_like_single_samples(hashing: HashEncoder, table: EmbeddingStore) -> None:
    samples = [*drawn_samples(20, words="abcdefgh"), sample("a", id="empty")]
    dense = DenseRetriever(hashing, table, with_answer=True)
    assert dense.rank(samples) == [dense.rank([one])[0] for one in samples]
    assert dense.rank([]) == []


@pytest.mark.parametrize("before", ["", "import jax; "])
def test_bm25s_import_does_not_load_jax(tmp_path: Path, before: str) -> None:
    folder = tmp_path / "jax"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "lax.py").write_text("raise SystemExit('JAX was loaded, and would have taken the GPU')\n")
    code = (
        f"import sys; {before}there = 'jax' in sys.modules; import personaplug.baselines.retrievers as retrieval; "
        "assert ('jax' in sys.modules) is there; import jax; assert jax is not None; "
        "assert retrieval.bm25s.selection.JAX_IS_AVAILABLE is False"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
