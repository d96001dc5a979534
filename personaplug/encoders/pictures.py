"""Interface of picture encoders, the decoding of pictures, and an encoder without a model."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from personaplug.data.pictures import MAX_PIXELS, Picture
from personaplug.encoders.base import Vectors
from personaplug.errors import ItemError, MissingExtra

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

MAX_SIDE = 2048
"""The largest width and height of a decoded picture, in pixels; no encoder reads more."""

_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
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
        """Return (n, E) float32 unit vectors in order; raise ItemError for a damaged picture."""


def decode(picture: Picture) -> Image.Image:
    """Return a picture in RGB, turned as its camera says, on white where it is transparent, at most `MAX_SIDE` wide.

    Raises:
        ItemError: if the bytes are damaged, or the picture has more than `MAX_PIXELS`.
        MissingExtra: if Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise MissingExtra("Reading pictures", extra="pictures") from None
    content = picture.read()
    try:
        file = Image.open(io.BytesIO(content), formats=_FORMATS)
        width, height = file.size
        image = _opaque(ImageOps.exif_transpose(_shrunk(file))) if width * height <= MAX_PIXELS else None
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher
        image = None
    except Exception as error:  # decoders of damaged files raise errors of many types
        raise ItemError(f"A picture cannot be decoded ({type(error).__name__}); nothing was stored.") from None
    if image is None:
        raise ItemError(f"A picture may have at most {MAX_PIXELS:,} pixels; found more. Nothing was stored.")
    return image


def _shrunk(file: ImageFile) -> ImageFile:
    """Shrink a large picture before it is converted, so that few bytes are copied."""
    file.thumbnail((MAX_SIDE, MAX_SIDE))
    return file


def _opaque(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


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
