"""An encoder without any model: hashed words, character trigrams and habits of writing."""

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
    """Hashed words, character trigrams and habits of writing (casing, signs, emoji), without any model.

    Deterministic across processes and machines. Texts with words in common are near each other, so a plug has
    something to learn from; of meaning it knows nothing.

    Attributes:
        identity: who this encoder is.
        width: values in a vector (E).
        truncated: always 0, as nothing is ever cut.
    """

    truncated = 0

    def __init__(self, width: int = 256, seed: int = 0) -> None:
        """Set up.

        Args:
            width: values in a vector.
            seed: another seed hashes to other places.
        Raises:
            ConfigError: if the width is below 8, where everything would collide.
        """
        if width < 8:
            raise ConfigError(f"The hash encoder needs a width of 8 or more, not {width}.")
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
        """Return (n, E) float32 unit vectors, in the order given; `batch_size` is of no matter here."""
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            _fill(vector, text, seed=self.seed)
        return vectors

    def query_encoder(self) -> QueryEncoder:
        """The same features, followed by a trainable linear map that starts as the identity."""
        return _HashQueryEncoder(self)


class _HashQueryEncoder(QueryEncoder):
    """Hashed features and a linear map of them."""

    def __init__(self, encoder: HashEncoder) -> None:
        super().__init__()
        self.width, self._encoder = encoder.width, encoder
        self.linear = nn.Linear(encoder.width, encoder.width, bias=False)
        nn.init.eye_(self.linear.weight)

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"hashed": torch.from_numpy(self._encoder.encode(texts))}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        mapped = self.linear(features["hashed"].to(self.linear.weight))
        return nn.functional.normalize(mapped, dim=-1)


def _fill(vector: Vectors, text: str, *, seed: int) -> None:
    """Write a text's unit vector; one in which nothing is left (no text) points to a place of its own."""
    for feature, count in Counter(_hash_features(text)).items():
        place, sign = _place(feature, len(vector), seed)
        vector[place] += sign * math.sqrt(count)
    length = float(np.linalg.norm(vector))
    if length:
        vector /= length
    else:
        vector[_place("", len(vector), seed)[0]] = 1.0


def _hash_features(text: str) -> Iterator[str]:
    lowered = text.lower()
    yield from (f"w{word}" for word in re.findall(r"\w+", lowered))
    yield from (f"t{lowered[i : i + 3]}" for i in range(len(lowered) - 2))
    yield from (f"c{word}" for word in re.findall(r"\w+", text) if word != word.lower())
    yield from (f"k{_casing(word)}" for word in re.findall(r"\w+", text) if word != word.lower())
    yield from (f"s{sign}" for sign in re.findall(r"[^\w\s]", text))


def _casing(word: str) -> str:
    return "UPPER" if word.isupper() else "Title" if word.istitle() else "miXed"


@lru_cache(maxsize=1 << 16)
def _place(feature: str, width: int, seed: int) -> tuple[int, int]:
    seeded = f"{seed} {feature}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(seeded, digest_size=8).digest(), "little")
    return (number >> 1) % width, 1 if number & 1 else -1
