"""The code blocks of docs/clients.md, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

from markdown_code import CodeBlock, code_blocks

PAGE = Path(__file__).resolve().parents[1] / "docs" / "clients.md"


def blocks() -> dict[str, list[CodeBlock]]:
    """Return the code blocks of the page by heading."""
    sections = re.split(r"^#+ (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {heading: code_blocks(text) for heading, text in zip(sections[::2], sections[1::2], strict=True)}
