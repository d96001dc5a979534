"""Decode pictures by Pillow: upright, opaque, in RGB and not too large."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from personaplug.data.pictures import FORMATS, MAX_PIXELS, Picture, eight_bits
from personaplug.data.values import Flaw
from personaplug.errors import MissingData

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE = 2048
"""The largest width and height of a decoded picture, in pixels; no encoder reads more."""

_ORIENTATION = 0x0112  # the EXIF tag
_CHECKED_SIDE = 64  # of a picture that is only checked; a JPEG is then read at a lower resolution


def decoded(content: bytes, *, max_side: int = MAX_SIDE) -> Image.Image:
    """Return a picture in RGB, turned as its camera says, on white where it is transparent.

    Raises:
        Flaw: if the bytes are damaged, or the picture has more than `MAX_PIXELS`.
        ModuleNotFoundError: if Pillow is not installed.
    """
    from PIL import Image

    try:
        file: Any = Image.open(io.BytesIO(content), formats=[name.upper() for name in FORMATS])
        width, height = file.size
        is_small, turn = width * height <= MAX_PIXELS, _turn_of(file)
        image = _opaque(_turned(_shrunk(file, max_side), turn)) if is_small else None
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher
        image = None
    except Exception as error:  # decoders of damaged files raise errors of many types
        raise Flaw(f"it cannot be decoded ({type(error).__name__})") from None
    if image is None:
        raise Flaw(f"it may have at most {MAX_PIXELS:,} pixels; found more")
    return image


def is_damaged(picture: Picture) -> bool:
    """Return whether a picture cannot be decoded or has too many pixels; False for all without Pillow."""
    try:
        decoded(picture.read(), max_side=_CHECKED_SIDE)
    except ModuleNotFoundError:
        return False
    except (Flaw, MissingData):
        return True
    return False


def _turn_of(file: Any) -> int:
    """Return the camera's orientation, 1 to 8. Cameras and programs write broken EXIF data around intact pictures."""
    try:
        return int(file.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _shrunk(file: Any, max_side: int) -> Image.Image:
    """Shrink a large picture before it is converted, so that few bytes are copied."""
    file.draft("RGB", (max_side, max_side))
    image: Image.Image = eight_bits(file)
    image.thumbnail((max_side, max_side))
    return image


def _turned(image: Image.Image, turn: int) -> Image.Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[turn]) if turn in turns else image


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    from PIL import Image as images

    image = image.convert("RGBA")
    return images.alpha_composite(images.new("RGBA", image.size, "white"), image).convert("RGB")
