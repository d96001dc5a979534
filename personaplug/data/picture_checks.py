"""Find pictures that an encoder could not read."""

from __future__ import annotations

import io

from personaplug.data.pictures import MAX_PIXELS, Picture


def is_damaged(picture: Picture) -> bool:
    """Return whether a picture cannot be decoded or has too many pixels; False for all without Pillow."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        return False
    try:
        image = Image.open(io.BytesIO(picture.read()))
        width, height = image.size
        if width * height > MAX_PIXELS:
            return True
        image.draft("RGB", (64, 64))  # reads a JPEG at a lower resolution
        image.load()
    except Exception:  # decoders of damaged files raise errors of many types
        return True
    return False
