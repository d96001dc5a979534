"""An encoder without a model: hashed words, character trigrams and writing habits."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from personaplug.encoders.base import EncoderIdentity, QueryEncoder, Vectors
from personaplug.errors import ConfigError


class HashEncoder:
    """Encodes hashed words, character trigrams, casing and punctuation. Vectors are the same on every machine.

    Texts with common words have similar vectors; the encoder ignores their meaning. The seed selects the hash function.
    """

    truncated = 0

    def __init__(self, width: int = 256, seed: int = 0) -> None:
        if width < 8:
            raise ConfigError(f"The width of the hash encoder must be 8 or more; found {width}.")
        self.width, self.seed = width, seed
        self.identity = EncoderIdentity(
            name=f"hash:{width}",
            revision=None,
            pooling="hash",
            normalized=True,
            prompt="",
            query_prompt="",
            max_length=None,
            width=width,
            fingerprint=hashlib.blake2b(f"hash encoder 1, seed {seed}".encode(), digest_size=8).hexdigest(),
        )

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors in the texts' order; `batch_size` has no effect."""
        vectors = [_unit_vector(text, width=self.width, seed=self.seed) for text in texts]
        return np.array(vectors, dtype=np.float32).reshape(-1, self.width)

    def query_encoder(self) -> QueryEncoder:
        """Return this encoder followed by a trainable linear map, which starts as the identity."""
        return _HashQueryEncoder(self)


class _HashQueryEncoder(QueryEncoder):
    def __init__(self, encoder: HashEncoder) -> None:
        super().__init__()
        self.width, self._encoder = encoder.width, encoder
        self.linear = nn.Linear(encoder.width, encoder.width, bias=False)
        nn.init.eye_(self.linear.weight)

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"hashed": torch.from_numpy(self._encoder.encode(texts))}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return nn.functional.normalize(self.linear(features["hashed"].to(self.linear.weight)), dim=-1)


def _unit_vector(text: str, *, width: int, seed: int) -> Vectors:
    """Return a text's vector (E); a text without features gets a fixed one."""
    vector = np.zeros(width, dtype=np.float32)
    for feature, count in Counter(_hash_features(text)).items():
        index, sign = _bucket(feature, width, seed)
        vector[index] += sign * math.sqrt(count)
    if not vector.any():
        vector[_bucket("", width, seed)[0]] = 1.0
    vector /= float(np.linalg.norm(vector))
    return vector


def _hash_features(text: str) -> Iterator[str]:
    lowered = text.lower()
    capitalized = [word for word in re.findall(r"\w+", text) if word != word.lower()]
    yield from (f"w{word}" for word in re.findall(r"\w+", lowered))
    yield from (f"t{lowered[i : i + 3]}" for i in range(len(lowered) - 2))
    yield from (f"c{word}" for word in capitalized)
    yield from (f"k{_casing(word)}" for word in capitalized)
    yield from (f"s{sign}" for sign in re.findall(r"[^\w\s]", text))


def _casing(word: str) -> str:
    return "UPPER" if word.isupper() else "Title" if word.istitle() else "miXed"


@lru_cache(maxsize=1 << 16)
def _bucket(feature: str, width: int, seed: int) -> tuple[int, int]:
    """Return the index and the sign of a feature's hash."""
    seeded = f"{seed} {feature}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(seeded, digest_size=8).digest(), "little")
    return (number >> 1) % width, 1 if number & 1 else -1
