"""Small pictures, and rows of a log with pictures, for tests."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

RED, BLUE, GREEN = (200, 20, 20), (20, 20, 200), (20, 160, 20)
COLORS = {"red": RED, "blue": BLUE}

DECLARED: dict[str, Any] = {
    "name": "Kept",
    "kind": "label",
    "labels": ["kept", "returned"],
    "item_fields": ["product"],
    "answer_field": "verdict",
}
"""The `task.json` of `log_rows`, without a field for pictures."""


def png(color: tuple[int, int, int], *, side: int = 8) -> bytes:
    """Return a PNG of one color."""
    pixels = (b"\0" + bytes(color) * side) * side
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def cut_png() -> bytes:
    """Return a PNG whose pixels are missing, which only its decoder notices."""
    return png(RED, side=64)[:50]


def data_url(content: bytes, *, kind: str = "png") -> str:
    """Return a picture as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def log_rows(users: int = 6, *, days: int = 5) -> list[dict[str, Any]]:
    """Return rows of users who keep what is red or what is blue, with a picture of each product."""
    rows = []
    for user in range(users):
        for day in range(1, days + 1):
            color = ("red", "blue")[(user + day) % 2]
            rows.append({
                "customer": f"c{user}",
                "day": f"2026-01-{day:02}",
                "product": f"thing {user} {day}",
                "photo": png(COLORS[color], side=8 + user),
                "verdict": "kept" if color == ("red", "blue")[user % 2] else "returned",
            })  # fmt: skip
    return rows


def packed(*numbers: float) -> bytes:
    """Return a vector as items hold it."""
    return struct.pack(f"<{len(numbers)}f", *numbers)
