"""Pictures for tests, drawn and written by Pillow."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from personaplug.data.pictures import Picture


def drawn(color: str, *, size: tuple[int, int] = (24, 16), form: str = "PNG", **options: Any) -> Picture:
    """Return a picture of one color; a color of eight digits such as `#ff000080` is transparent."""
    file = io.BytesIO()
    mode = "RGBA" if len(color) == 9 else "RGB"
    Image.new(mode, size, color).save(file, form, **options)
    return Picture(file.getvalue())
