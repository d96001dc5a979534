"""Vectors to bytes and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from personaplug.errors import ItemError, ShapeMismatch, StorageError
from personaplug.store.vector_codec import decode_vectors, encode_vectors, split_rows


@pytest.fixture
def vectors() -> npt.NDArray[np.float32]:
    raw = np.random.default_rng(0).standard_normal((500, 384)).astype(np.float32)
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), dtype=np.float32)


def test_encode_vectors_round_trip_is_half_precision(vectors: npt.NDArray[np.float32]) -> None:
    bodies = encode_vectors(vectors, width=384)
    assert bodies == [vector.astype("<f2").tobytes() for vector in vectors]
    np.testing.assert_array_equal(decode_vectors(bodies, width=384), vectors.astype(np.float16))


def test_encode_vectors_zeros_and_none_round_trip() -> None:
    zeros = np.zeros((2, 8), dtype=np.float32)
    np.testing.assert_array_equal(decode_vectors(encode_vectors(zeros, width=8), width=8), zeros)
    assert encode_vectors(zeros[:0], width=8) == []
    assert decode_vectors([], width=8).shape == (0, 8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_encode_vectors_unstorable_value_raises(bad: float) -> None:
    vectors = np.zeros((3, 8), dtype=np.float32)
    vectors[1, 2] = bad
    with pytest.raises(ItemError, match="1 of 3 vectors"):
        encode_vectors(vectors, width=8)


def test_codec_other_shape_raises() -> None:
    with pytest.raises(ShapeMismatch, match=r"\(n, 8\).*\(2, 7\)"):
        encode_vectors(np.zeros((2, 7)), width=8)
    with pytest.raises(StorageError, match="damaged"):
        decode_vectors([b"short"], width=8)


def test_split_rows_keeps_order() -> None:
    assert split_rows(np.array([[1, 2], [3, 4]], dtype=np.uint8)) == [b"\1\2", b"\3\4"]
