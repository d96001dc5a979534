"""Interface of picture encoders, the decoding of pictures, and an encoder without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from personaplug.data.picture_decoding import decoded
from personaplug.data.pictures import Picture
from personaplug.data.values import Flaw
from personaplug.encoders.base import Vectors, check_finite
from personaplug.errors import MissingExtra, PartError

if TYPE_CHECKING:
    from PIL import Image

_GRID = 4  # cells of a side whose mean colors are features
_LEVELS = 4  # of each color in the histogram


class PictureEncoder(Protocol):
    """A frozen encoder of pictures."""

    @property
    def name(self) -> str:
        """The name that opens the encoder after `pictures:`."""

    @property
    def width(self) -> int:
        """Size of a vector."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the weights and the way in which pictures are prepared."""

    def encode(self, pictures: Sequence[Picture]) -> Vectors:
        """Return (n, E) float32 unit vectors in order; raise PartError for a damaged picture."""


def decode(picture: Picture) -> Image.Image:
    """Return a picture in RGB, turned as its camera says, on white where it is transparent.

    Raises:
        PartError: if the bytes are damaged, or the picture has too many pixels.
        MissingExtra: if Pillow is not installed.
    """
    try:
        return decoded(picture.read())
    except ModuleNotFoundError:
        raise MissingExtra("Reading pictures", extra="pictures") from None
    except Flaw as flaw:
        place = f"The picture {picture.source}" if isinstance(picture.source, Path) else "The picture"
        raise PartError(f"{place} cannot be used: {flaw}.", picture) from None


def encode_distinct(
    pictures: Sequence[Picture], encode: Callable[[Sequence[Picture]], Vectors], *, width: int, batch_size: int
) -> Vectors:
    """Return (n, E) vectors in order; a repeated picture is encoded once.

    Args:
        encode: returns the vectors of a batch of pictures. Only one batch is decoded at a time.
    """
    distinct = list(dict.fromkeys(pictures))
    vectors = np.zeros((len(distinct), width), dtype=np.float32)
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        vectors[start : start + len(batch)] = encode(batch)
    check_finite(vectors)
    index_of = {picture: index for index, picture in enumerate(distinct)}
    return vectors[[index_of[picture] for picture in pictures]]


class PixelEncoder:
    """Encodes the colors of a picture, and where they are: a histogram, and mean colors of a grid of cells.

    It needs no weights. It knows no shapes and no objects.
    """

    name = "pixels"
    width = _LEVELS**3 + 3 * _GRID**2
    fingerprint = hashlib.blake2b(b"pixel encoder 1", digest_size=8).hexdigest()

    def encode(self, pictures: Sequence[Picture]) -> Vectors:
        """Return (n, E) float32 unit vectors."""
        rows = [_pixel_features(decode(picture)) for picture in pictures]
        return np.array(rows, dtype=np.float32).reshape(-1, self.width)


def _pixel_features(image: Image.Image) -> Vectors:
    """Return the unit vector of one picture, (E,)."""
    pixels = np.asarray(image.resize((16 * _GRID, 16 * _GRID)), dtype=np.float32) / 256
    bins = (pixels * _LEVELS).astype(np.int64) @ np.array([_LEVELS**2, _LEVELS, 1])
    histogram = np.sqrt(np.bincount(bins.ravel(), minlength=_LEVELS**3) / bins.size)
    cells = pixels.reshape(_GRID, 16, _GRID, 16, 3).mean(axis=(1, 3)).ravel() - 0.5
    features = np.concatenate([histogram, cells / max(float(np.linalg.norm(cells)), 1e-3)])
    unit: Vectors = (features / np.linalg.norm(features)).astype(np.float32)
    return unit
