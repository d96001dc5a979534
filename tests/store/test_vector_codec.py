"""Vectors and items survive a round trip through bytes, and damage is detected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from personaplug.encoders.style_features import FEATURES
from personaplug.errors import ItemError, ShapeMismatch, StorageError
from personaplug.store.vector_codec import Bodies, decode_bodies, encode_bodies, encode_vectors, split_rows


def bodies_of(rows: Sequence[bytes]) -> list[bytes]:
    """Return the bodies of items of user 5 with these vectors."""
    numbers = range(len(rows))
    styles = [np.full(len(FEATURES), number, dtype="<f2").tobytes() for number in numbers]
    keys, days = [5000 + number for number in numbers], [700_000] * len(rows)
    return encode_bodies(keys, days, label_ids=[1] * len(rows), kind_ids=[0] * len(rows), styles=styles, vectors=rows)


def decode(rows: Sequence[bytes], *, width: int) -> Bodies:
    return decode_bodies(rows, width=width, user_no=5, items_per_user=1000)


@pytest.fixture
def vectors() -> npt.NDArray[np.float32]:
    raw = np.random.default_rng(0).standard_normal((500, 384)).astype(np.float32)
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), dtype=np.float32)


def test_encode_vectors_round_trip_is_half_precision(vectors: npt.NDArray[np.float32]) -> None:
    rows = encode_vectors(vectors, width=384)
    assert rows == [vector.astype("<f2").tobytes() for vector in vectors]
    decoded = decode(bodies_of(rows), width=384)
    np.testing.assert_array_equal(decoded["vector"], vectors.astype(np.float16))
    assert decoded["key"].tolist() == list(range(5000, 5500))
    np.testing.assert_array_equal(decoded["style"][7], np.full(len(FEATURES), 7, dtype=np.float16))


def test_zeros_and_empty_lists_survive_a_round_trip() -> None:
    zeros = np.zeros((2, 8), dtype=np.float32)
    np.testing.assert_array_equal(decode(bodies_of(encode_vectors(zeros, width=8)), width=8)["vector"], zeros)
    assert encode_vectors(zeros[:0], width=8) == bodies_of([]) == []
    assert decode([], width=8)["vector"].shape == (0, 8)


@pytest.mark.parametrize("width", [7, 8, 384])
def test_decode_bodies_any_changed_byte_raises(width: int) -> None:
    rows = bodies_of(encode_vectors(np.ones((3, width)), width=width))
    for index in range(len(rows[1])):
        for flip in (1, 128, 255):
            changed = bytearray(rows[1])
            changed[index] ^= flip
            with pytest.raises(StorageError, match="damaged"):
                decode([rows[0], bytes(changed), rows[2]], width=width)


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 1], [2, 1, 0]])
def test_decode_bodies_other_order_raises(order: list[int]) -> None:
    rows = bodies_of(encode_vectors(np.ones((3, 8)), width=8))
    with pytest.raises(StorageError, match="damaged: the order"):
        decode([rows[index] for index in order], width=8)


def test_decode_bodies_of_zeros_swapped_words_or_other_user_raises() -> None:
    rows = bodies_of(encode_vectors(np.arange(16).reshape(2, 8), width=8))
    swapped = rows[0][:-24] + rows[0][-16:-8] + rows[0][-24:-16] + rows[0][-8:]
    for damage in ([bytes(len(rows[0]))], [swapped]):
        with pytest.raises(StorageError, match="damaged"):
            decode(damage, width=8)
    with pytest.raises(StorageError, match="damaged"):
        decode_bodies(rows, width=8, user_no=6, items_per_user=1000)


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
        decode([b"short"], width=8)


def test_split_rows_keeps_order() -> None:
    assert split_rows(np.array([[1, 2], [3, 4]], dtype=np.uint8)) == [b"\1\2", b"\3\4"]
