"""A very fast encoder, for tests that only need some vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from personaplug.encoders.base import QueryEncoder
from personaplug.encoders.hashing import HashEncoder


class CheapEncoder:
    """A very fast encoder: the length of a text determines its vector."""

    truncated = 0

    def __init__(self, width: int = 64) -> None:
        self.width = width
        self.identity = replace(HashEncoder(width).identity, name="cheap", fingerprint="cheap")
        self.calls: list[int] = []

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
        self.calls.append(len(texts))
        angles = np.array([len(text) for text in texts], dtype=np.float32)[:, None]
        vectors: npt.NDArray[np.float32] = np.cos(angles + np.arange(self.width, dtype=np.float32))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def query_encoder(self) -> QueryEncoder:
        raise NotImplementedError
