"""Interface of encoders: unit vectors of texts, a trainable copy for queries, and an identity.

Embedding stores and trained plugs save the identity, because vectors of two encoders cannot be compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from personaplug.data.records import Content
from personaplug.errors import ConfigError, EngineFailure

_SMALLEST_NORM = 1e-12  # a shorter vector has no direction

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EncoderIdentity:
    """Properties that two encoders must share so that their vectors can be compared.

    Attributes:
        name: name by which the encoder was opened (hub name, folder or `hash:WIDTH`); never compared.
        revision: commit on the hub or version of the package, if known; never compared.
        pooling: pooling of token vectors (`mean`, `cls`, …).
        normalized: True if vectors have length 1.
        prompt: prefix of every document (history item).
        query_prompt: prefix of every query.
        max_length: number of tokens, special ones included, at which texts are cut; None = never.
        width: size of a vector (E).
        fingerprint: hash of the weights and of the tokens of a probe text, 16 hex digits.
        parts: name and width of each part of a joint encoder's vectors, in order; empty = the vector of a text.
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
    parts: tuple[tuple[str, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.parts else {name: value for name, value in values.items() if name != "parts"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderIdentity:
        """Invert `to_dict`; raise `ConfigError` if a field is missing or unknown."""
        try:
            parts = tuple((str(name), int(width)) for name, width in values.get("parts", ()))
            return cls(**values | {"parts": parts})
        except (TypeError, ValueError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ConfigError(f"An encoder identity needs exactly these fields: {names}.") from error

    def same_as(self, other: EncoderIdentity) -> bool:
        """Return True if items and queries get the same vectors."""
        return self.same_items_as(other) and self.query_prompt == other.query_prompt

    def same_items_as(self, other: EncoderIdentity) -> bool:
        """Return True if items get the same vectors."""
        return self == replace(other, name=self.name, revision=self.revision, query_prompt=self.query_prompt)

    def describe(self) -> str:
        """Return one line for messages, with all compared properties."""
        length = "texts uncut" if self.max_length is None else f"at most {self.max_length} tokens"
        parts = " + ".join(f"{width} of the {name}" for name, width in self.parts)
        values = f"{self.width} values{f': {parts}' if parts else ''}"
        return (
            f"{self.name} ({values}, {self.pooling} pooling, {length}, prompts {self.prompt!r} and "
            f"{self.query_prompt!r} (queries), weights {self.fingerprint})"
        )


class Encoder(Protocol):
    """A frozen encoder of texts."""

    @property
    def identity(self) -> EncoderIdentity: ...

    @property
    def width(self) -> int:
        """Size of a vector (E)."""

    @property
    def truncated(self) -> int:
        """Number of texts so far that were cut to `identity.max_length`."""

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors of documents in order; an empty text also gets a unit vector."""

    def query_encoder(self) -> QueryEncoder:
        """Return a copy for queries whose weights may be trained (PPlug, eq. 2); this encoder stays frozen."""


@runtime_checkable
class ItemEncoder(Protocol):
    """An encoder that also reads pictures and vectors that were computed elsewhere."""

    def encode_items(self, contents: Sequence[Content], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors; see `encode_items`."""


def encode_items(encoder: Encoder | ItemEncoder, contents: Sequence[Content]) -> Vectors:
    """Return the (n, E) float32 unit vectors of items in order.

    Raises:
        ConfigError: if an item has a picture or a vector that the encoder does not read.
        PartError: if a picture is damaged, or a vector has another width.
    """
    if isinstance(encoder, ItemEncoder):
        return encoder.encode_items(contents)
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) < len(contents):
        raise ConfigError(
            "The encoder reads texts alone, and an item has a picture or a vector. Open an encoder with a part for it: "
            "encoder=TEXT+pictures:NAME or encoder=TEXT+vectors:NAME:WIDTH."
        )
    return encoder.encode(texts)


class QueryEncoder(nn.Module, ABC):
    """A differentiable encoder of queries: `forward(features(texts))`."""

    width: int  # of a vector (E)

    @abstractmethod
    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Turn B texts into the CPU tensors that `forward` takes."""

    @abstractmethod
    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Return (B, E) unit vectors with gradients, on this module's device."""

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors in the texts' order, without gradients or dropout."""
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                for indices in batches_by_length(texts, batch_size):
                    vectors[indices] = to_numpy(self(self.features([texts[index] for index in indices])))
        finally:
            self.train(training)
        check_finite(vectors)
        return vectors


class FrozenQueries(Protocol):
    """A frozen encoder of queries."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return (n, E) float32 unit vectors in the texts' order."""


def frozen_queries(encoder: Encoder) -> FrozenQueries:
    """Return an encoder of queries that is not trained: the encoder's own if it has a faster one, else its copy."""
    if isinstance(encoder, HasFrozenQueries):
        return encoder.frozen_queries()
    return encoder.query_encoder().eval().requires_grad_(False)


@runtime_checkable
class HasFrozenQueries(Protocol):
    """An encoder whose untrained queries take a faster way than its trainable copy."""

    def frozen_queries(self) -> FrozenQueries:
        """Return an encoder of queries that is not trained."""


def batches_by_length(texts: Sequence[str], size: int) -> Iterator[list[int]]:
    """Yield the indices of texts of similar length, longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    return (order[start : start + size] for start in range(0, len(order), size))


def to_unit(vectors: Tensor) -> Tensor:
    """Scale (B, E) vectors to length 1. A zero vector, for example of an empty text, becomes a fixed unit vector."""
    fixed = nn.functional.pad(torch.ones_like(vectors[:, :1]), (0, vectors.shape[1] - 1))
    is_zero = vectors.norm(dim=-1, keepdim=True) < _SMALLEST_NORM
    return torch.where(is_zero, fixed, nn.functional.normalize(vectors, dim=-1))


def check_finite(vectors: Vectors) -> None:
    """Raise EngineFailure if an encoder's vectors contain NaN or infinity."""
    if not np.isfinite(vectors).all():
        raise EngineFailure(
            "The encoder returned vectors that are not finite. If its weights are in half precision, use float32. "
            "Otherwise use another encoder."
        )


def to_numpy(vectors: Tensor) -> Vectors:
    return vectors.detach().to("cpu", torch.float32).numpy()
