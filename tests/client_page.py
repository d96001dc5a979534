"""The code blocks of docs/clients.md, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "clients.md"

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    code: str


def blocks() -> dict[str, list[Block]]:
    """Return the code blocks of the page by heading."""
    sections = re.split(r"^#+ (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        heading: [Block(*found) for found in _BLOCK.findall(text)]
        for heading, text in zip(sections[::2], sections[1::2], strict=True)
    }
