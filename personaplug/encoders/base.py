"""What an encoder is: texts to unit vectors, a trainable copy of itself for queries, and an identity.

Vectors on disk and trained plugs keep the identity, since vectors of two encoders do not mix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from personaplug.errors import ConfigError

Vectors = npt.NDArray[np.float32]

_PROVENANCE = ("name", "revision")


@dataclass(frozen=True)
class EncoderIdentity:
    """What must agree for two encoders' vectors to mean the same.

    Attributes:
        name: as it was opened: hub name, folder or `hash:WIDTH`. Says where from, not what: never compared.
        revision: the hub's commit or the package's version, where known. Never compared: `fingerprint` is.
        pooling: how token vectors become one (`mean`, `cls`, …).
        normalized: whether vectors have length 1; always so here.
        prompt: put in front of every document (history item), to the byte.
        query_prompt: put in front of every query, to the byte.
        max_length: texts are cut to this many tokens, special ones included; None = never.
        width: values in a vector (E).
        fingerprint: 16 hex digits from the weights and from what the tokenizer makes of a probe text.
    """

    name: str
    revision: str | None
    pooling: str
    normalized: bool
    prompt: str
    query_prompt: str
    max_length: int | None
    width: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderIdentity:
        """The reverse of `to_dict`.

        Raises:
            ConfigError: if a field is missing or unknown.
        """
        try:
            return cls(**values)
        except TypeError as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ConfigError(f"An encoder identity needs exactly these fields: {names}.") from error

    def same_as(self, other: EncoderIdentity) -> bool:
        """Whether items and queries get the same vectors: everything agrees but name and revision."""
        return not self._differing(other)

    def same_items_as(self, other: EncoderIdentity) -> bool:
        """Whether items get the same vectors; the prompt of queries does not touch them."""
        return self._differing(other) <= {"query_prompt"}

    def describe(self) -> str:
        """One line for messages, with everything that two identities may differ in."""
        length = "texts uncut" if self.max_length is None else f"at most {self.max_length} tokens"
        prompts = f"prompts {self.prompt!r} and {self.query_prompt!r} (queries)"
        return (
            f"{self.name} ({self.width} values, {self.pooling} pooling, {length}, {prompts}, "
            f"weights {self.fingerprint})"
        )

    def _differing(self, other: EncoderIdentity) -> set[str]:
        compared = {field.name for field in fields(self)} - set(_PROVENANCE)
        return {name for name in compared if getattr(self, name) != getattr(other, name)}


class Encoder(Protocol):
    """A frozen encoder of texts."""

    @property
    def identity(self) -> EncoderIdentity:
        """Who made the vectors."""

    @property
    def width(self) -> int:
        """Values in a vector (E)."""

    @property
    def truncated(self) -> int:
        """How many of the texts encoded so far were cut at the encoder's longest length."""

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors of documents, in the order given; empty texts have one too."""

    def query_encoder(self) -> QueryEncoder:
        """A fresh copy for queries whose weights may be trained (PPlug, eq. 2); this encoder stays frozen."""


class QueryEncoder(nn.Module, ABC):
    """Encodes queries, differentiably: `forward(features(texts))`.

    Attributes:
        width: values in a vector (E).
    """

    width: int

    @abstractmethod
    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Turn B texts into CPU tensors whose first dimension is B, padded to the longest of them."""

    @abstractmethod
    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Return (B, E) unit vectors with gradients, on this module's device."""

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors, in the order given, without gradients or dropout."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return in_length_order(texts, self._batch, batch_size=batch_size, width=self.width)
        finally:
            self.train(training)

    def _batch(self, texts: Sequence[str]) -> Vectors:
        return to_numpy(self(self.features(texts)))


def in_length_order(
    texts: Sequence[str], encode: Callable[[Sequence[str]], Vectors], *, batch_size: int, width: int
) -> Vectors:
    """Encode in batches of texts of like length, longest first (so that memory runs out at once or never)."""
    vectors = np.zeros((len(texts), width), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        vectors[places] = encode([texts[i] for i in places])
    return vectors


def to_numpy(vectors: Tensor) -> Vectors:
    return vectors.detach().to("cpu", torch.float32).numpy()
