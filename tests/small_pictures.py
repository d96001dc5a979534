"""Small pictures for tests, as files in PNG."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def noise_png(seed: int, *, side: int = 40) -> bytes:
    """Return a picture of random pixels, which no database can compress."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(side, side, 3), dtype=np.uint8)
    return _png(Image.fromarray(pixels))


def plain_png(color: str, *, side: int = 8) -> bytes:
    """Return a picture of one color."""
    return _png(Image.new("RGB", (side, side), color))


def data_url(content: bytes, *, kind: str = "png") -> str:
    """Return a picture as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
