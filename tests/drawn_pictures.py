"""Pictures for tests, drawn and written by Pillow."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from personaplug.data.pictures import Picture


def drawn(color: str, *, size: tuple[int, int] = (24, 16), form: str = "PNG", **options: Any) -> Picture:
    """Return a picture of one color; a color of eight digits such as `#ff000080` is transparent."""
    file = io.BytesIO()
    mode = "RGBA" if len(color) == 9 else "RGB"
    Image.new(mode, size, color).save(file, form, **options)
    return Picture(file.getvalue())


def noise_png(seed: int, *, side: int = 40) -> bytes:
    """Return a picture of random pixels, which no database can compress."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def plain_png(color: str, *, side: int = 8) -> bytes:
    """Return a picture of one color as a file."""
    return drawn(color, size=(side, side)).read()
