"""JointEncoder: one vector of an item from its text, its picture and a vector that was computed elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from personaplug.data.records import Content, ItemContent
from personaplug.encoders.base import (
    Encoder,
    EncoderIdentity,
    FrozenQueries,
    QueryEncoder,
    Vectors,
    frozen_queries,
)
from personaplug.encoders.pictures import PictureEncoder
from personaplug.errors import ConfigError, PartError

T = TypeVar("T")

TEXT: Final = "text"
PICTURE: Final = "picture"
OUTSIDE: Final = "vector"
"""Names of the parts of a joint vector, in order."""


@dataclass(frozen=True)
class OutsideVectors:
    """Vectors that the caller computes, such as an app's own embeddings of its items.

    Attributes:
        name: says which embeddings they are; plugs and stores accept vectors of the same name only.
        width: numbers of a vector.
    """

    name: str
    width: int

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the embeddings by their name."""
        return hashlib.blake2b(f"vectors {self.name} {self.width}".encode(), digest_size=8).hexdigest()

    def unit_rows(self, vectors: Sequence[bytes]) -> Vectors:
        """Return (n, E) unit vectors; raise PartError for a vector of another width or of length 0."""
        for vector in vectors:
            if len(vector) != 4 * self.width:
                message = f"The vectors {self.name!r} have {self.width} numbers each; found {len(vector) // 4}."
                raise PartError(message, vector)
        rows = np.frombuffer(b"".join(vectors), dtype="<f4").reshape(-1, self.width).astype(np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if len(without_direction := np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))):
            message = f"The vector of {self.name!r} has only zeros or a value that is not finite: it has no direction."
            raise PartError(message, vectors[int(without_direction[0])])
        unit: Vectors = (rows / norms).astype(np.float32)
        return unit


class JointEncoder:
    """Encodes the parts of an item apart, and concatenates their unit vectors.

    A missing part is a block of zeros, which no encoder returns. So a plug knows which parts an item has. The whole
    vector has length 1. The vector of a query has the text part alone.

    Args:
        text: encodes texts and queries.
        pictures: encodes pictures; None = items with pictures are refused.
        outside: the vectors that come with the items; None = items with vectors are refused.
    """

    def __init__(
        self,
        text: Encoder,
        *,
        pictures: PictureEncoder | None = None,
        outside: OutsideVectors | None = None,
    ) -> None:
        self.text, self.pictures, self.outside = text, pictures, outside
        others = [(PICTURE, pictures), (OUTSIDE, outside)]
        parts = [(name, part) for name, part in [(TEXT, text.identity), *others] if part is not None]
        fingerprints = "|".join(f"{name} {part.fingerprint}" for name, part in parts)
        more = [
            f"pictures:{pictures.name}" if pictures else "",
            f"vectors:{outside.name}:{outside.width}" if outside else "",
        ]
        self.identity: EncoderIdentity = replace(
            text.identity,
            name="+".join(filter(None, (text.identity.name, *more))),
            width=sum(part.width for _, part in parts),
            fingerprint=hashlib.blake2b(fingerprints.encode(), digest_size=8).hexdigest(),
            parts=tuple((name, part.width) for name, part in parts),
        )
        self.width = self.identity.width

    @property
    def truncated(self) -> int:
        """See `Encoder.truncated`."""
        return self.text.truncated

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return the (n, E) float32 unit vectors of items that are texts alone."""
        return self.encode_items(texts, batch_size=batch_size)

    def encode_items(self, contents: Sequence[Content], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors in order; see `base.encode_items`."""
        items = [ItemContent(content) if isinstance(content, str) else content for content in contents]
        texts = [content if isinstance(content, str) else content.text or None for content in contents]
        blocks = [_block(texts, partial(self.text.encode, batch_size=batch_size), width=self.text.width)]
        pictures, outside = [item.picture for item in items], [item.vector for item in items]
        if self.pictures is not None:
            blocks.append(_block(pictures, self.pictures.encode, width=self.pictures.width))
        elif any(pictures):
            raise _without_part(PICTURE, "+pictures:NAME")
        if self.outside is not None:
            blocks.append(_block(outside, self.outside.unit_rows, width=self.outside.width))
        elif any(outside):
            raise _without_part(OUTSIDE, "+vectors:NAME:WIDTH")
        joined = np.concatenate(blocks, axis=1)
        vectors: Vectors = joined / np.linalg.norm(joined, axis=1, keepdims=True)
        return vectors

    def query_encoder(self) -> QueryEncoder:
        """Return the text encoder's copy for queries, with zeros in place of the other parts."""
        return _JointQueryEncoder(self.text.query_encoder(), width=self.width)

    def frozen_queries(self) -> FrozenQueries:
        """Return the text encoder for queries that are not trained, with zeros in place of the other parts."""
        return _PaddedQueries(frozen_queries(self.text), width=self.width)


@dataclass(frozen=True)
class _PaddedQueries:
    text: FrozenQueries
    width: int

    def encode(self, texts: Sequence[str]) -> Vectors:
        vectors = self.text.encode(texts)
        padded: Vectors = np.pad(vectors, [(0, 0), (0, self.width - vectors.shape[1])])
        return padded


class _JointQueryEncoder(QueryEncoder):
    def __init__(self, text: QueryEncoder, *, width: int) -> None:
        super().__init__()
        self.text, self.width = text, width

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.text.features(texts)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        vectors: Tensor = self.text(features)
        return nn.functional.pad(vectors, (0, self.width - vectors.shape[1]))


def part_slice(identity: EncoderIdentity, part: str) -> slice:
    """Return where the values of a part are in the vectors of an encoder; ConfigError without such a part."""
    start = 0
    for name, width in identity.parts:
        if name == part:
            return slice(start, start + width)
        start += width
    parts = ", ".join(name for name, _ in identity.parts) or TEXT
    raise ConfigError(f"The encoder {identity.name} has no part {part!r}; it has the parts: {parts}.")


def only_part(vectors: Tensor, identity: EncoderIdentity, part: str) -> Tensor:
    """Return (M, E) joint vectors with one part alone, scaled to length 1; zeros for an item without this part."""
    values = part_slice(identity, part)
    kept = torch.zeros_like(vectors)
    kept[:, values] = nn.functional.normalize(vectors[:, values].float(), dim=-1).to(vectors.dtype)
    return kept


def _block(values: Sequence[T | None], encode: Callable[[list[T]], Vectors], *, width: int) -> Vectors:
    """Return one part of n items, (n, W): the encoded values of the items that have it, zeros for the others."""
    block = np.zeros((len(values), width), dtype=np.float32)
    given = [value for value in values if value is not None]
    if given:
        block[[value is not None for value in values]] = encode(given)
    return block


def _without_part(name: str, part: str) -> ConfigError:
    return ConfigError(f"An item has a {name}, and the encoder has no part for it. Add {part} to its name.")
