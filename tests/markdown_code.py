"""The fenced code blocks of Markdown pages, for tests that run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from textwrap import dedent

_FENCE = re.compile(
    r"^(?P<mark><!-- run -->\n+)?(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class CodeBlock:
    """A block of code, without its indentation.

    Attributes:
        runs: the page marks the block with `<!-- run -->`.
    """

    language: str
    code: str
    runs: bool


def code_blocks(text: str) -> list[CodeBlock]:
    """Return the code blocks of a Markdown text."""
    return [
        CodeBlock(each["language"], dedent(each["code"]), each["mark"] is not None) for each in _FENCE.finditer(text)
    ]


def code_in(text: str, language: str) -> list[str]:
    """Return the code of the blocks in a language; fail if there is none."""
    found = [block.code for block in code_blocks(text) if block.language == language]
    assert found, f"the page has no block of {language}"
    return found
