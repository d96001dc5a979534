"""Measure the lengths of sentences in Markdown pages and docstrings. `python tests/sentence_lengths.py` prints them.

Code, tables, headings and URLs of links do not count. Each list item is a separate paragraph.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
LIMIT, LIMIT_OF_BENCHMARKS = 25, 30
"""Maximum words of nine in ten sentences."""

_NOT_PROSE = re.compile(r"<!--.*?-->|^ *(```|~~~).*?^ *\1|^---\n.*?^---\n", re.DOTALL | re.MULTILINE)
_SKIPPED_LINE = re.compile(r"\s*(?:\||#|<|!!!|\$\$|={3,}|-{3,})")
_LIST_MARK = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+|\s*>\s*")
_LINK = re.compile(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
_INLINE_CODE = re.compile(r"`[^`]+`")
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)[.!?]['\")*_]*(?=\s+[^a-z\s]|\s*$)")
_WORD = re.compile(r"\w[\w'’.,/%×-]*")


def sentences(markdown: str) -> list[str]:
    """Return the sentences of a page or a docstring."""
    text = _NOT_PROSE.sub("", markdown)
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.strip() or _SKIPPED_LINE.match(line):
            paragraphs.append([])
        elif _LIST_MARK.match(line):
            paragraphs.append([_LIST_MARK.sub("", line, count=1)])
        else:
            paragraphs[-1].append(line.strip())
    prose = (_INLINE_CODE.sub("Code", _LINK.sub(r"\1", " ".join(lines))) for lines in paragraphs)
    parts = (part.strip() for paragraph in prose for part in _SENTENCE_END.split(paragraph))
    return [part for part in parts if _WORD.search(part)]


def word_counts(markdown: str) -> list[int]:
    """Return the number of words of each sentence; a piece of code counts as one word."""
    return [len(_WORD.findall(sentence)) for sentence in sentences(markdown)]


def percentile_90(counts: Sequence[int]) -> float:
    """Return the 90th percentile of the lengths; 0 without sentences. It is the length of an actual sentence."""
    return float(np.percentile(counts, 90, method="higher")) if counts else 0.0


def pages() -> dict[str, int]:
    """Return the names of the project's Markdown pages, each with its limit."""
    docs = [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    benchmarks = sorted((ROOT / "benchmarks").glob("*.md"))
    limits = dict.fromkeys(docs, LIMIT) | dict.fromkeys(benchmarks, LIMIT_OF_BENCHMARKS)
    return {str(path.relative_to(ROOT)): limit for path, limit in limits.items()}


def rooms() -> dict[str, list[Path]]:
    """Return the Python files of the package by room; `.` is the top level."""
    package = ROOT / "personaplug"
    by_room: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0]
        by_room.setdefault("." if room.endswith(".py") else room, []).append(path)
    return by_room


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file, without the names in `Args:` and similar sections."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            yield re.sub(
                r"^ *(?:\w+: |(?:Args|Returns|Raises|Yields|Attributes):\n)", "\n\n", docstring, flags=re.MULTILINE
            )


def main() -> int:
    """Print the lengths; return 1 if a page exceeds its limit."""
    print("90th percentile of words a sentence, longest sentence, sentences")
    has_long_page = False
    for name, limit in pages().items():
        counts = word_counts((ROOT / name).read_text(encoding="utf-8"))
        is_long = percentile_90(counts) > limit
        has_long_page |= is_long
        _print_line(name, counts, note=f"  above {limit}" if is_long else "")
    for room, paths in rooms().items():
        texts = (text for path in paths for text in docstrings(path))
        _print_line(f"docstrings of {room}", [count for text in texts for count in word_counts(text)])
    return int(has_long_page)


def _print_line(name: str, counts: Sequence[int], *, note: str = "") -> None:
    print(f"{name:<36} {percentile_90(counts):>4.0f} {max(counts, default=0):>4} {len(counts):>5}{note}")


if __name__ == "__main__":
    sys.exit(main())
