"""packing.py: vectors survive the way to bytes and back, as exactly as the precision says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from personaplug.errors import ConfigError, ItemError, ShapeMismatch, StorageError
from personaplug.store.vector_codec import Precision, packed, split_rows, unpacked


@pytest.fixture
def vectors() -> npt.NDArray[np.float32]:
    raw = np.random.default_rng(0).standard_normal((500, 384)).astype(np.float32)
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), dtype=np.float32)


def test_half_precision_is_exactly_that(vectors: npt.NDArray[np.float32]) -> None:
    parts = packed(vectors, 384, precision="float16")
    assert parts == [vector.astype("<f2").tobytes() for vector in vectors]
    np.testing.assert_array_equal(unpacked(parts, 384, precision="float16"), vectors.astype(np.float16))


def test_a_byte_a_value_is_near(vectors: npt.NDArray[np.float32]) -> None:
    parts = packed(vectors, 384, precision="int8")
    assert {len(part) for part in parts} == {384 + 4}
    again = unpacked(parts, 384, precision="int8").astype(np.float64)
    # Half a step of rounding, and what half precision adds to it.
    assert np.all(np.abs(again - vectors) <= (0.5 / 127 + 2**-11) * np.abs(vectors).max(axis=1, keepdims=True))
    cosine = (again * vectors).sum(axis=1) / np.linalg.norm(again, axis=1)
    assert cosine.min() > 0.9998


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_zeros_and_nothing(precision: Precision) -> None:
    zeros = np.zeros((2, 8), dtype=np.float32)
    np.testing.assert_array_equal(unpacked(packed(zeros, 8, precision=precision), 8, precision=precision), zeros)
    assert packed(zeros[:0], 8, precision=precision) == []
    assert unpacked([], 8, precision=precision).shape == (0, 8)


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_values_that_cannot_be_kept(precision: Precision, bad: float) -> None:
    vectors = np.zeros((3, 8), dtype=np.float32)
    vectors[1, 2] = bad
    with pytest.raises(ItemError, match="1 of 3 vectors"):
        packed(vectors, 8, precision=precision)


def test_other_shapes_and_names() -> None:
    with pytest.raises(ShapeMismatch, match=r"\(2, 7\).*\(n, 8\)"):
        packed(np.zeros((2, 7)), 8, precision="float16")
    with pytest.raises(ConfigError, match="int4"):
        packed(np.zeros((2, 8)), 8, precision="int4")  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="damaged"):
        unpacked([b"short"], 8, precision="float16")


def test_rows_are_split_in_order() -> None:
    assert split_rows(np.array([[1, 2], [3, 4]], dtype=np.uint8)) == [b"\1\2", b"\3\4"]
